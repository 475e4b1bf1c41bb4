"""What all benches share: arguments, networks and images from files, timing, and result files.

Every result file has a block "provenance": the command, the commit, the processor, the number of threads and the
versions that its figures come from, see `provenance`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import e2cm_ext as e2cm
from e2cm_ext.cli import model_loader

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
SOURCES = ("bench", "csrc", "e2cm_ext", ":!bench/results")  # what a figure depends on
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- arguments ------------------------------------------------------------------------------------------------------


def argument_parser(name: str, description: str | None, *, threads: bool = True, seed: bool = True) -> Any:
    """A parser with the arguments of every bench: --json, and --threads and --seed where they make sense.

    Args:
        name: The bench's, as in `python -m bench NAME`.
        description: The docstring of its module.
        threads: Whether the bench runs on one number of threads of torch, which --threads sets.
        seed: Whether the bench draws random numbers by torch's global generator, which --seed seeds.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m bench {name}", description=description, formatter_class=formatter)
    parser.set_defaults(threads=None, seed=None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures (default: nowhere)")
    if threads:
        parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: as many as torch chooses)")
    if seed:
        parser.add_argument("--seed", type=int, default=0, help="of random numbers (default: 0)")
    return parser


def add_network(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """A network from a file, and its images. optional: there is another way to name a network."""
    count: dict[str, Any] = {"nargs": "?"} if optional else {}
    parser.add_argument("networks", type=Path, help="a Python file that makes the network", **count)
    parser.add_argument("call", help="what to call in it, such as 'cifar10_resnet(56)'", **count)
    add_images(parser, optional=optional)


def add_images(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    count: dict[str, Any] = {"nargs": "?"} if optional else {}
    parser.add_argument("data", help="a .npz file, or the name of a torchvision data set", **count)
    parser.add_argument("--root", default="data", help="the folder of torchvision data sets (default: data)")
    parser.add_argument("--mean", type=float, nargs="+", help="per channel, of images in [0, 1]; default: 0")
    parser.add_argument("--std", type=float, nargs="+", help="per channel (default: 1)")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with --threads and --seed set in torch, and `options.provenance`, taken before the run."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    if isinstance(options.threads, int):
        torch.set_num_threads(options.threads)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    command = f"{parser.prog} {shlex.join(argv)}".rstrip()
    options.provenance = provenance(command, getattr(options, "device", "cpu"))
    return options


# ---- networks and images --------------------------------------------------------------------------------------------


def network(options: argparse.Namespace, call: str | None = None, *, channels_last: bool = True) -> torch.nn.Module:
    """A new network, in eval mode: what `call` (default: options.call) makes in the file options.networks."""
    model, _ = model_loader.load(f"{options.networks}:{call or options.call}")
    return model.to(memory_format=torch.channels_last) if channels_last else model


def images(options: argparse.Namespace, split: str, part: slice | None = None, **load: Any) -> e2cm.data.Batches:
    """Batches of `split`, normalised by --mean and --std; load: further arguments of e2cm_ext.data.load."""
    normalise = (options.mean, options.std) if options.mean else None
    load = {"normalise": normalise, "root": options.root, "channels_last": True} | load
    return e2cm.data.load(options.data, split=split, part=part, **load)


def concatenated(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All images and all labels, each in one tensor."""
    all_images, all_labels = zip(*batches, strict=True)
    return torch.cat(all_images), torch.cat(all_labels)


# ---- timing ---------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that one call takes. With time.process_time: of all threads together."""
    start = clock()
    work()
    return clock() - start


def shuffled_rounds(
    samplers: Mapping[str, Callable[[], float]], seconds: float, least: int = 5
) -> dict[str, np.ndarray]:
    """One sample of every sampler per round, in a new order each round, so that noise hits all of them alike.

    Args:
        samplers: Functions that measure once, and return what they have measured.
        seconds: How long to go on.
        least: The least number of rounds.

    Returns:
        For every sampler its samples, one per round.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order, shuffle = list(samplers), random.Random(0).shuffle
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < least:
        shuffle(order)
        for name in order:
            samples[name].append(samplers[name]())
        rounds += 1
    return {name: np.array(values) for name, values in samples.items()}


def spread(values: np.ndarray | Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


# ---- result files ---------------------------------------------------------------------------------------------------


def save(options: argparse.Namespace, result: dict[str, Any], *packages: str) -> None:
    """Writes the figures and their provenance to --json, if it is given. packages: whose versions count, too."""
    if options.json:
        about = options.provenance
        versions = about["versions"] | {name: importlib.metadata.version(name) for name in packages}
        write_json(options.json, {"provenance": about | {"versions": versions}} | result)
        print(f"saved {options.json}", file=sys.stderr)


def write_json(path: Path, value: Any) -> None:
    """The file holds all of it, or stays as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def provenance(command: str, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Where the figures of a run come from.

    Returns:
        command: What was typed.
        commit: Of this checkout; None outside of one. modified: whether sources differed from the commit.
        processor, cores, gpu: Of the machine.
        instruction_set: That of the kernels in use. threads: Of torch.
        versions: Of Python and packages. build: See e2cm_ext.build_info.
    """
    build = e2cm.build_info()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {
        "command": command,
        "commit": _git("rev-parse", "HEAD"),
        "modified": None if (changes := _git("status", "--porcelain", "--", *SOURCES)) is None else changes != "",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "instruction_set": build["isa"],
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": versions | {"e2cm_ext": build["version"]},
        "build": build,
    }


def processor() -> str:
    """The model name of the processor, such as "Intel(R) Xeon(R) Processor"."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git says about this checkout; None where there is no git, or no checkout."""
    with contextlib.suppress(OSError):
        ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return ran.stdout.strip() if ran.returncode == 0 else None
    return None
