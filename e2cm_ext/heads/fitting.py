"""Passes over a dataset in which heads are fitted.

Under torch.distributed every process gets heads that are fitted on the data of all processes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.loader import Loader, check_reiterable
from ..data.overlap import FittedImages
from ..utils import distributed
from ..utils.warn import warn
from .base import Head
from .protocol import Walk

__all__ = ["fit"]


@torch.no_grad()
def fit(heads: Sequence[Head], walk: Walk, loader: Loader) -> tuple[list[Head], FittedImages]:
    """Fit heads, in as many passes over the data as they need.

    Heads that are fitted already are copied first. So after an error, or Ctrl-C, `heads` are as they were before.

    Args:
        heads: One for each exit.
        walk: Runs the network and shows the features at each exit.
        loader: The data.

    Returns:
        The fitted heads, and the images that they were fitted on.

    Raises:
        TypeError: Several passes are needed, and the user's loader is an iterator.
        ValueError: The data do not fit the network or the heads.
    """
    passes = max(head.passes for head in heads)
    check_reiterable(loader, passes)
    with torch.inference_mode(False):
        unfitted = [copy.deepcopy(head) if head.fitted else head for head in heads]
    fitted_images = FittedImages()
    try:
        for pass_index in range(passes):
            _run_pass(unfitted, walk, loader, pass_index, passes, fitted_images)
        fitted_images = FittedImages.merge(distributed.all_gather_objects(fitted_images))
    except BaseException:
        for head in unfitted:
            head.reset()
            head.fitted = False
        raise
    _warn_of_empty_classes(unfitted[0])
    return unfitted, fitted_images


def _run_pass(
    heads: Sequence[Head], walk: Walk, loader: Loader, pass_index: int, passes: int, fitted_images: FittedImages
) -> None:
    description = f"fit, pass {pass_index + 1} of {passes}"
    with distributed.synchronize_errors(description):
        for images, labels in loader.run(description, finite=True):
            if pass_index == 0:
                fitted_images.add(images)

            def update(j: int, x: Tensor, labels: Tensor = labels) -> None:
                if pass_index < heads[j].passes:
                    heads[j].update(x, labels, pass_index)

            walk(images, update, logits=False)
    for head in heads:
        if pass_index < head.passes:
            head.finish(pass_index)


def _warn_of_empty_classes(head: Head) -> None:
    empty = (head.counts == 0).nonzero().flatten().tolist()
    if empty:
        listed = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        warn(f"no sample of {len(empty)} of the {head.num_classes} classes ({listed}): no exit will ever predict these")
