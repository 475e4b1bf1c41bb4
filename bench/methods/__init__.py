"""All methods on one network and one data set, under one counter: accuracy at some budgets of FLOPs, and what it took.

    python -m bench methods networks.py "cifar10_resnet(56)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225 \\
        --work folder --methods e2cm sdn joined --json results.json

The first arguments are those of `python -m bench curves`. Exits are trained on the training images except the last
--held-out, thresholds (and whatever else is chosen: lambdas, limits) are found on these; the test images are used once,
for the table. Budgets of training: one epoch, six epochs, and --long (of each method's own kind: frozen ones 25).

Every row is kept in --work when it is done, and trainings keep checkpoints there: the same command continues where it
was stopped. Seconds are those of all cores together, of the process alone: of training, with the one run of the network
over the training images that all epochs of a frozen method share.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from e2cm_ext.methods import sdn

from .. import common, markdown
from .baselines import FAMILIES, METHODS, Method
from .results import BUDGETS, at_budgets, cells, table
from .workspace import Workspace

TRAININGS = ["one", "six", "long"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    work = Workspace(options)
    rows = []
    for row in measure_rows(work):
        rows.append(row)
        print(markdown.row(cells(row)), flush=True)
    correct = sum(int((work.model(x).argmax(1) == y).sum()) for x, y in work.test)
    return {
        "network": options.call,
        "data": Path(options.data).name,
        "accuracy of the network": correct / len(work.test.dataset),
        "trained on": len(work.fit.dataset),
        "thresholds from": len(work.held_out.dataset),
        "epochs of long": options.long or "each method's own",
        "rows": rows,
    }


def measure_rows(work: Workspace) -> Iterator[dict[str, Any]]:
    """One per method and budget of training; those that --work holds already are read from there."""
    options = work.options
    for name, method in METHODS.items():
        if method.family not in options.methods:
            continue
        for budget in options.budgets if method.trained else ["-"]:
            kept = options.work / f"row {name} {budget}.json"
            if not kept.exists():
                if options.finished:
                    continue
                common.write_json(kept, measure_row(work, name, method, budget))
            yield json.loads(kept.read_text())


def measure_row(work: Workspace, name: str, method: Method, budget: str) -> dict[str, Any]:
    found = method.run(work, budget)
    return {
        "method": name,
        "training": budget,
        "points": at_budgets(BUDGETS, found.options),
        "seconds": found.seconds,
        "parameters": found.parameters,
        "exits": found.exits,
        "mirrored": work.options.mirror and method.trained,
        "bfloat16": work.options.bfloat16 and method.joint,
    }


def arguments() -> argparse.ArgumentParser:
    parser = common.argument_parser("methods", __doc__)
    common.add_network(parser)
    add = parser.add_argument
    add("--batch", type=int, default=128, help="images in one (default: 128)")
    add("--work", type=Path, required=True, help="a folder for features, checkpoints and rows")
    add("--methods", nargs="+", default=FAMILIES, choices=FAMILIES, help="default: all")
    add(
        "--exits",
        nargs="+",
        default=sdn.FRACTIONS,
        type=lambda text: text if text == "blocks" else float(text),
        help="where learned exits are: fractions of the FLOPs, or the word blocks",
    )
    add("--budgets", nargs="+", default=TRAININGS, choices=TRAININGS)
    add("--finished", action="store_true", help="only the rows that --work holds already")
    add("--long", type=int, help="epochs of the budget 'long' (default: each method's own)")
    add("--held-out", type=int, default=5000, help="training images for thresholds (default: 5000)")
    add("--bfloat16", action="store_true", help="forward passes of joint trainings, by autocast")
    add("--no-mirror", dest="mirror", action="store_false", help="images must not be mirrored, shifted")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = common.parse(arguments(), argv)
    options.exits = "blocks" if options.exits == ["blocks"] else options.exits
    result = measure(options)
    print(table(result["rows"]))
    common.save(options, result)
