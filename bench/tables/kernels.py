"""What else makes a network cheaper, and exit steps alone."""

from __future__ import annotations

from functools import partial

from ..markdown import table as grid
from .reading import TABLES, Result, fixed, read, spread, table, three_digits

ALTERNATIVES = {
    "cifar10_resnet(56)": "ResNet-56",
    "cifar10_resnet(56), with exits": "with exits",
    "in bfloat16": "in bfloat16",
    "in bfloat16, with exits": "in bfloat16, with exits",
    "in int8": "in int8",
    "in int8, with exits": "in int8, with exits",
    "cifar10_resnet(20)": "ResNet-20",
    "cifar10_resnet(20), with exits": "ResNet-20, with exits",
}


@table("alternatives-resnet56-cifar10")
def alternatives() -> str:
    found, rows = read("alternatives-resnet56-cifar10")["rows"], []
    for key, label in ALTERNATIVES.items():
        row = found[key]
        time = "1" if key == "cifar10_resnet(56)" else spread(row["time"])
        rows.append([label, fixed(row["flops"], 2), fixed(row["accuracy"], 3), time])
    return grid(["", "FLOPs", "accuracy", "time, median [10th, 90th percentile]"], rows)


def _shapes(found: Result) -> dict[tuple[int, int, int, int], Result]:
    return {(p["classes"], p["batch"], p["features"], p["threads"]): p for p in found["points"]}


def _kernels(machine: str) -> str:
    leave, half = (_shapes(read(f"kernels-{machine}{kind}")) for kind in ("-all-leave", ""))
    rows = []
    for (classes, batch, features, threads), point in leave.items():
        if threads != 1:
            continue
        shape = (classes, batch, features)
        times = point["microseconds"]
        ours, rival = times["ours"]["median"], times[point["best_rival"]]["median"]
        others = [leave[(*shape, 2)], half[(*shape, 1)], half[(*shape, 2)]]
        rows.append(
            [f"K={classes}, B={batch}, D={features}", three_digits(ours), three_digits(rival), spread(point["ratio"])]
            + [fixed(other["ratio"]["median"], 2) for other in others]
        )
    header = ["shape", "ours µs", "best rival µs", "ratio", "2 threads", "half leave", "half leave, 2 threads"]
    return grid(header, rows)


def _kernels_summary(machine: str) -> str:
    leave, half = (read(f"kernels-{machine}{kind}")["summary"] for kind in ("-all-leave", ""))
    rows = []
    for classes in sorted({row["classes"] for row in leave}):
        cells = []
        for summary in (leave, half):
            for threads in (1, 2):
                row = next(r for r in summary if (r["classes"], r["threads"]) == (classes, threads))
                cells.append(f"{fixed(row['mean'], 1)} (least {fixed(row['least'], 2)})")
        rows.append([str(classes), *cells])
    header = ["classes", "all leave, 1 thread", "2 threads", "half leave, 1 thread", "2 threads"]
    return grid(header, rows, left=0)


def _kernels_limit(machine: str) -> str:
    rows = []
    for (classes, batch, features, threads), point in _shapes(read(f"kernels-{machine}-all-leave")).items():
        if threads == 1 and batch >= 32 and features >= 4096:
            share = f"{point['share_of_limit']['median']:.0%}"
            rows.append([f"K={classes}, B={batch}, D={features}", share, point["limit"]["by"]])
    return grid(["shape", "speed reached on one thread, of the machine's limit", "the limit is"], rows)


def _kernels_call(machine: str) -> str:
    found = read(f"kernels-{machine}-all-leave")["call_overhead_microseconds"]
    rows = [[f"the sample {key}", spread(found[key], 1)] for key in ("stays", "leaves")]
    return grid(["K=10, B=1, D=64", "µs per call"], rows)


for _machine, _name in (("intel-xeon-processor", "intel"), ("amd-epyc", "epyc")):
    _files = (f"kernels-{_machine}-all-leave", f"kernels-{_machine}")
    for _suffix, _make in (("", _kernels), ("-summary", _kernels_summary)):
        TABLES[f"kernels-{_name}{_suffix}"] = (partial(_make, _machine), _files)
    for _suffix, _make in (("-limit", _kernels_limit), ("-call", _kernels_call)):
        TABLES[f"kernels-{_name}{_suffix}"] = (partial(_make, _machine), _files[:1])
