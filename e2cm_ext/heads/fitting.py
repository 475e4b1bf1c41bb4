"""Passes over a data set in which heads are fitted.

Under torch.distributed every process gets the result for all parts of the data.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.loader import Loader, refuse_used_up
from ..data.overlap import FittedImages
from ..utils import distributed
from ..utils.warn import warn
from .base import Head
from .protocol import Walk

__all__ = ["fit"]


@torch.no_grad()
def fit(heads: Sequence[Head], walk: Walk, loader: Loader) -> tuple[list[Head], FittedImages]:
    """Fitted heads, one for each of `heads`, from as many passes as they need; and what images they have seen.

    Fitted ones are copied first; so if anything goes wrong on the way, or Ctrl-C comes, `heads` know what they knew.
    """
    passes = max(head.passes for head in heads)
    refuse_used_up(loader, passes)
    with torch.inference_mode(False):
        fresh = [copy.deepcopy(head) if head.fitted else head for head in heads]
    seen = FittedImages()
    try:
        for pass_index in range(passes):
            _one_pass(fresh, walk, loader, pass_index, passes, seen)
        seen = FittedImages.merge(distributed.all_gather_objects(seen))
    except BaseException:
        for head in fresh:
            head.reset()
            head.fitted = False
        raise
    _warn_of_empty_classes(fresh[0])
    return fresh, seen


def _one_pass(
    heads: Sequence[Head], walk: Walk, loader: Loader, pass_index: int, passes: int, seen: FittedImages
) -> None:
    what = f"fit, pass {pass_index + 1} of {passes}"
    with distributed.synchronize_errors(what):
        for images, labels in loader.run(what, finite=True):
            if pass_index == 0:
                seen.add(images)

            def show(j: int, x: Tensor, labels: Tensor = labels) -> None:
                if pass_index < heads[j].passes:
                    heads[j].update(x, labels, pass_index)

            walk(images, show, logits=False)
    for head in heads:
        if pass_index < head.passes:
            head.finish(pass_index)


def _warn_of_empty_classes(head: Head) -> None:
    empty = (head.counts == 0).nonzero().flatten().tolist()
    if empty:
        few = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        warn(
            f"no sample of {len(empty)} of the {head.num_classes} classes ({few}): no exit will ever answer with these",
        )
