"""The figure at the top of the README: accuracy over FLOPs, from results of `python -m bench curves`.

    python -m bench picture bench/results/curves-resnet56-cifar10.svg

Thresholds come from the training images that heads were not fitted on (from all of them for class means, as in the
paper), accuracies from the test images: "thresholds from training images" in these files. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CURVES = (
    ("whitened means (the default)", "curves-whitened-resnet56-cifar10.json", "thresholds from training images", "C0"),
    ("the same, 6 exits", "curves-whitened-resnet56-cifar10.json", "6 exits and thresholds from training images", "C2"),
    ("class means (the paper)", "curves-resnet56-cifar10.json", "thresholds from training images", "C1"),
)
SMALLER = ("a ResNet-20 instead", "curves-whitened-resnet20-cifar10.json", 0.33)  # its FLOPs, of the ResNet-56's


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def points(found: dict[str, Any], key: str) -> tuple[list[float], list[float]]:
    rows = found[key]["points"] if isinstance(found[key], dict) else found[key]
    rows = [row for row in rows if row]
    return [row["flops"] for row in rows], [row["accuracy"] for row in rows]


def draw() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, name, key, colour in CURVES:
        axes.plot(*points(read(name), key), marker="o", markersize=4, color=colour, label=label)
    base = read(CURVES[0][1])["accuracy of the network"]
    axes.axhline(base, color="0.4", linewidth=1, linestyle="--", label=f"the network alone: {base:.4f} at 1")
    label, name, flops = SMALLER
    axes.plot([flops], [read(name)["accuracy of the network"]], "*", markersize=12, color="C3", label=label)
    axes.set(
        xlabel="FLOPs per image, exits included, of the network's own",
        ylabel="accuracy on test images",
        title="ResNet-56, CIFAR-10",
        xlim=(0, 1.02),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench picture", description=__doc__, formatter_class=formatter)
    parser.add_argument("out", type=Path, help=".svg or .png")
    options = parser.parse_args(argv)
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "e2cm_ext"  # the same file every time
    metadata = {"Date": None} if options.out.suffix == ".svg" else {}
    draw().savefig(options.out, facecolor="white", metadata=metadata)
