"""Times of whole networks: in this process, on ONNX Runtime, in a server, with Ray."""

from __future__ import annotations

from collections.abc import Sequence

from ..markdown import table as grid
from .reading import Result, fixed, read, spread, table

BUDGETS = (0.3, 0.5, 0.7)


def row_of(found: Result, way: str, size: int, asked: float | None = None, network: str | None = None) -> Result:
    for row in found["rows"]:
        if (row["way"], row["size"], row.get("asked")) == (way, size, asked) and network in (None, row["network"]):
            return dict(row)
    return {}


def _cells(found: Result, way: str, size: int, time: str = "time") -> list[str]:
    """FLOPs and time at each budget."""
    rows = [row_of(found, way, size, budget) for budget in BUDGETS]
    return [f"{fixed(row['flops'], 2)}: {spread(row[time])}" if row else "" for row in rows]


def _idle(found: Result, size: int) -> str:
    row = row_of(found, "ours, none fires", size)
    return spread(row["time"]) if row else ""


def _by_size(file: str, sizes: Sequence[int]) -> str:
    found = read(file)
    rows = [[str(size), *_cells(found, "ours", size), _idle(found, size)] for size in sizes]
    return grid(["batch", "FLOPs 0.3 asked for", "0.5", "0.7", "all exits on, none fires"], rows, left=0)


@table("end-to-end-resnet56-cifar10")
def time_six_exits() -> str:
    return _by_size("end-to-end-resnet56-cifar10", (1, 8, 32, 128, 256))


@table("end-to-end-resnet56-cifar10-compiled")
def time_six_exits_compiled() -> str:
    return _by_size("end-to-end-resnet56-cifar10-compiled", (1, 8, 32, 128, 256))


@table("end-to-end-resnet56-cifar10")
def time_streamed() -> str:
    found = read("end-to-end-resnet56-cifar10")
    rows = [[str(size), *_cells(found, "predict_stream", size, "time, large")] for size in (1, 8, 32, 128, 256)]
    return grid(["batch of the loader", "FLOPs 0.3 asked for", "0.5", "0.7"], rows, left=0)


@table("end-to-end-resnet56-cifar10-3-exits", "end-to-end-resnet56-cifar10-3-exits-compiled")
def time_three_exits() -> str:
    eager, compiled = (read(f"end-to-end-resnet56-cifar10-3-exits{kind}") for kind in ("", "-compiled"))
    rows = []
    for label, found, sizes in (("eager", eager, (1, 8, 32, 128, 256)), ("compiled", compiled, (32, 128, 256))):
        rows += [[label, str(size), *_cells(found, "ours", size), _idle(found, size)] for size in sizes]
    for label, found in (("eager", eager), ("compiled", compiled)):
        label += ", `predict_stream(batch_size=128)`"
        rows += [[label, str(size), *_cells(found, "predict_stream", size), ""] for size in (32, 128, 256)]
    return grid(["", "batch", "FLOPs 0.3 asked for", "0.5", "0.7", "all exits on, none fires"], rows)


@table("end-to-end-resnet56-cifar10")
def time_other_ways() -> str:
    found = read("end-to-end-resnet56-cifar10")
    ways = ("ours", "plain torch, our heads", "plain torch", "earlyon")
    rows = [
        [str(size), *(spread(row_of(found, way, size, 0.5)["time"]) for way in ways)] for size in (1, 8, 32, 128, 256)
    ]
    header = ["batch", "this package", "plain torch, our scores", "plain torch", "earlyon"]
    return grid(header, rows, left=0)


NETWORKS = ("resnet50", "efficientnet_b0", "mobilenet_v3_large")


@table("end-to-end-torchvision")
def time_torchvision() -> str:
    found, rows = read("end-to-end-torchvision"), []
    for size in (4, 32):
        for network in NETWORKS:
            ours = [row_of(found, "ours", size, budget, network) for budget in BUDGETS]
            streamed = [row_of(found, "predict_stream", size, budget, network) for budget in BUDGETS]
            cells = [f"{fixed(row['flops'], 2)}: {fixed(row['time']['median'], 2)}" if row else "" for row in ours]
            idle = fixed(row_of(found, "ours, none fires", size, None, network)["time"]["median"], 2)
            cells += [idle, *(fixed(row["time"]["median"], 2) if row else "" for row in streamed)]
            rows.append([network, str(size), *cells])
    header = ["network", "batch", "FLOPs 0.3 asked for", "0.5", "0.7", "none fires", "streamed: 0.3", "0.5", "0.7"]
    return grid(header, rows)


def _onnx(file: str) -> str:
    cells: dict[tuple[int, int], list[str]] = {}
    for row in read(file)["rows"]:
        cells.setdefault((row["threads"], row["batch"]), []).append(
            f"{fixed(row['flops'], 3)}: {spread(row['time'], 3)}"
        )
    rows = [[str(threads), str(batch), *found] for (threads, batch), found in cells.items()]
    return grid(["threads", "images at a time", "0.25 of the FLOPs asked for", "0.5", "0.75"], rows, left=0)


@table("deploy-resnet56-onnx")
def onnx_six_exits() -> str:
    return _onnx("deploy-resnet56-onnx")


@table("deploy-resnet56-onnx-3-exits")
def onnx_three_exits() -> str:
    return _onnx("deploy-resnet56-onnx-3-exits")


@table("serving-resnet56-cifar10")
def serving() -> str:
    rows, columns = [], ("p50 ms", "p99 ms", "requests per second")
    labels = {"base": "the network, on ONNX Runtime", "0.5": "with exits, FLOPs 0.5 asked for"}
    for package, label in labels.items():
        rounds = [row for row in read("serving-resnet56-cifar10")["rows"] if row["package"] == package]
        ranges = [[row[column] for row in rounds] for column in columns]
        rows.append([label, *(f"{fixed(min(found), 0)} to {fixed(max(found), 0)}" for found in ranges)])
    return grid(["", "p50, ms", "p99, ms", "requests per second"], rows)


@table("bulk-resnet56-cifar10")
def bulk() -> str:
    found = read("bulk-resnet56-cifar10")
    header = ["images", "images answered", "workers killed", "answers that differ without Ray", "seconds"]
    different = found["other predictions than offline"] + found["other exits than offline"]
    keys = [found["images"], found["images answered"], found["workers killed"], different, round(found["seconds"])]
    return grid(header, [[f"{key:,}" for key in keys]], left=0)
