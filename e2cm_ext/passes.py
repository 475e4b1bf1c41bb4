"""Passes over a data set: heads are fitted, and what every exit would have said is recorded.

What a network is does not matter here: a walk runs it on a batch and shows the features at exit 0, 1, ... to `visit`,
before the network goes on (it may overwrite them). It returns the logits, unless nobody asks for them.

Under torch.distributed every process has a loader of its own part of the data, which may be empty, and gets the result
for all parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import data, notices, processes
from .combination import Combination, combined
from .cost import Costs
from .heads import Head
from .record import Record
from .rules import Rule
from .seen import Seen, numbers_of

__all__ = ["Loader", "Walk", "fit", "placed", "record"]

_SEEN = 0.01  # of the images: some data sets hold a few twice
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
    answers: Callable[[Tensor], Tensor] | None = None  # to images: they take the place of labels, which may be missing

    def run(self, what: str, finite: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over it, with a progress bar that says `what`. `finite`: images with a NaN are refused."""
        device, _ = place_of(self.network)
        batches = data.checked(
            self.batches,
            num_classes=self.num_classes,
            image_shape=self.image_shape,
            device=device,
            labels=self.answers is None,
            finite=finite,
        )
        with self._bar(batches, what) as bar:
            try:
                for images, labels in bar:
                    x = placed(images, self.network)
                    if self.answers is not None:
                        with torch.no_grad():
                            labels = self.answers(x.clone())  # a network may overwrite what it is given
                    assert labels is not None
                    yield x, labels
            except data.NoBatch:
                if processes.count() == 1:  # or others may have some
                    raise

    def images(self, what: str) -> Iterator[Tensor]:
        """One pass over the images alone, those of batches without a sample, too: there may be labels, or not."""
        device, dtype = place_of(self.network)
        batches = data.checked(
            self.batches, image_shape=self.image_shape, device=device, labels=False, finite=False, empty=True
        )
        with self._bar(batches, what) as bar:
            try:
                for images, _ in bar:
                    yield images.to(dtype) if images.is_floating_point() else images
            except data.NoBatch:
                if processes.count() == 1:  # as above
                    raise

    def _bar(self, batches: Iterator[Any], what: str) -> tqdm[Any]:
        try:
            total = len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            total = None
        return tqdm(batches, total=total, desc=what, unit="batch", disable=not self.progress, leave=False)


def place_of(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a network is, and in which dtype it counts."""
    for tensors in (network.parameters(), network.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return torch.get_default_device(), torch.get_default_dtype()


def placed(images: Tensor, network: nn.Module) -> Tensor:
    """On the network's device, in its dtype."""
    device, dtype = place_of(network)
    return images.to(device, dtype if images.is_floating_point() else images.dtype)


def no_labels(images: Tensor) -> Tensor:
    """In the place of those that nobody looks at."""
    return torch.zeros(len(images), dtype=torch.int64, device=images.device)


def refuse_train_mode(network: nn.Module, what: str) -> None:
    for name, module in network.named_modules():
        if module.training:
            which = repr(name) if name else "this one"
            raise RuntimeError(f"{what} needs a network in eval mode, and {which} is in train mode: call .eval() first")


# ---- fitting --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit(heads: Sequence[Head], walk: Walk, loader: Loader) -> tuple[list[Head], Seen]:
    """Fitted heads, one for each of `heads`, from as many passes as they need; and what images they have seen.

    Fitted ones are copied first; so if anything goes wrong on the way, or Ctrl-C comes, `heads` know what they knew.
    """
    passes = max(head.passes for head in heads)
    refuse_used_up(loader, passes)
    with torch.inference_mode(False):
        fresh = [copy.deepcopy(head) if head.fitted else head for head in heads]
    seen = Seen()
    try:
        for turn in range(passes):
            _one_pass(fresh, walk, loader, turn, passes, seen)
        seen = Seen.merge(processes.everyones(seen))
    except BaseException:
        for head in fresh:
            head.reset()
            head.fitted = False
        raise
    _warn_of_empty_classes(fresh[0])
    return fresh, seen


def refuse_used_up(loader: Loader, passes: int) -> None:
    if passes > 1 and isinstance(loader.batches, Iterator):
        raise TypeError(
            f"`loader` is a {type(loader.batches).__name__}, which can be run through only once; fit needs {passes} "
            "passes: give a DataLoader or a list, or heads that need one pass"
        )


def _one_pass(heads: Sequence[Head], walk: Walk, loader: Loader, turn: int, passes: int, seen: Seen) -> None:
    what = f"fit, pass {turn + 1} of {passes}"
    with processes.in_step(what):
        for images, labels in loader.run(what, finite=True):
            if turn == 0:
                seen.add(images)

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
        notices.warn(
            f"no sample of {len(empty)} of the {head.num_classes} classes ({few}): no exit will ever answer with these",
        )


# ---- recording ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def record(
    heads: Sequence[Head],
    rule: Rule,
    walk: Walk,
    loader: Loader,
    costs: Callable[[], Costs],
    seen: Seen | None,
    combination: Combination | None = None,
) -> Record:
    """What every head, and the network itself, says about every sample. `costs` is asked at the end. Of many processes:
    about the samples of all of them, in the order of their ranks.

    seen: by the heads when they were fitted, if that is known.
    """
    with processes.in_step("record"):
        mine, numbers = _rows(heads, rule, walk, loader, combination)
        spent = costs() if len(numbers) else None
    parts = processes.everyones((*mine, numbers))
    confidence, predictions, label, numbers = (torch.cat(column) for column in zip(*parts, strict=True))
    if not len(label):
        raise ValueError("the loader gave no sample: all its batches are empty")
    if seen is not None:
        _warn_of_seen(seen.share(numbers))
    known = next(found for found in processes.everyones(spent) if found is not None)
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
            certainty[:, j], prediction[:, j] = heads[j].judge(x, rule)
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
        notices.warn(
            f"about {share:.0%} of these images are among those that the exits were fitted on, and look better to them "
            "than new ones: for thresholds and figures that hold on new images, take others",
        )
