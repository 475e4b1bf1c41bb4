"""All methods on one network, and beside the figures of E2CM's paper."""

from __future__ import annotations

from collections.abc import Sequence

from ..markdown import table as grid
from .reading import TABLES, Result, fixed, read, table

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
