"""What else makes a network cheaper, and what exits add to it: bfloat16, int8, a smaller network.

    python -m bench alternatives networks.py "cifar10_resnet(56)" cifar10.npz --smaller "cifar10_resnet(20)" \\
        --mean .485 .456 .406 --std .229 .224 .225

`networks.py`, the calls and the data are those of `python -m bench curves`. Exits are fitted on the first --fit
training images, --count of them are chosen by ee.select, and their thresholds found, on the next --held-out for --flops
of their network; accuracies are those of the first --test test images, times those of the first --images of them in
batches of --batch, interleaved. Everything is eager and channels_last.

int8 is torch's own: torch.ao.quantization in FX graph mode, static, for x86, calibrated on the --held-out images. With
exits every stage is quantised by itself, so that its output is float32 again, for the exit behind it to read; exits are
fitted anew.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import e2cm_ext as e2cm
from e2cm_ext.utils.timing import ratio, time_interleaved

from . import common, markdown

Batches = Iterable[tuple[Tensor, Tensor]]
Run = Callable[[Tensor], Tensor]


# ---- networks -------------------------------------------------------------------------------------------------------


def with_exits(model: nn.Module, fit: Batches, held_out: Batches, options: argparse.Namespace) -> e2cm.EarlyExit:
    example, _ = next(iter(held_out))
    example = example.to(next(model.parameters()).dtype)
    ee = e2cm.EarlyExit(model, example[:1]).fit(fit)
    few = ee.select(held_out, options.count)
    assert few.selection is not None
    few.thresholds = few.selection.curve.best_within(options.flops).thresholds
    few.profile(example, options.batch, repeats=2)
    return few


def int8(model: nn.Module, batches: Batches) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    example, _ = next(iter(batches))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will move to another package
        observed = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (example[:1],))
        for images, _ in batches:
            observed(images)
        return convert_fx(observed).eval()


def int8_with_exits(ee: e2cm.EarlyExit, fit: Batches, held_out: Batches, options: argparse.Namespace) -> e2cm.EarlyExit:
    quantised = copy.deepcopy(ee)
    inputs = list(held_out)
    with torch.no_grad():
        for j, stage in enumerate(list(quantised.stages)):
            quantised.stages.parts[j] = part = int8(stage, inputs)
            inputs = [(part(x), labels) for x, labels in inputs]
    quantised.fit(fit).calibrate(held_out, flops=options.flops)
    quantised.profile(next(iter(held_out))[0], options.batch, repeats=2)
    return quantised


def cast_to_dtype_of(model: nn.Module, run: Run) -> Run:
    dtype = next(model.parameters()).dtype
    return lambda x: run(x.to(dtype))


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    images = partial(common.images, options, batch_size=options.batch)
    fit = images("train", slice(options.fit))
    held_out = images("train", slice(options.fit, options.fit + options.held_out))
    test = list(images("test", slice(options.test)))
    runs, rows = build(options, fit, held_out, test)
    timed = [x for x, _ in test][: -(-options.images // options.batch)]
    with torch.inference_mode():
        for name, run in runs.items():
            rows[name]["accuracy"] = accuracy(run, test)
        ways = {name: partial(run_all, run, timed) for name, run in runs.items()}
        seconds = time_interleaved(ways, options.rounds, progress=True)
    for name, row in rows.items():
        row["time"] = asdict(ratio(seconds[name], seconds[options.call]))
        row["ms per image"] = 1e3 * float(seconds[name].median()) / sum(map(len, timed))
    return {"asked for": options.flops, "batch": options.batch, "rounds": options.rounds, "rows": rows}


def build(
    options: argparse.Namespace, fit: Batches, held_out: Batches, test: Batches
) -> tuple[dict[str, Run], dict[str, dict[str, Any]]]:
    """Every network, with exits and without, and its FLOPs as a fraction of those of the whole network."""
    whole, smaller = common.network(options), common.network(options, options.smaller)
    models = {options.call: whole, "in bfloat16": copy.deepcopy(whole).bfloat16(), options.smaller: smaller}
    exits = {name: with_exits(model, fit, held_out, options) for name, model in models.items()}
    base = sum(exits[options.call].costs.stages)
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        ee = exits[name]
        share = sum(ee.costs.stages) / base
        runs[name], runs[f"{name}, with exits"] = cast_to_dtype_of(model, model), cast_to_dtype_of(model, ee)
        rows[name] = {"flops": share}
        rows[f"{name}, with exits"] = {"flops": share * ee.evaluate(test, progress=False).flops}
    quantised = int8_with_exits(exits[options.call], fit, held_out, options)
    runs["in int8"], runs["in int8, with exits"] = int8(whole, list(held_out)), quantised
    rows["in int8"] = {"flops": 1.0}
    rows["in int8, with exits"] = {"flops": quantised.evaluate(test, progress=False).flops}
    return runs, rows


def accuracy(run: Run, batches: Batches) -> float:
    correct = [run(images).argmax(1) == labels for images, labels in batches]
    return float(torch.cat(correct).float().mean())


def run_all(run: Run, batches: list[Tensor]) -> None:
    for images in batches:
        run(images)


def format_report(result: dict[str, Any]) -> str:
    rows = (
        [name, f"{r['flops']:.2f}", f"{r['accuracy']:.4f}", markdown.with_spread(r["time"]), f"{r['ms per image']:.3f}"]
        for name, r in result["rows"].items()
    )
    return markdown.table(["", "FLOPs", "accuracy", "time", "ms per image"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("alternatives", __doc__)
    common.add_network(parser)
    parser.add_argument("--smaller", required=True, help="the call that makes a smaller network")
    parser.add_argument("--batch", type=int, default=128, help="images in one (default: 128)")
    parser.add_argument("--flops", type=float, default=0.5, help="of its network, for exits (default: 0.5)")
    parser.add_argument("--count", type=int, default=6, help="exits (default: 6)")
    parser.add_argument("--fit", type=int, default=20000)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--test", type=int, default=4000)
    parser.add_argument("--images", type=int, default=512, help="to measure time with (default: 512)")
    parser.add_argument("--rounds", type=int, default=5)
    options = common.parse(parser, argv)
    result = measure(options)
    print(format_report(result))
    common.save(options, result | {"network": options.call})
