"""Peak memory of fitting exits on ResNet-50 at 224 x 224 with 1000 classes, beside that of running it.

    python -m bench memory

Images are noise and weights random: memory does not depend on them. Needs torchvision.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
from collections.abc import Sequence
from typing import Any

import torch

import e2cm_ext as e2cm
from e2cm_ext.cli import model_loader

from . import common

MEBIBYTE = 1 << 20
CLASSES = 1000


def peak() -> float:
    """Of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEBIBYTE


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, _ = model_loader.load(f"torchvision/{options.network}", weights="random")
    batch = torch.randn(options.batch, 3, options.size, options.size), torch.randint(CLASSES, (options.batch,))
    with torch.inference_mode():
        model(batch[0])
    alone = peak()
    ee = e2cm.EarlyExit(model, batch[0][:1], head=options.head)
    raw = sum(CLASSES * math.prod(head.feature_shape) * 4 for head in ee.heads) / MEBIBYTE
    held = sum(b.numel() * b.element_size() for b in ee.heads.buffers()) / MEBIBYTE
    ee.fit([batch] * options.batches, progress=False)
    return {
        "network": options.network,
        "batch": options.batch,
        "exits": len(ee.heads),
        "heads": sorted({head.kind for head in ee.heads}),
        "MiB": {"running the network": alone, "fitting": peak(), "heads": held, "raw means would hold": raw},
    }


def format_report(result: dict[str, Any]) -> str:
    mib = result["MiB"]
    return (
        f"{result['network']}, {result['exits']} exits, heads: {', '.join(result['heads'])}\n"
        f"running the network on batches of {result['batch']}: peak {mib['running the network']:.0f} MiB\n"
        f"fitting: peak {mib['fitting']:.0f} MiB, of which the heads hold {mib['heads']:.0f} MiB; raw means would hold "
        f"{mib['raw means would hold']:.0f} MiB"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("memory", __doc__)
    parser.add_argument("--network", default="resnet50", help="of torchvision (default: resnet50)")
    parser.add_argument("--size", type=int, default=224, help="of images (default: 224)")
    parser.add_argument("--head", default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=3)
    options = common.parse(parser, argv)
    result = measure(options)
    print(format_report(result))
    common.save(options, result, "torchvision")
