"""A network with FastExit layers, as fitting, recording, timing and calibration want it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..calibration import profiler, recording
from ..calibration.profile import Profile
from ..calibration.record import Record
from ..data.loader import Loader, refuse_train_mode, to_network
from ..heads import Head, Rule
from ..heads.protocol import Visit
from ..stages import Costs
from ..stages.flops import counting, on_meta_device, one_sample
from .layer import FastExit
from .watcher import Watcher, watching

__all__ = ["FastExitNetwork", "check_fitted", "exits_of"]


def exits_of(model: nn.Module) -> dict[str, FastExit]:
    """All FastExit layers of a network by name, in the order in which they are set up."""
    exits = {name: module for name, module in model.named_modules() if isinstance(module, FastExit)}
    if not exits:
        raise ValueError(f"`model` is a {type(model).__name__} without a FastExit in it")
    return exits


def check_fitted(exits: dict[str, FastExit], thresholds: Iterable[float]) -> None:
    """Refuse thresholds that let an unfitted exit fire."""
    for (name, exit), limit in zip(exits.items(), thresholds, strict=True):
        if limit < math.inf:
            exit.check_fitted(f"exit {name!r}")


class FastExitNetwork:
    """The adapter: an ExitNetwork that runs the model's own forward().

    Args:
        model: A network with FastExit layers, in eval mode.
        what: What it is wanted for, for error messages.
    """

    combination = None  # each exit answers for itself

    def __init__(self, model: nn.Module, what: str) -> None:
        self.model, self.exits = model, exits_of(model)
        refuse_train_mode(model, what)
        self._example: Tensor | None = None  # images that have been run

    @property
    def exit_names(self) -> tuple[str, ...]:
        return tuple(self.exits)

    @property
    def rule(self) -> Rule:
        rules = {exit.rule.name: exit.rule for exit in self.exits.values()}
        if len(rules) > 1:
            raise ValueError(f"the exits have different rules, {' and '.join(map(repr, rules))}: a record has one")
        (rule,) = rules.values()
        return rule

    def head_list(self) -> list[Head]:
        return [exit.head for exit in self.exits.values()]

    def batches(self, loader: Iterable[Any], progress: bool) -> Loader:
        return Loader(loader, self.model, self.head_list()[0].num_classes, progress=progress)

    def walk(self, images: Tensor, visit: Visit, /, *, logits: bool) -> Tensor:
        self._example = images[:1] if self._example is None else self._example
        with watching(Watcher(dict(self.exits), visit)) as watcher:
            self.model(images)
        watcher.refuse_missing(logits)
        return images if watcher.logits is None else watcher.logits

    def record(self, loader: Iterable[Any], progress: bool = True) -> Record:
        self.check_fitted()
        fitted_images = next(iter(self.exits.values()))._fitted_images
        batches = self.batches(loader, progress)
        return recording.record(self, batches, fitted_images)

    def profile(self, images: Tensor, batch_size: int, *, repeats: int = 10, progress: bool = True) -> Profile:
        self.check_fitted()
        batch = to_network(images, self.model)
        return profiler.measure(self, batch, batch_size=batch_size, repeats=repeats, progress=progress)

    def check_fitted(self) -> None:
        """Refuse if any exit is not fitted."""
        check_fitted(self.exits, [-math.inf] * len(self.exits))

    @property
    def costs(self) -> Costs:
        """FLOPs per sample, counted for an image that has been run."""
        assert self._example is not None

        def run(model: nn.Module, sample: Tensor) -> list[int]:
            totals = [0]
            with counting() as flops_so_far:
                FastExitNetwork(model, "record").walk(sample, lambda j, x: totals.append(flops_so_far()), logits=False)
                return [*totals, flops_so_far()]

        totals = on_meta_device(run, self.model, one_sample(self._example, "images"))
        stages = tuple(after - before for before, after in pairwise(totals))
        return Costs(stages, tuple(head.flops() for head in self.head_list()), self.exit_names)
