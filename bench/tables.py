"""Result tables of the README and of docs/, made from bench/results.

    python -m bench tables            # write the tables into the pages
    python -m bench tables --check    # change nothing; fail if a page is stale

A page holds the markers `<!-- generated: NAME -->` and `<!-- end -->`. The text between them is replaced by the table
NAME, and by the source of its figures: files, machine, versions and commands. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
IMAGENET = "--mean .485 .456 .406 --std .229 .224 .225"
RESNET56 = f'networks.py "cifar10_resnet(56)" cifar10.npz {IMAGENET}'
RESNET20 = f'networks.py "cifar10_resnet(20)" cifar10.npz {IMAGENET}'
MICRONET = 'networks.py "cifar100_micronet()" cifar100.npz --mean .5071 .4865 .4409 --std .2673 .2564 .2762'
EPYC = "AMD EPYC (Zen 4), two virtual cores, shared with other programs"

Result = dict[str, Any]

TABLES: dict[str, tuple[Callable[[], str], Sequence[str]]] = {}
# For result files that were written before commands and processors were recorded in them.
COMMANDS = {
    "curves-resnet56-cifar10": f"curves {RESNET56} --head class_means --method paper",
    "curves-whitened-resnet56-cifar10": f"curves {RESNET56} --head whitened_means --fit 45000 --select 6",
    "curves-whitened-resnet56-cifar10-3-exits": f"curves {RESNET56} --head whitened_means --fit 20000 --select 3",
    "curves-whitened-resnet20-cifar10": f"curves {RESNET20} --head whitened_means --fit 45000",
    "curves-resnet56-cifar10-20000": f"curves {RESNET56} --head whitened_means --fit 20000 --time-forward",
    "curves-micronet-cifar100": f"curves {MICRONET} --head class_means --method paper",
    "curves-whitened-micronet-cifar100": f"curves {MICRONET} --head whitened_means --select 5 --skip-train",
    "end-to-end-resnet56-cifar10": f"end_to_end {RESNET56} --fit 1000 --selected --rounds 4 --singles 64 --sizes 1 8"
    "  # then --sizes 32 128, and --sizes 256",
    "end-to-end-resnet56-cifar10-compiled": f"end_to_end {RESNET56} --fit 1000 --selected --rounds 4 --singles 64 "
    "--sizes 1 8 --compiled --rivals 9  # then --sizes 32 256, and --sizes 128",
    "end-to-end-resnet56-cifar10-3-exits": f"end_to_end {RESNET56} --fit 1000 --selected --count 3 --rounds 5",
    "end-to-end-resnet56-cifar10-3-exits-compiled": f"end_to_end {RESNET56} --fit 1000 --selected --count 3 --rounds 5 "
    "--sizes 32 128 256 --compiled",
    "end-to-end-torchvision": "end_to_end --torchvision resnet50 efficientnet_b0 mobilenet_v3_large --images 32 "
    "--rounds 3 --rivals 9 --sizes 4 --stream 4  # then --images 64 --rounds 2 --sizes 32 --stream 32",
    "alternatives-resnet56-cifar10": f'alternatives {RESNET56} --smaller "cifar10_resnet(20)"',
    "clusters-resnet20-cifar10": f"clusters {RESNET20}",
    "dec-mnist": "dec mnist.npz --seeds 0 1 2 --bfloat16 --threads 1 --time --picture dec-mnist.svg",
    "deploy-resnet56-onnx": f"deploy {RESNET56} --packages packages",
    "deploy-resnet56-onnx-3-exits": f"deploy {RESNET56} --packages packages-3 --count 3",
    "serving-resnet56-cifar10": f"serving cifar10.npz {IMAGENET} --packages packages",
    "bulk-resnet56-cifar10": f"bulk cifar10.npz {IMAGENET} --package packages/0.5.zip",
    "methods-resnet56-cifar10": f"methods {RESNET56} --work folder --no-mirror "
    "--methods sdn e2cm joined bwds eenets aep curriculum",
    "methods-resnet56-cifar10-28-exits": f"methods {RESNET56} --work folder --no-mirror --exits blocks "
    "--methods sdn joined",
    "methods-resnet20-cifar10": f"methods {RESNET20} --work folder",
}
MEASURED_ON_EPYC = ("alternatives", "dec", "deploy", "end-to-end", "serving")


def table(*files: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Registers a function as the table of its name; files: of bench/results, named as the source below the table."""

    def register(make: Callable[[], str]) -> Callable[[], str]:
        TABLES[make.__name__.replace("_", "-")] = (make, files)
        return make

    return register


# ---- reading and formatting -----------------------------------------------------------------------------------------


def read(name: str) -> Result:
    found: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; `left`: columns that are aligned to the left, the others are numbers."""
    alignment = [":--"] * left + ["--:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, alignment, *rows))


def points(found: Result, key: str) -> list[Result]:
    value = found[key]["points"] if isinstance(found[key], dict) else found[key]
    return [point for point in value if point]


def accuracy_at(budget: float, found: Sequence[Result]) -> str:
    """Accuracy at a budget; between two points of a curve by time sharing, which draws the line between them."""
    if not found or budget < found[0]["budget"] - 1e-9:
        return ""
    after = next((i for i, point in enumerate(found) if point["budget"] > budget + 1e-9), len(found))
    left, right = found[after - 1], found[min(after, len(found) - 1)]
    width = right["budget"] - left["budget"]
    share = (budget - left["budget"]) / width if width else 0.0
    return fixed((1 - share) * left["accuracy"] + share * right["accuracy"], 3)


def fixed(number: float, digits: int) -> str:
    """Rounded half up, from nine significant digits: 0.9175 is 0.918, and so is its float32."""
    return str(Decimal(f"{number:.9g}").quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def spread(time: Result, digits: int = 2) -> str:
    median, low, high = (fixed(time[key], digits) for key in ("median", "p10", "p90"))
    return f"{median} [{low}, {high}]"


def three_digits(number: float) -> str:
    return fixed(number, 0) if number >= 1000 else f"{number:#.3g}".rstrip(".")


def sources(files: Sequence[str], page: Path) -> str:
    """Where the figures above come from, and the commands that measure them again."""
    to_results = Path(os.path.relpath(RESULTS, page.parent)).as_posix()
    lines, commands = [], []
    for file in files:
        found = read(file)
        facts = [_processor(file, found), f"torch {found['torch']}", found["date"][:10]]
        lines.append(f"[`{file}.json`]({to_results}/{file}.json) ({', '.join(facts)})")
        commands.append(_command(file, found))
    shown = "\n".join(dict.fromkeys(commands))
    return f"Source: {'; '.join(lines)}.\n\n```bash\n{shown}\n```"


def _processor(file: str, found: Result) -> str:
    machine = found.get("machine", "")
    known = found.get("processor") or (machine.get("cpu") if isinstance(machine, dict) else "")
    if known:
        return str(known)
    return EPYC if file.startswith(MEASURED_ON_EPYC) else f"{machine}, {found['build']['isa']}"


def _command(file: str, found: Result) -> str:
    command = found.get("command") or f"python -m bench {COMMANDS[file]}"
    command = re.sub(r"^python bench/(\w+)\.py", r"python -m bench \1", command)
    return re.sub(r" --json \S+$", "", command)


# ---- accuracy -------------------------------------------------------------------------------------------------------

ON_TRAINING, ON_HELD_OUT = "thresholds from training images", "thresholds from held-out images"


@table(
    "curves-resnet56-cifar10",
    "curves-whitened-resnet56-cifar10",
    "curves-micronet-cifar100",
    "curves-whitened-micronet-cifar100",
)
def accuracy() -> str:
    resnet, micronet = read("curves-whitened-resnet56-cifar10"), read("curves-whitened-micronet-cifar100")
    columns = [
        points(read("curves-resnet56-cifar10"), ON_TRAINING),
        points(resnet, ON_TRAINING),
        points(resnet, f"6 exits and {ON_TRAINING}"),
        points(read("curves-micronet-cifar100"), ON_HELD_OUT),
        points(micronet, ON_HELD_OUT),
        points(micronet, f"5 exits and {ON_HELD_OUT}"),
    ]
    header = ["FLOPs"]
    header += [f"ResNet-56: {way}" for way in ("class means", "whitened means", "whitened means, 6 exits")]
    header += [f"MobileNetV3-like: {way}" for way in ("class means", "whitened means", "whitened means, 5 exits")]
    budgets = [i / 10 for i in range(1, 11)]
    return grid(header, [[fixed(b, 1), *(accuracy_at(b, column) for column in columns)] for b in budgets], left=0)


@table(
    "curves-whitened-resnet56-cifar10",
    "curves-whitened-resnet56-cifar10-3-exits",
    "curves-whitened-resnet20-cifar10",
    "curves-whitened-micronet-cifar100",
)
def accuracy_lossless() -> str:
    chosen = [
        ("ResNet-56", "curves-whitened-resnet56-cifar10", ON_TRAINING),
        ("ResNet-56, 6 exits", "curves-whitened-resnet56-cifar10", f"6 exits and {ON_TRAINING}"),
        ("ResNet-56, 3 exits", "curves-whitened-resnet56-cifar10-3-exits", f"3 exits and {ON_TRAINING}"),
        ("ResNet-20", "curves-whitened-resnet20-cifar10", ON_TRAINING),
        ("MobileNetV3-like", "curves-whitened-micronet-cifar100", ON_HELD_OUT),
        ("MobileNetV3-like, 5 exits", "curves-whitened-micronet-cifar100", f"5 exits and {ON_HELD_OUT}"),
    ]
    rows = []
    for label, file, key in chosen:
        outcome = read(file)[key]
        lossless, best = outcome["lossless at"], points(read(file), key)[-1]
        at_best = f"{fixed(best['accuracy'], 4)} at {fixed(best['flops'], 2)}"
        cheapest = fixed(lossless, 2) if lossless else "not reached"
        rows.append([label, fixed(outcome["network"], 4), cheapest, at_best])
    header = ["network", "its own accuracy", "FLOPs for a loss of at most 0.001", "accuracy with budget 1.0"]
    return grid(header, rows)


@table("curves-whitened-resnet20-cifar10", "alternatives-resnet56-cifar10")
def accuracy_smaller() -> str:
    small, ratio = read("curves-whitened-resnet20-cifar10"), _flops_of_resnet20()
    rows = [
        [fixed(ratio * point["budget"], 2), fixed(point["budget"], 1), fixed(point["accuracy"], 3)]
        for point in points(small, ON_TRAINING)
        if round(point["budget"], 2) in (0.3, 0.5, 0.7, 0.8)
    ]
    rows.append([fixed(ratio, 2), "1.0, no exits", fixed(small["accuracy of the network"], 3)])
    return grid(["FLOPs, as a fraction of the ResNet-56's", "of the ResNet-20's", "accuracy"], rows, left=0)


def _flops_of_resnet20() -> float:
    return float(read("alternatives-resnet56-cifar10")["rows"]["cifar10_resnet(20)"]["flops"])


@table("clusters-resnet20-cifar10")
def clusters() -> str:
    found, budgets = read("clusters-resnet20-cifar10"), (0.3, 0.5, 0.7, 0.9)
    ways = [("the network's own answers", "own answers"), ("ten clusters of its logits", "clusters")]
    rows = []
    for label, key in ways:
        whole = found[key]["accuracy at the exits"][-1]
        rows.append([label, *(accuracy_at(b, found[key]["points"]) for b in budgets), fixed(whole, 3)])
    return grid(["exits were fitted to", *map(str, budgets), "no early exit"], rows)


@table("clusters-resnet20-cifar10")
def clusters_exits() -> str:
    found = read("clusters-resnet20-cifar10")
    ways = [
        ("ten clusters of the network's logits", found["clusters"]),
        ("k-means of the features at each exit", found["k-means of its own"]),
    ]
    rows = [[label, *(fixed(x, 2) for x in way["accuracy at the exits"][:6])] for label, way in ways]
    return grid(["clusters", *(f"`{name}`" for name in found["exits"])], rows)


@table("dec-mnist")
def dec() -> str:
    found = read("dec-mnist")
    rows = [
        [f"{p['budget']:g}", fixed(p["flops"], 3), *(fixed(p[key], 3) for key in ("accuracy", "nmi", "ari"))]
        for p in found["mean"]
    ]
    seeds = found["seeds"]
    whole = [next(e for e in seed["exits"] if e["exit"] == "large") for seed in seeds]
    means = [fixed(sum(e[key] for e in whole) / len(seeds), 3) for key in ("accuracy", "nmi", "ari")]
    rows.append(["large encoder alone", "1.000", *means])
    return grid(["FLOPs asked for", "FLOPs on test images", "accuracy", "NMI", "ARI"], rows)


@table("dec-mnist")
def dec_time() -> str:
    timed = next(seed["time"] for seed in read("dec-mnist")["seeds"] if "time" in seed)
    rows = [
        [fixed(t["flops"], 2), f"{fixed(t['time'], 2)} [{fixed(t['10th'], 2)}, {fixed(t['90th'], 2)}]"] for t in timed
    ]
    return grid(["FLOPs", "time / the large encoder's"], rows, left=0)


# ---- methods --------------------------------------------------------------------------------------------------------

METHODS = {
    "e2cm, raw": "E2CM with class means (the paper's)",
    "e2cm, whitened": "whitened means (ours, the default)",
    "sdn": "SDN, one threshold",
    "sdn, a threshold each": "SDN, a threshold for each exit",
    **{
        f"sdn+{means}, {leave}, {agree}": f"SDN joined with {means} means, {leave}/{agree}"
        for means in ("class", "whitened")
        for leave in ("either", "both")
        for agree in ("class", "decision")
    },
    "sdn x class": "SDN times class means (ours)",
    "sdn x whitened": "SDN times whitened means (ours)",
    "sdn, in order: curriculum": "SDN, easy samples first",
    "sdn, in order: anti": "SDN, hard samples first",
    "sdn, in order: random": "SDN, in random order, paced alike",
    "bwds": "BWDS, one price",
    "bwds, a price each": "BWDS, a price for each exit",
    "eenets, exits alone": "EENets, exits alone",
    "aep, exits alone": "AEP, exits alone",
    "sdn, joint": "SDN, network too",
    "branchynet": "BranchyNet, network too",
    "eenets": "EENets, network too",
    "aep": "AEP, network too",
}
ONLY_IN_JOINED = {key for key in METHODS if key.endswith("decision") and key != "sdn+class, both, decision"}
ONLY_IN_JOINED |= {"sdn x class"}
SUMMARY = [key for key in METHODS if key not in ONLY_IN_JOINED and key != "bwds, a price each"]
E2CM = ["e2cm, raw", "e2cm, whitened"]


def methods(file: str, chosen: Sequence[str]) -> str:
    """Accuracy at three budgets, each after one epoch, six epochs and the long training."""
    rows = []
    for method in chosen:
        trainings = [row for row in read(file)["rows"] if row["method"] == method]
        if not trainings:
            continue
        cells = [", ".join(_short(row, budget) for row in trainings) for budget in (0.25, 0.5, 0.75)]
        last = trainings[-1]
        rows.append([METHODS[method], *cells, f"{last['parameters']:,}", fixed(last["seconds"], 0)])
    header = ["", "0.25: one epoch, six, long", "0.5", "0.75", "numbers in the exits", "core-seconds of the last"]
    return grid(header, rows)


def _short(row: Result, budget: float) -> str:
    point = next((p for p in row["points"] if p and p["budget"] == budget), None)
    return fixed(point["accuracy"], 3).removeprefix("0") if point else "-"


def of_method(name: str, *chosen: str, files: Sequence[str] = ("methods-resnet56-cifar10",)) -> None:
    """Registers the table of one method, on one network after the other."""

    def make() -> str:
        parts = []
        for file in files:
            found = read(file)
            exits = sorted({row["exits"] for row in found["rows"] if row["method"] in chosen})
            about = f"{found['network']} on CIFAR-10, {' or '.join(map(str, exits))} exits:"
            parts.append(f"{about}\n\n{methods(file, chosen)}")
        return "\n\n".join(parts)

    TABLES[f"method-{name}"] = (make, files)


ON_BOTH = ("methods-resnet56-cifar10", "methods-resnet20-cifar10")
JOINED = [key for key in METHODS if key.startswith(("sdn+", "sdn x"))]
of_method("e2cm", *E2CM, files=ON_BOTH)
of_method("sdn", "sdn", "sdn, a threshold each", "sdn, joint", *E2CM, files=ON_BOTH)
of_method("branchynet", "branchynet", *E2CM, files=ON_BOTH[1:])
of_method("bwds", "bwds", "bwds, a price each", *E2CM, files=ON_BOTH)
of_method("eenets", "eenets, exits alone", "eenets", *E2CM, files=ON_BOTH)
of_method("aep", "aep, exits alone", "aep", *E2CM, files=ON_BOTH)
of_method("curriculum", *(f"sdn, in order: {o}" for o in ("curriculum", "anti", "random")), "sdn", files=ON_BOTH)
of_method("joined", "sdn", *JOINED, *E2CM, files=(ON_BOTH[0], "methods-resnet56-cifar10-28-exits", ON_BOTH[1]))


@table("methods-resnet56-cifar10")
def methods_resnet56() -> str:
    return methods("methods-resnet56-cifar10", SUMMARY)


@table("methods-resnet56-cifar10-28-exits")
def methods_resnet56_28_exits() -> str:
    return methods("methods-resnet56-cifar10-28-exits", SUMMARY)


@table("methods-resnet20-cifar10")
def methods_resnet20() -> str:
    return methods("methods-resnet20-cifar10", SUMMARY)


PUBLISHED = {  # E2CM's paper, CIFAR-10, ResNet-152: its tables 1 and 2, at FLOPs .15, .2, .25, .3
    "E2CM + SDN": (("six", ".77 .85 .87 .87"), ("long", ".824 .864 .885 .888")),
    "SDN": (("six", ".66 .75 .85 .87"), ("long", ".8 .86 .884 .888")),
    "BWDS": (("six", ".77 .82 .84 .86"), ("long", ".82 .841 .86 .877")),
    "BranchyNet": (("six", ".57 .57 .57 .57"), ("long", ".8 .8 .8 .8")),
}
OURS_OF = {
    "E2CM + SDN": [f"sdn+class, {leave}, {agree}" for leave in ("either", "both") for agree in ("class", "decision")],
    "SDN": ["sdn"],
    "BWDS": ["bwds"],
    "BranchyNet": ["branchynet"],
}


@table("methods-resnet56-cifar10", "methods-resnet20-cifar10")
def methods_paper() -> str:
    rows = []
    for training, title in (("six", "Table 1"), ("long", "Table 2")):
        for scheme, published in PUBLISHED.items():
            budget = {"six": "six epochs", "long": "without limit"}[training]
            rows.append([f"{scheme}, ResNet-152, the paper's {title}", budget, *dict(published)[training].split()])
            for network, file in (("ResNet-56", ON_BOTH[0]), ("ResNet-20", ON_BOTH[1])):
                measured = [
                    row for row in read(file)["rows"]
                    if row["method"] in OURS_OF[scheme] and row["training"] == training
                ]  # fmt: skip
                if measured:
                    cells = [max(_short(row, b) for row in measured).replace("-", "") for b in (0.15, 0.2, 0.25, 0.3)]
                    epochs = {"six": "six epochs", "long": "25 epochs"}[training]
                    rows.append([f"{scheme}, {network}, here", epochs, *cells])
    return grid(["", "trained for", "0.15", "0.20", "0.25", "0.30"], rows, left=2)


# ---- time -----------------------------------------------------------------------------------------------------------

BUDGETS = (0.3, 0.5, 0.7)


def _row(found: Result, way: str, size: int, asked: float | None = None, network: str | None = None) -> Result:
    for row in found["rows"]:
        if (row["way"], row["size"], row.get("asked")) == (way, size, asked) and network in (None, row["network"]):
            return dict(row)
    return {}


def _cells(found: Result, way: str, size: int, time: str = "time") -> list[str]:
    """FLOPs and time at each budget."""
    rows = [_row(found, way, size, budget) for budget in BUDGETS]
    return [f"{fixed(row['flops'], 2)}: {spread(row[time])}" if row else "" for row in rows]


def _idle(found: Result, size: int) -> str:
    row = _row(found, "ours, none fires", size)
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
        [str(size), *(spread(_row(found, way, size, 0.5)["time"]) for way in ways)] for size in (1, 8, 32, 128, 256)
    ]
    header = ["batch", "this package", "plain torch, our scores", "plain torch", "earlyon"]
    return grid(header, rows, left=0)


NETWORKS = ("resnet50", "efficientnet_b0", "mobilenet_v3_large")


@table("end-to-end-torchvision")
def time_torchvision() -> str:
    found, rows = read("end-to-end-torchvision"), []
    for size in (4, 32):
        for network in NETWORKS:
            ours = [_row(found, "ours", size, budget, network) for budget in BUDGETS]
            streamed = [_row(found, "predict_stream", size, budget, network) for budget in BUDGETS]
            cells = [f"{fixed(row['flops'], 2)}: {fixed(row['time']['median'], 2)}" if row else "" for row in ours]
            idle = fixed(_row(found, "ours, none fires", size, None, network)["time"]["median"], 2)
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


# ---- alternatives, kernels ------------------------------------------------------------------------------------------

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


# ---- the one table of the README ------------------------------------------------------------------------------------


@table()
def readme_results() -> str:
    """Accuracy at budgets of FLOPs; then times, each with the FLOPs that the timed images took."""
    budgets = (0.25, 0.5, 0.6, 0.7, 1.0)
    whitened, other = read("curves-whitened-resnet56-cifar10"), read("alternatives-resnet56-cifar10")["rows"]
    small, ratio = read("curves-whitened-resnet20-cifar10"), _flops_of_resnet20()
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
        low, middle, high = (_timed(_row(timed, "ours", size, budget)) for budget in BUDGETS)
        rows.append([label, low, middle, "", high, "1"])
    rows.append(["int8, batches of 128", "", _timed(with_int8), "", "", _timed(alone)])
    small_alone, small_exits = other["cifar10_resnet(20)"], other["cifar10_resnet(20), with exits"]
    rows.append(["ResNet-20, batches of 128", _timed(small_exits), _timed(small_alone), "", "", ""])
    return grid(["ResNet-56, CIFAR-10; FLOPs:", *(f"{b:g}" for b in budgets)], rows)


def _timed(row: Result) -> str:
    time = row["time"]["median"]
    return fixed(time, 2) if math.isclose(row["flops"], 1.0) else f"{fixed(time, 2)} at {fixed(row['flops'], 2)}"


# ---- pages ----------------------------------------------------------------------------------------------------------


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, page: Path) -> str:
    """The text of a page with all its tables made anew."""

    def make(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise SystemExit(f"{page.relative_to(ROOT)}: there is no table {name!r}; there are {', '.join(TABLES)}")
        body, files = TABLES[name]
        source = f"{sources(files, page)}\n\n" if files else ""
        return f"{found[1]}\n{body()}\n\n{source}{found[4]}"

    return MARKED.sub(make, text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is stale")
    options = parser.parse_args(argv)
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text, page)
        if new == text:
            continue
        stale.append(str(page.relative_to(ROOT)))
        if not options.check:
            page.write_text(new, encoding="utf-8")
    if options.check and stale:
        raise SystemExit(f"stale: {', '.join(stale)}; run `python -m bench tables`")
    print(f"{'wrote' if stale else 'up to date:'} {', '.join(stale) or 'all pages'}")


if __name__ == "__main__":
    main()
