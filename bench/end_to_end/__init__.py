"""Wall-clock of a network with early exits, against the network itself and against other ways to run exits.

    python -m bench end_to_end networks.py "cifar10_resnet(56)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225
    python -m bench end_to_end --torchvision resnet50 mobilenet_v3_large efficientnet_b0

With --compiled everything is compiled, the network too; with --fold all have their batch normalisations folded first.

All ways are interleaved on the same images, round by round, and a ratio is one of times of the same round. Exits are
those that ee.select keeps on the first images of the test split, and all; thresholds come from there, too, time is
measured on other images. The networks of torchvision have random weights, since no others are at hand, and their images
are noise: so do their exits, and thresholds are set so that the same share of the remaining samples leaves at each of
six exits. What that says about time holds for any weights with which as many leave there.

The other ways, with the same exits and thresholds:
- "plain torch": the same stages, and what a user would write between them: mask, nonzero, index_select;
- "plain torch, our heads": the same with the scores of our kernels;
- "earlyon": its wrapper around the network, with the scores of our kernels. It lets single images leave, not those of
  a batch; so a batch is given to it one by one. An exit behind a function and not a module, such as the ReLU of a stem,
  is hooked to the module before it.
- "earlyon, batches": its mode for batches, in which samples leave only where all of them can. Its decisions are others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from .. import common, markdown
from .measure import HEADER, measure
from .subjects import trained, untrained

BUDGETS = (0.3, 0.5, 0.7)
SIZES = (1, 8, 32, 128, 256)


def arguments() -> argparse.ArgumentParser:
    parser = common.argument_parser("end_to_end", __doc__)
    common.add_network(parser, optional=True)
    add = parser.add_argument
    add("--torchvision", nargs="+", default=[], help="networks of it, in place of a file and data")
    add("--size", type=int, default=224, help="of images for --torchvision (default: 224)")
    add("--head", default="whitened_means")
    add("--count", type=int, default=6, help="exits to select")
    add("--selected", action="store_true", help="these alone")
    add("--fit", type=int, default=2000, help="training images to fit on: time does not depend on it")
    add("--found", type=int, default=2048, help="test images to find exits and thresholds on")
    add("--images", type=int, default=256, help="to measure with")
    add("--singles", type=int, default=96, help="of them, in batches of one")
    add("--sizes", type=int, nargs="+", default=SIZES)
    add("--budgets", type=float, nargs="+", default=BUDGETS)
    add("--rivals", type=float, default=0.5, help="the budget at which the other ways are measured")
    add("--stream", type=int, default=128, help="batch_size of predict_stream")
    add("--rounds", type=int, default=5)
    add("--compiled", action="store_true")
    add("--freezing", action="store_true", help="with --compiled: weights become constants")
    add("--fold", action="store_true", help="with --compiled: batch normalisation is folded")
    add("--device", type=torch.device, default=torch.device("cpu"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments()
    options = common.parse(parser, argv)
    if not options.torchvision and options.data is None:
        parser.error("wanted a file that makes a network, what to call in it and data; or --torchvision NAME ...")
    options.compile_options = {"options": {"freezing": True}} if options.freezing else {}
    print(markdown.table(HEADER, [], left=1), flush=True)
    subjects = (untrained(name, options) for name in options.torchvision) if options.torchvision else [trained(options)]
    rows = [row for subject in subjects for row in measure(subject, options)]
    how = {"compiled": options.compiled, "freezing": options.freezing, "folded": options.fold}
    packages = [name for name in ("earlyon", "torchvision") if name in sys.modules]
    common.save(options, {"device": str(options.device), **how, "rows": rows}, *packages)
