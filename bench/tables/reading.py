"""Result files, the register of tables, and the source that stands below a table."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
Result = dict[str, Any]

TABLES: dict[str, tuple[Callable[[], str], Sequence[str]]] = {}  # by name: what makes it, and from which files

IMAGENET = "--mean .485 .456 .406 --std .229 .224 .225"
RESNET56 = f'networks.py "cifar10_resnet(56)" cifar10.npz {IMAGENET}'
RESNET20 = f'networks.py "cifar10_resnet(20)" cifar10.npz {IMAGENET}'
MICRONET = 'networks.py "cifar100_micronet()" cifar100.npz --mean .5071 .4865 .4409 --std .2673 .2564 .2762'
# To measure again what stands in files whose own command was not recorded, or not whole.
COMMANDS = {
    "curves-whitened-resnet56-cifar10-3-exits": f"curves {RESNET56} --head whitened_means --fit 20000 --select 3",
    "curves-whitened-resnet20-cifar10": f"curves {RESNET20} --head whitened_means --fit 45000",
    "curves-micronet-cifar100": f"curves {MICRONET} --head class_means --method paper",
    "curves-whitened-micronet-cifar100": f"curves {MICRONET} --head whitened_means --select 5 --skip-train",
    "end-to-end-resnet56-cifar10-3-exits": f"end_to_end {RESNET56} --fit 1000 --selected --count 3 --rounds 5",
    "end-to-end-resnet56-cifar10-3-exits-compiled": f"end_to_end {RESNET56} --fit 1000 --selected --count 3 --rounds 5 "
    "--sizes 32 128 256 --compiled",
    "deploy-resnet56-onnx-3-exits": f"deploy {RESNET56} --packages packages-3 --count 3",
    "methods-resnet56-cifar10-28-exits": f"methods {RESNET56} --work folder --no-mirror --exits blocks "
    "--methods sdn joined",
    "methods-resnet20-cifar10": f"methods {RESNET20} --work folder",
}


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


# ---- where figures come from ----------------------------------------------------------------------------------------


def sources(files: Sequence[str], page: Path) -> str:
    """Where the figures above come from, and the commands that measure them again."""
    to_results = Path(os.path.relpath(RESULTS, page.parent)).as_posix()
    lines, commands = [], []
    for file in files:
        about = read(file)["provenance"]
        lines.append(f"[`{file}.json`]({to_results}/{file}.json) ({', '.join(_facts(about))})")
        commands.append(_command(file, about))
    shown = "\n".join(dict.fromkeys(commands))
    return f"Source: {'; '.join(lines)}.\n\n```bash\n{shown}\n```"


def _facts(about: Result) -> list[str]:
    cores = [] if about["cores"] is None else [f"{about['cores']} cores"]
    processor = about["processor"] or "processor not recorded"
    return [processor, *cores, about["instruction_set"], f"torch {about['versions']['torch']}", about["date"][:10]]


def _command(file: str, about: Result) -> str:
    """As it is typed today, without --json."""
    if file in COMMANDS:
        return f"python -m bench {COMMANDS[file]}"
    command = re.sub(r"^python bench/(\w+)\.py", r"python -m bench \1", about["command"])
    command = re.sub(r" --json \S+$", "", command)
    return f"{command}  # {about['further_runs']}" if "further_runs" in about else command
