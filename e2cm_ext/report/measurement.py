"""What a report measures: curves on samples that did not choose the thresholds, times, and the environment."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from ..calibration.curves import Method, OperatingPoint
from ..calibration.record import Record
from ..data.loader import to_network
from ..early_exit import EarlyExit
from ..native import build_info
from ..utils import timing
from ..utils.timing import Ratio

__all__ = ["SplitCurve", "environment", "first_images", "measure_times"]

_ROUNDS = 7
_SEED = 0


def first_images(loader: Iterable[Any], count: int) -> Tensor:
    """Return the first images of a loader.

    Args:
        loader: Batches of (images, labels).
        count: How many images are wanted. A loader with fewer images gives all that it has.
    """
    batches: list[Tensor] = []
    for images, _ in loader:
        batches.append(torch.as_tensor(images))
        if sum(map(len, batches)) >= count:
            break
    return torch.cat(batches)[:count]


class SplitCurve:
    """A curve whose thresholds are searched on one half of a record and evaluated on the other half.

    The halves are drawn with a fixed seed. Thresholds fit the samples that they were searched on better than new ones;
    the other half gives figures without this bias.

    Args:
        ee: The network. Its thresholds are not changed.
        record: What its exits say about some samples.
        progress: Show a progress bar.
        method: Of the threshold search: see EarlyExit.curve.

    Attributes:
        search_curve: The curve on the half that the thresholds were searched on.
        test_record: The other half.
        curve: The same thresholds, evaluated on `test_record`.

    Raises:
        ValueError: The record holds fewer than 2 samples.
    """

    def __init__(self, ee: EarlyExit, record: Record, progress: bool = False, method: Method = "auto") -> None:
        if len(record) < 2:
            raise ValueError(f"there are {len(record)} samples; wanted at least 2, better some thousand")
        order = torch.randperm(len(record), generator=torch.Generator().manual_seed(_SEED))
        search_record, self.test_record = (record.part(half.sort().values) for half in order.tensor_split(2))
        self.search_curve = ee.curve(search_record, progress, method=method)
        self.curve = self.search_curve.on(self.test_record)

    def best_within(self, flops: float) -> OperatingPoint | None:
        """Return the single threshold vector that is the most accurate within a budget on the search half.

        Args:
            flops: The budget, as a fraction of the network's FLOPs.

        Returns:
            These thresholds with their FLOPs and accuracy on `test_record`; None if no thresholds are so cheap.
        """
        if flops < float(self.search_curve.front.flops.min()):
            return None
        thresholds = self.search_curve.best_within(flops).thresholds
        replay = self.test_record.replay(thresholds)
        return OperatingPoint(replay.flops, replay.accuracy, thresholds)


def measure_times(
    ee: EarlyExit, images: Tensor, thresholds: Mapping[str, Tensor], rounds: int = _ROUNDS, progress: bool = False
) -> dict[str, Ratio]:
    """Measure the time of a batch under several threshold vectors, interleaved with the network without exits.

    Args:
        ee: The network. Its thresholds are the same afterwards. With all exits off it is the network without exits.
        images: One batch.
        thresholds: Names and threshold vectors [M].
        rounds: How often each is measured.
        progress: Show a progress bar.

    Returns:
        By name, the time as a fraction of that of the network without exits.

    Raises:
        ValueError: A threshold vector has another shape.
    """
    before = ee.thresholds
    images = to_network(images, ee.stages)

    def run_with(vector: Tensor | float) -> Callable[[], None]:
        def run() -> None:
            ee.thresholds = vector
            ee(images)

        return run

    try:
        with torch.inference_mode():
            runs = {"": run_with(math.inf), **{name: run_with(vector) for name, vector in thresholds.items()}}
            seconds = timing.time_interleaved(runs, rounds, device=ee.thresholds.device, progress=progress)
    finally:
        ee.thresholds = before
    base = seconds.pop("")
    return {name: timing.ratio(values, base) for name, values in seconds.items()}


def environment(ee: EarlyExit | None = None) -> dict[str, str]:
    """Return versions, machine and number of threads; with `ee` also its device."""
    build = build_info()
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "e2cm_ext": f"{build['version']}, {build['compiler']}, instruction set {build['isa']} of "
        f"{', '.join(build['isa_available'])}",
        "CUDA part": ", ".join(build["cuda_archs"]) or "not built",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "machine": f"{_processor()}, {os.cpu_count()} logical cores, {platform.system()}",
        "threads": str(torch.get_num_threads()),
    }
    if ee is not None:
        device = ee.thresholds.device
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0] if lines else platform.processor() or platform.machine()
