"""Passes over a data set: heads are fitted, and what every exit would have said is recorded.

What a network is does not matter here: a walk runs it on a batch and shows the features at exit 0, 1, ... to `visit`,
before the network goes on (it may overwrite them). It returns the logits, unless nobody asks for them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import data
from .calibration import Curve, OperatingPoint
from .cost import Costs
from .heads import Head
from .record import Record
from .rules import Rule

__all__ = ["Loader", "Walk", "check_target", "fit", "operating_point", "record"]

Visit = Callable[[int, Tensor], None]


class Walk(Protocol):
    def __call__(self, images: Tensor, visit: Visit, /, *, logits: bool) -> Tensor: ...


class Loader(NamedTuple):
    """Batches of somebody's loader as a network wants them: checked, on its device, in its dtype."""

    batches: Iterable[Any]
    network: nn.Module
    num_classes: int
    image_shape: tuple[int, ...] | None = None
    progress: bool = True

    def run(self, what: str, finite: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over it, with a progress bar that says `what`. `finite`: images with a NaN are refused."""
        device, dtype = place_of(self.network)
        try:
            total = len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            total = None
        batches = data.checked(
            self.batches, num_classes=self.num_classes, image_shape=self.image_shape, device=device, finite=finite
        )
        with tqdm(batches, total=total, desc=what, unit="batch", disable=not self.progress, leave=False) as bar:
            for images, labels in bar:
                yield images.to(dtype) if images.is_floating_point() else images, labels


def place_of(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a network is, and in which dtype it counts."""
    for tensors in (network.parameters(), network.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return torch.get_default_device(), torch.get_default_dtype()


def refuse_train_mode(network: nn.Module, what: str) -> None:
    for name, module in network.named_modules():
        if module.training:
            which = repr(name) if name else "this one"
            raise RuntimeError(f"{what} needs a network in eval mode, and {which} is in train mode: call .eval() first")


# ---- fitting --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit(heads: Sequence[Head], walk: Walk, loader: Loader) -> list[Head]:
    """Fitted heads, one for each of `heads`, from as many passes as they need.

    Fitted ones are copied first; so if anything goes wrong on the way, or Ctrl-C comes, `heads` know what they knew.
    """
    passes = max(head.passes for head in heads)
    if passes > 1 and isinstance(loader.batches, Iterator):
        raise TypeError(
            f"`loader` is a {type(loader.batches).__name__}, which can be run through only once; fit needs {passes} "
            "passes: give a DataLoader or a list, or heads that need one pass"
        )
    fresh = [copy.deepcopy(head) if head.fitted else head for head in heads]
    try:
        for turn in range(passes):
            _one_pass(fresh, walk, loader, turn, passes)
    except BaseException:
        for head in fresh:
            head.reset()
            head.fitted = False
        raise
    _warn_of_empty_classes(fresh[0])
    return fresh


def _one_pass(heads: Sequence[Head], walk: Walk, loader: Loader, turn: int, passes: int) -> None:
    for images, labels in loader.run(f"fit, pass {turn + 1} of {passes}", finite=True):

        def show(j: int, x: Tensor, labels: Tensor = labels) -> None:
            if turn < heads[j].passes:
                heads[j].update(x, labels, turn)

        walk(images, show, logits=False)
    for head in heads:
        if turn < head.passes:
            head.finish(turn)


def _warn_of_empty_classes(head: Head) -> None:
    empty = (head.counts == 0).nonzero().flatten().tolist()
    if empty:
        few = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        warnings.warn(
            f"no sample of {len(empty)} of the {head.num_classes} classes ({few}): no exit will ever answer with these",
            stacklevel=5,
        )


# ---- recording ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def record(heads: Sequence[Head], rule: Rule, walk: Walk, loader: Loader, costs: Callable[[], Costs]) -> Record:
    """What every head, and the network itself, says about every sample. `costs` is asked at the end."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for images, labels in loader.run("record"):
        count, exits = len(labels), len(heads)
        certainty = torch.empty(count, exits + 1, dtype=torch.float32, device=labels.device)
        prediction = torch.empty(count, exits + 1, dtype=torch.int32, device=labels.device)

        def show(j: int, x: Tensor, certainty: Tensor = certainty, prediction: Tensor = prediction) -> None:
            certainty[:, j], prediction[:, j] = heads[j].judge(x, rule)

        logits = walk(images, show, logits=True)
        certainty[:, -1] = rule.certainty(logits.log_softmax(1).float())
        prediction[:, -1] = logits.argmax(1)
        rows.append((certainty.cpu(), prediction.cpu(), labels.cpu()))
    if not rows:
        raise ValueError("the loader gave no sample: all its batches are empty")
    confidence, predictions, label = (torch.cat(column) for column in zip(*rows, strict=True))
    return Record(confidence, predictions, label, costs(), rule.name)


def check_target(flops: float | None, accuracy_drop: float | None) -> None:
    """Before hours are spent on finding out."""
    if (flops is None) == (accuracy_drop is None):
        raise TypeError(
            "calibrate wants one of `flops` (a fraction of the base network's, such as 0.5) and `accuracy_drop` (such "
            f"as 0.01); here are {'neither' if flops is None else 'both'}"
        )


def operating_point(curve: Curve, flops: float | None, accuracy_drop: float | None) -> OperatingPoint:
    """The most accurate thresholds within a FLOPs budget, or the cheapest that lose no more than that accuracy."""
    if flops is not None:
        return curve.best_within(flops)
    assert accuracy_drop is not None
    return curve.within(accuracy_drop)
