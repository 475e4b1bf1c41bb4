"""The one table of the README."""

from __future__ import annotations

import math

from ..markdown import table as grid
from .accuracy import ON_TRAINING, flops_of_resnet20
from .reading import Result, accuracy_at, fixed, points, read, table
from .time import BUDGETS, row_of


@table()
def readme_results() -> str:
    """Accuracy at budgets of FLOPs; then times, each with the FLOPs that the timed images took."""
    budgets = (0.25, 0.5, 0.6, 0.7, 1.0)
    whitened, other = read("curves-whitened-resnet56-cifar10"), read("alternatives-resnet56-cifar10")["rows"]
    small, ratio = read("curves-whitened-resnet20-cifar10"), flops_of_resnet20()
    alone, with_int8 = other["in int8"], other["in int8, with exits"]

    def smaller(budget: float) -> str:
        if budget >= ratio:
            return fixed(small["accuracy of the network"], 3)
        return accuracy_at(budget / ratio, points(small, ON_TRAINING))

    rows = [
        ["**accuracy**: whitened means (default), 28 exits"]
        + [accuracy_at(b, points(whitened, ON_TRAINING)) for b in budgets],
        ["whitened means, 6 selected exits"]
        + [accuracy_at(b, points(whitened, f"6 exits and {ON_TRAINING}")) for b in budgets],
        ["class means (the paper's method), 28 exits"]
        + [accuracy_at(b, points(read("curves-resnet56-cifar10"), ON_TRAINING)) for b in budgets],
        [f"a ResNet-20 instead ({fixed(ratio, 2)} of the FLOPs; below that, with exits)", *map(smaller, budgets)],
        ["int8, with 6 exits and without", "", fixed(with_int8["accuracy"], 3), "", "", fixed(alone["accuracy"], 3)],
    ]
    timed = read("end-to-end-resnet56-cifar10")
    for label, size in (("**time**: 6 exits, one image at a time", 1), ("6 exits, batches of 128", 128)):
        low, middle, high = (_timed(row_of(timed, "ours", size, budget)) for budget in BUDGETS)
        rows.append([label, low, middle, "", high, "1"])
    rows.append(["int8, batches of 128", "", _timed(with_int8), "", "", _timed(alone)])
    small_alone, small_exits = other["cifar10_resnet(20)"], other["cifar10_resnet(20), with exits"]
    rows.append(["ResNet-20, batches of 128", _timed(small_exits), _timed(small_alone), "", "", ""])
    return grid(["ResNet-56, CIFAR-10; FLOPs:", *(f"{b:g}" for b in budgets)], rows)


def _timed(row: Result) -> str:
    time = row["time"]["median"]
    return fixed(time, 2) if math.isclose(row["flops"], 1.0) else f"{fixed(time, 2)} at {fixed(row['flops'], 2)}"
