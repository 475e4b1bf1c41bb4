"""What `calibrate` can be asked for, and the thresholds that answer it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..heads.protocol import ExitNetwork
from ..ops import validation
from ..utils import distributed
from . import curves
from .curves import Curve, Method, OperatingPoint
from .guarantee import RiskKind, check_risk, guaranteed
from .latency import fastest
from .profile import Profile, check_batch_size
from .record import Record

__all__ = ["CalibratedNetwork", "Target", "refuse_foreign"]

_EXAMPLES = {
    "flops": "a fraction of the base network's, such as 0.5",
    "accuracy_drop": "such as 0.01",
    "latency": "a fraction of the base network's time, such as 0.5",
    "milliseconds": "per batch, such as 12.0",
    "risk": "(epsilon, delta), such as (0.01, 0.05)",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """One of the first five, and what it is to be judged by; see EarlyExit.calibrate."""

    flops: float | None
    accuracy_drop: float | None
    latency: float | None
    milliseconds: float | None
    risk: tuple[float, float] | None
    of: RiskKind
    batch_size: int
    profile: Profile | None
    method: Method

    def __post_init__(self) -> None:
        """Before hours are spent on finding out."""
        given = [f"`{name}`" for name in _EXAMPLES if getattr(self, name) is not None]
        if len(given) != 1:
            wanted = ", ".join(f"`{name}` ({example})" for name, example in _EXAMPLES.items())
            raise TypeError(f"calibrate wants one of {wanted}; here are {' and '.join(given) or 'none of them'}")
        curves.check_method(self.method)
        check_batch_size(self.batch_size, self.profile)
        for name in ("flops", "accuracy_drop", "latency", "milliseconds"):
            limit = getattr(self, name)
            if limit is not None and not validation.is_number(limit):
                raise TypeError(f"`{name}` is {limit!r}; wanted a number, {_EXAMPLES[name]}")
            if limit is not None and name in ("latency", "milliseconds") and not limit > 0:
                raise ValueError(f"`{name}` is {limit}; wanted a number above 0, {_EXAMPLES[name]}")
        if self.risk is not None:
            if not isinstance(self.risk, tuple | list) or len(self.risk) != 2:
                raise TypeError(f"`risk` is {self.risk!r}; wanted {_EXAMPLES['risk']}")
            check_risk(*self.risk, self.of)
        elif self.of != "accuracy":
            raise TypeError(
                f"`of` is {self.of!r}, which says what a `risk` is of; wanted risk=(epsilon, delta) with it"
            )

    def point(
        self, network: CalibratedNetwork, loader: Curve | Record | Iterable[Any], progress: bool
    ) -> OperatingPoint:
        """Find the operating point, from a loader or from a record or curve of it.

        Args:
            network: What the thresholds are for. Times are measured on the loader's first images.
            loader: Calibration samples, or what was recorded of them.
            progress: Show progress bars.
        """
        timed = self.latency is not None or self.milliseconds is not None
        self._refuse_too_little(loader, timed)
        remembering = _Remembering(loader)
        if isinstance(loader, Curve | Record):
            found: Curve | Record = loader
        else:
            found = network.record(remembering if timed else loader, progress)
        refuse_foreign(found, network)

        def measure() -> Profile:
            return network.profile(remembering.images, self.batch_size, progress=progress)

        # All processes have the same record, but their times differ, and a last bit may.
        return distributed.broadcast_from_rank0(lambda: self._of(found, measure, progress))

    def _of(self, found: Curve | Record, measure: Callable[[], Profile], progress: bool) -> OperatingPoint:
        if isinstance(found, Curve):
            return self._on(found)
        if self.risk is not None:
            return guaranteed(found, *self.risk, of=self.of, method=self.method, progress=progress)
        if self.latency is None and self.milliseconds is None:
            return self._on(curves.curve(found, method=self.method, progress=progress))
        return fastest(
            found,
            measure() if self.profile is None else self.profile,
            latency=self.latency,
            milliseconds=self.milliseconds,
            batch_size=self.batch_size,
            method=self.method,
            progress=progress,
        )

    def _refuse_too_little(self, loader: Any, timed: bool) -> None:
        if isinstance(loader, Curve) and (timed or self.risk is not None):
            raise TypeError(
                "a curve does not know what each sample does: for a time or a risk give a loader or a record"
            )
        if isinstance(loader, Record) and timed and self.profile is None:
            raise TypeError("a record holds no images to measure times with: give a loader, or profile=...")

    def _on(self, curve: Curve) -> OperatingPoint:
        """The most accurate thresholds within a FLOPs budget, or the cheapest that lose no more than that accuracy."""
        if self.flops is not None:
            return curve.best_within(self.flops)
        assert self.accuracy_drop is not None
        return curve.within(self.accuracy_drop)


class CalibratedNetwork(ExitNetwork, Protocol):
    """A network with exits that can be recorded and timed."""

    def record(self, loader: Iterable[Any], progress: bool = True) -> Record: ...

    def profile(self, images: Tensor, batch_size: int, *, progress: bool = True) -> Profile: ...


def refuse_foreign(found: Record | Curve, network: ExitNetwork) -> None:
    """Refuse a record or curve of another network."""
    if (found.names, found.rule) != (network.exit_names, network.rule.name):
        raise ValueError(
            f"the {type(found).__name__.lower()} is of another network, with the rule {found.rule!r} and exits "
            f"{', '.join(found.names)}; wanted {network.rule.name!r} and {', '.join(network.exit_names)}"
        )


class _Remembering:
    """A loader that keeps the images of its first batch that has any."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.images = torch.empty(0)  # of the processes that share a data set, one may have none

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for item in self._loader:
            images = item[0] if isinstance(item, tuple | list) else item
            if not len(self.images) and len(images):
                self.images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
            yield item
