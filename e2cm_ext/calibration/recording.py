"""A pass over a data set that records what every exit would have said about every sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.loader import Loader
from ..data.overlap import FittedImages, numbers_of
from ..heads.base import Head
from ..heads.ensemble import Combination, combined
from ..heads.protocol import Walk
from ..heads.rules import Rule
from ..stages.flops import Costs
from ..utils import distributed
from ..utils.warn import warn
from .record import Record

__all__ = ["record"]

_SEEN = 0.01  # of the images: some data sets hold a few twice


@torch.no_grad()
def record(
    heads: Sequence[Head],
    rule: Rule,
    walk: Walk,
    loader: Loader,
    costs: Callable[[], Costs],
    seen: FittedImages | None,
    combination: Combination | None = None,
) -> Record:
    """What every head, and the network itself, says about every sample. `costs` is asked at the end. Of many processes:
    about the samples of all of them, in the order of their ranks.

    seen: by the heads when they were fitted, if that is known.
    """
    with distributed.synchronize_errors("record"):
        mine, numbers = _rows(heads, rule, walk, loader, combination)
        spent = costs() if len(numbers) else None
    parts = distributed.all_gather_objects((*mine, numbers))
    confidence, predictions, label, numbers = (torch.cat(column) for column in zip(*parts, strict=True))
    if not len(label):
        raise ValueError("the loader gave no sample: all its batches are empty")
    if seen is not None:
        _warn_of_seen(seen.share(numbers))
    known = next(found for found in distributed.all_gather_objects(spent) if found is not None)
    return Record(confidence, predictions, label, known, rule.name)


def _rows(
    heads: Sequence[Head], rule: Rule, walk: Walk, loader: Loader, combination: Combination | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Certainties, predictions and labels of this process's part, and the numbers of its images."""
    exits = len(heads)
    none = torch.empty(0, dtype=torch.int64, device="cpu")
    rows = [(none.new_empty(0, exits + 1).float(), none.new_empty(0, exits + 1).int(), none)]
    numbers = [none]
    for images, labels in loader.run("record"):
        numbers.append(numbers_of(images))
        certainty, prediction = _said(heads, rule, walk, images, combination)
        rows.append((certainty.cpu(), prediction.cpu(), labels.cpu()))
    confidence, predictions, label = (torch.cat(column) for column in zip(*rows, strict=True))
    return (confidence, predictions, label), torch.cat(numbers)


def _said(
    heads: Sequence[Head], rule: Rule, walk: Walk, images: Tensor, combination: Combination | None
) -> tuple[Tensor, Tensor]:
    """Certainties [B, M+1] float32 and predictions [B, M+1] int32 of every exit, and of the network itself."""
    shape = (len(images), len(heads) + 1)
    certainty = torch.empty(shape, dtype=torch.float32, device=images.device)
    prediction = torch.empty(shape, dtype=torch.int32, device=images.device)
    memory: Tensor | None = None

    def show(j: int, x: Tensor) -> None:
        nonlocal memory
        if combination is None:
            certainty[:, j], prediction[:, j] = heads[j].score(x, rule)
        else:
            answer, certainty[:, j], memory = combined(combination, heads[j], rule, x, memory, j)
            prediction[:, j] = answer.argmax(1)

    logits = walk(images, show, logits=True)
    log_probs = logits.log_softmax(1).float()
    if combination is not None:
        logits, _ = combination(log_probs, memory, len(heads), True)
        log_probs = logits
    certainty[:, -1] = rule.certainty(log_probs)
    prediction[:, -1] = logits.argmax(1)
    return certainty, prediction


def _warn_of_seen(share: float) -> None:
    if share > _SEEN:
        warn(
            f"about {share:.0%} of these images are among those that the exits were fitted on, and look better to them "
            "than new ones: for thresholds and figures that hold on new images, take others",
        )
