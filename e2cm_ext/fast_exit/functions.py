"""What the methods of EarlyExit do for exits found in a model, for all FastExit layers of a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Curve, OperatingPoint, Profile, Record
from ..calibration.curves import Method
from ..calibration.guarantee import RiskKind
from ..calibration.target import Target
from ..heads import fitting
from ..heads.thresholds import threshold_vector
from .network import FastExitNetwork, check_fitted, exits_of

__all__ = ["calibrate", "fit", "profile", "record", "set_thresholds"]


def fit(model: nn.Module, loader: Iterable[Any], progress: bool = True) -> None:
    """Fit the heads of all FastExit layers from scratch, with forward passes only, in which no sample leaves.

    Where an exit had been fitted before, its threshold goes back to +inf. After an error, or Ctrl-C, all is as it was
    before.

    Args:
        model: A network with FastExit layers, in eval mode.
        loader: Yields (images, labels); as many passes as the heads need (class means: two).
        progress: Show a progress bar.
    """
    network = FastExitNetwork(model, "fit")
    fitted, fitted_images = fitting.fit(network.head_list(), network.walk, network.batches(loader, progress))
    for exit, head in zip(network.exits.values(), fitted, strict=True):
        if exit.head is not head:  # the copy of a fitted one
            exit.threshold = math.inf
            exit.head = head.eval()
        exit._fitted_images = fitted_images


def record(model: nn.Module, loader: Iterable[Any], progress: bool = True) -> Record:
    """Record what every FastExit, and the network itself, says about every sample: see EarlyExit.record.

    FLOPs are counted for one of the loader's images. The names of the exits are those of the layers.
    """
    return FastExitNetwork(model, "record").record(loader, progress)


def calibrate(
    model: nn.Module,
    loader: Curve | Record | Iterable[Any],
    *,
    flops: float | None = None,
    accuracy_drop: float | None = None,
    latency: float | None = None,
    milliseconds: float | None = None,
    risk: tuple[float, float] | None = None,
    of: RiskKind = "accuracy",
    batch_size: int = 128,
    profile: Profile | None = None,
    method: Method = "auto",
    progress: bool = True,
) -> OperatingPoint:
    """Set the thresholds of all exits for one target: see EarlyExit.calibrate."""
    target = Target(
        flops=flops,
        accuracy_drop=accuracy_drop,
        latency=latency,
        milliseconds=milliseconds,
        risk=risk,
        of=of,
        batch_size=batch_size,
        profile=profile,
        method=method,
    )
    point = target.point(FastExitNetwork(model, "calibrate"), loader, progress)
    set_thresholds(model, point)
    return point


def profile(
    model: nn.Module, images: Tensor, batch_size: int = 128, *, repeats: int = 10, progress: bool = True
) -> Profile:
    """Measure the time of every stage and every exit step here: see EarlyExit.profile."""
    return FastExitNetwork(model, "profile").profile(images, batch_size, repeats=repeats, progress=progress)


def set_thresholds(model: nn.Module, thresholds: OperatingPoint | Tensor | Sequence[float] | float) -> None:
    """Set the thresholds of all exits, in their order.

    Args:
        model: A network with FastExit layers.
        thresholds: Those of an operating point, a list, or one number for all exits.
    """
    exits = exits_of(model)
    given = thresholds.thresholds if isinstance(thresholds, OperatingPoint) else thresholds
    vector = torch.as_tensor(given, dtype=torch.float32).detach().cpu()
    vector = threshold_vector(vector.expand(len(exits)) if vector.dim() == 0 else vector, len(exits))
    check_fitted(exits, vector.tolist())
    for exit, limit in zip(exits.values(), vector.tolist(), strict=True):
        exit.threshold = limit
