"""Benchmarks of e2cm_ext.

python -m bench                     # this list
python -m bench NAME --help         # what one measures, and its arguments
python -m bench NAME [arguments]
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHES = {
    "kernels": "exit steps on the CPU against the best that can be written in torch",
    "gpu_kernels": "exit steps on a GPU against torch and against its copy bandwidth",
    "map_statistics": "statistics of feature maps against torch's pooling",
    "limits": "read bandwidth and peak of multiply-add of this machine",
    "curves": "accuracy at every exit, and accuracy over FLOPs",
    "methods": "all methods on one network and one data set",
    "clusters": "exits that were fitted without labels",
    "dec": "DEC with early exits: clustering accuracy over FLOPs",
    "end_to_end": "time of a network with early exits against the network and other ways to run exits",
    "alternatives": "bfloat16, int8 and a smaller network, each with exits and without",
    "memory": "peak memory of fitting exits",
    "deploy": "a network with early exits on ONNX Runtime",
    "serving": "a server of a network with early exits beside one of the network alone",
    "clients": "load for a server that runs already",
    "bulk": "bulk inference with Ray Data, one worker of which is killed",
    "picture": "the figure of the README, from the results of curves",
    "tables": "the result tables of README and docs",
}


def available() -> dict[str, str]:
    return {name: line for name, line in BENCHES.items() if importlib.util.find_spec(f"bench.{name}")}


def prefer_installed_package() -> None:
    """`python -m` searches the checkout first. Without a compiled module there, the installed e2cm_ext is meant."""
    if not any((ROOT / "e2cm_ext" / f"_native{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT)]


def main(argv: Sequence[str] | None = None) -> None:
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    benches = available()
    if name in ("-h", "--help"):
        width = max(map(len, benches))
        print(__doc__, *(f"{bench:<{width}}  {line}" for bench, line in benches.items()), sep="\n")
        return
    if name not in benches:
        raise SystemExit(f"there is no bench {name!r}; there are {', '.join(benches)}")
    prefer_installed_package()
    importlib.import_module(f"bench.{name}").main(arguments)


if __name__ == "__main__":
    main()
