"""All methods on one network and one data set, under one counter: accuracy at some budgets of FLOPs, and what it took.

    python bench/methods.py networks.py "cifar10_resnet(56)" cifar10.npz --mean .485 .456 .406 --std .229 .224 .225 \\
        --work folder --methods e2cm sdn joined --json results.json

The first arguments are those of curves.py. Exits are trained on the training images but the last --held-out, thresholds
(and whatever else is chosen: lambdas, limits) are found on these; the test images are looked at once, for the table.
Budgets of training: one epoch, six epochs, and --long (of each method's own kind: frozen ones 25).

Every row is kept in --work when it is done, and trainings keep checkpoints there: the same command goes on where it was
killed. Seconds are those of all cores together, of the process alone: of training, with the one run of the network over
the training images that all epochs of a frozen method share.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from curves import arguments, network, write
from e2cm_ext.search import Points, hull, unbeaten
from torch import Tensor

import e2cm_ext as e2cm
from e2cm_ext.methods import aep, branchynet, bwds, curriculum, eenets, joined, sdn, training

BUDGETS = (0.15, 0.2, 0.25, 0.3, 0.5, 0.75)
PARTS = ("held_out", "test")
FROZEN_LONG = 25
Curve = Callable[[e2cm.Record], e2cm.Curve]


class Option(NamedTuple):
    """One threshold vector (or lambda, ...): mean FLOPs and accuracy where it was found, and on the test images."""

    flops: float
    accuracy: float
    test_flops: float
    test_accuracy: float


class Found(NamedTuple):
    options: list[Option]
    seconds: float  # of training, all cores
    parameters: int  # that the exits add
    exits: int


class Bench:
    """What all methods share: the network, the images, and a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.model = self.network()
        self.fit, self.held_out = (
            self._images("train", slice(-options.held_out)),
            self._images("train", slice(-options.held_out, None)),
        )
        self.test = self._images("test")
        self.example = next(iter(self.test))[0][:1]
        self.precision = torch.bfloat16 if options.bfloat16 else None

    def network(self) -> torch.nn.Module:
        """A new one, as it was trained: for methods that change it."""
        return network(self.options.networks, self.options.call).to(memory_format=torch.channels_last)

    def _images(self, split: str, part: slice | None = None) -> e2cm.data.Batches:
        normalise = (self.options.mean, self.options.std) if self.options.mean else None
        return e2cm.data.load(
            self.options.data, split=split, normalise=normalise, part=part, batch_size=self.options.batch,
            channels_last=True,
        )  # fmt: skip

    def epochs(self, budget: str, long: int) -> int:
        return {"one": 1, "six": 6, "long": self.options.long or long}[budget]

    def augmented(self) -> Augmented:
        """The training images as joint trainings see them: shuffled, shifted, mirrored."""
        images, labels = (torch.cat(column) for column in zip(*self.fit, strict=True))
        return Augmented(images, labels, self.options.batch, self.options.mirror)

    def features(self, ee: e2cm.EarlyExit, name: str) -> tuple[training.Cached, float]:
        """Of the training images, and mirrored, for the heads of `ee`; and the seconds that it took."""
        folder, variants = self.work / f"features-{name}", 2 if self.options.mirror else 1
        if not folder.exists():
            start = time.process_time()
            training.cache(ee, Variants(self.fit, variants), folder, dtype=torch.float16, variants=variants)
            (folder / "seconds").write_text(str((time.process_time() - start) / variants))
        cached = training.cache(ee, [], folder, variants=variants, batch_size=self.options.batch)
        return cached, float((folder / "seconds").read_text())

    def kept(self, name: str, make: Callable[[], tuple[e2cm.EarlyExit, float]]) -> tuple[e2cm.EarlyExit, float]:
        """An EarlyExit around the unchanged network, and the seconds it took: made once."""
        path, about = self.work / f"{name}.e2cm", self.work / f"{name}.seconds"
        if not path.exists():
            ee, seconds = make()
            about.write_text(str(seconds))
            ee.save(path)
        return e2cm.EarlyExit.load(path, self.model), float(about.read_text())

    def record(self, ee: e2cm.EarlyExit, name: str, part: str) -> e2cm.Record:
        """Of the images "held_out" or "test": made once for every name."""
        path = self.work / f"{name}.{part}.record"
        if not path.exists():
            ee.record(getattr(self, part)).save(path)
        return e2cm.Record.load(path)

    def record_of_learned(self, ee: e2cm.EarlyExit, name: str, part: str, heads: str) -> e2cm.Record:
        """The same for heads of the kind `heads` on the unchanged network, with one run of it for all of them."""
        path = self.work / f"{name}.{part}.record"
        if not path.exists():
            folder = self.work / f"features-{heads}-{part}"
            cached = training.cache(ee, getattr(self, part), folder)
            record_from(cached, ee).save(path)
        return e2cm.Record.load(path)

    def judge(self, ee: e2cm.EarlyExit, name: str, curve: Curve = e2cm.curve) -> list[Option]:
        return options_of(self.record(ee, name, "held_out"), self.record(ee, name, "test"), curve)


class Variants:
    """The images as they are, and then mirrored."""

    def __init__(self, batches: e2cm.data.Batches, variants: int) -> None:
        self.batches, self.variants = batches, variants

    def __len__(self) -> int:
        return self.variants * len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for variant in range(self.variants):
            for images, labels in self.batches:
                yield (images.flip(3) if variant else images), labels


class Augmented:
    """Batches in a new order every time; each image shifted by up to 4 pixels and mirrored by chance."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int, augment: bool) -> None:
        self.images, self.labels, self.batch, self.augment = images, labels, batch, augment

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.labels)).split(self.batch):
            images = self.images[rows]
            yield (self._altered(images) if self.augment else images), self.labels[rows]

    def _altered(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        mirrored = torch.rand(count) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
        down, right = torch.randint(9, (2, count, 1))
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        found = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]
        return found.permute(0, 3, 1, 2)


# ---- small parts that methods use -----------------------------------------------------------------------------------


def options_of(held_out: e2cm.Record, test: e2cm.Record, curve: Curve = e2cm.curve) -> list[Option]:
    """The corners of a curve on the held-out images, and what they give on the test images."""
    found = []
    line = curve(held_out)
    for flops, accuracy, thresholds in zip(line.flops.tolist(), line.accuracy.tolist(), line.thresholds, strict=True):
        there = test.replay(thresholds)
        found.append(Option(flops, accuracy, there.flops, there.accuracy))
    return found


@torch.no_grad()
def record_from(cached: training.Cached, ee: e2cm.EarlyExit) -> e2cm.Record:
    """What ee.record would be, from features (rule "confidence")."""
    assert ee.rule.name == "confidence"
    pieces = []
    for rows in torch.arange(len(cached.labels)).split(500):
        features, _ = cached.batch(rows)
        *early, last = (logits.log_softmax(1) for logits in training.ExitHeads(ee)(features))
        memory, answers = None, []
        for j, log_probs in enumerate([*early, last]):
            if ee.combination is not None:
                log_probs, memory = ee.combination(log_probs, memory, j, j == len(early))
            answers.append(log_probs)
        pieces.append(torch.stack(answers, 1))
    log_probs = torch.cat(pieces)
    return e2cm.Record(log_probs.amax(2).exp(), log_probs.argmax(2), cached.labels, ee.costs)


def parameters(ee: e2cm.EarlyExit) -> int:
    """Numbers that the exits hold, learned or averaged."""
    return sum(value.numel() for value in ee.heads.state_dict().values() if value.is_floating_point())


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def at(budgets: Sequence[float], options: Sequence[Option]) -> list[dict[str, float] | None]:
    """By time sharing between the corners of the hull of all options, where they were found; measured on the test."""
    points = Points(*(torch.tensor([o[i] for o in options], dtype=torch.float64) for i in (0, 1, 0)))
    front = unbeaten(points)
    corners = [options[front[i]] for i in hull(points.pick(front))]

    def measured(budget: float) -> dict[str, float] | None:
        if budget < corners[0].flops:
            return None
        for left, right in itertools.pairwise(corners):
            if left.flops <= budget < right.flops:
                share = (right.flops - budget) / (right.flops - left.flops)
                flops, accuracy = (share * left[i] + (1 - share) * right[i] for i in (2, 3))
                return {"budget": budget, "flops": flops, "accuracy": accuracy}
        return {"budget": budget, "flops": corners[-1].test_flops, "accuracy": corners[-1].test_accuracy}

    return [measured(budget) for budget in budgets]


# ---- E2CM alone -----------------------------------------------------------------------------------------------------


def means(bench: Bench, head: str) -> tuple[e2cm.EarlyExit, float]:
    """At every block."""

    def make() -> tuple[e2cm.EarlyExit, float]:
        ee = e2cm.EarlyExit(bench.model, bench.example, head=head)
        return ee, seconds_of(lambda: ee.fit(bench.fit))

    return bench.kept(head, make)


def e2cm_raw(bench: Bench, budget: str) -> Found:
    ee, seconds = means(bench, "class_means")
    return Found(bench.judge(ee, "class_means"), seconds, parameters(ee), len(ee.heads))


def e2cm_whitened(bench: Bench, budget: str) -> Found:
    ee, seconds = means(bench, "whitened_means")
    return Found(bench.judge(ee, "whitened_means"), seconds, parameters(ee), len(ee.heads))


# ---- SDN, alone and joined ------------------------------------------------------------------------------------------


def trained_sdn(bench: Bench, budget: str) -> tuple[e2cm.EarlyExit, float]:
    name = f"sdn-{budget}"

    def make() -> tuple[e2cm.EarlyExit, float]:
        ee = sdn.build(bench.model, bench.example, exits=bench.options.exits)
        features, of_features = bench.features(ee, "sdn")
        epochs, checkpoint = bench.epochs(budget, FROZEN_LONG), bench.work / f"{name}.checkpoint"
        return ee, of_features + seconds_of(lambda: sdn.train(ee, features, epochs=epochs, checkpoint=checkpoint))

    return bench.kept(name, make)


def records_of_sdn(bench: Bench, ee: e2cm.EarlyExit, budget: str) -> list[e2cm.Record]:
    return [bench.record_of_learned(ee, f"sdn-{budget}", part, "sdn") for part in PARTS]


def sdn_frozen(bench: Bench, budget: str) -> Found:
    """One threshold for all exits, as published."""
    ee, seconds = trained_sdn(bench, budget)
    found = options_of(*records_of_sdn(bench, ee, budget), sdn.curve)
    return Found(found, seconds, parameters(ee), len(ee.heads))


def sdn_thresholds(bench: Bench, budget: str) -> Found:
    """One for each."""
    ee, seconds = trained_sdn(bench, budget)
    return Found(options_of(*records_of_sdn(bench, ee, budget)), seconds, parameters(ee), len(ee.heads))


def consulting(bench: Bench, budget: str, head: str, leave: joined.Leave, agree: joined.Agree) -> Found:
    """SDN asks class means at its own exits."""
    ee, seconds = trained_sdn(bench, budget)
    others, of_means = means(bench, head)
    both = joined.join(ee, head, leave=leave, agree=agree)
    here, there = (
        (of_sdn, bench.record(others, head, part).at_exits(ee.exit_names))
        for of_sdn, part in zip(records_of_sdn(bench, ee, budget), PARTS, strict=True)
    )
    found: list[Option] = []
    for option in joined.options(*here, both.costs, leave, agree):
        on_test = joined.record(*there, both.costs, option.limits, leave, agree)
        found += options_of(option.record, on_test)
    extra = parameters(ee) + parameters(others.at_exits(ee.exit_names))
    return Found(found, seconds + of_means, extra, len(ee.heads))


def blended(bench: Bench, budget: str, head: str) -> Found:
    """Ours: SDN times class means, at SDN's exits."""
    ee, seconds = trained_sdn(bench, budget)
    others, of_means = means(bench, head)
    both = joined.join(ee, others, multiply=True)
    found = bench.judge(both, f"sdn-{budget} x {head}")
    return Found(found, seconds + of_means, parameters(both), len(both.heads))


def joined_ways(head: str) -> dict[str, Callable[[Bench, str], Found]]:
    def way(leave: joined.Leave, agree: joined.Agree) -> Callable[[Bench, str], Found]:
        return lambda bench, budget: consulting(bench, budget, head, leave, agree)

    short = head.split("_")[0]
    return {
        f"sdn x {short}": lambda bench, budget: blended(bench, budget, head),
        **{
            f"sdn+{short}, {leave}, {agree}": way(leave, agree)
            for leave in ("either", "both")
            for agree in ("class", "decision")
        },
    }


# ---- BWDS, EENets, AEP: exits where SDN has them --------------------------------------------------------------------


def pooled(bench: Bench) -> tuple[training.Cached, float]:
    """Averages over the map, without running the network again: of SDN's averages over the equal cells of a grid."""
    ee = sdn.build(bench.model, bench.example, exits=bench.options.exits)
    cached, seconds = bench.features(ee, "sdn")
    columns = []
    for head, squeezed in zip(ee.heads, cached.features, strict=False):
        channels, *size = head.feature_shape
        if len(size) != 2 or min(size) < 4 or any(side % 4 for side in size):
            raise ValueError(f"maps are {size}; wanted multiples of 4, whose cells are equal")
        columns.append(squeezed[:, 1].reshape(len(squeezed), channels, -1).float().mean(2))
    variants = 2 if bench.options.mirror else 1
    columns.append(cached.features[-1])
    return training.Cached(columns, cached.labels, bench.options.batch, variants=variants), seconds


def trained_bwds(bench: Bench, budget: str) -> tuple[e2cm.EarlyExit, float]:
    """Classifiers from the training images, decisions from those that are held out."""
    name = f"bwds-{budget}"

    def make() -> tuple[e2cm.EarlyExit, float]:
        ee = bwds.build(bench.model, bench.example, exits=bench.options.exits)
        features, of_features = pooled(bench)
        epochs, checkpoint = bench.epochs(budget, FROZEN_LONG), bench.work / f"{name}.checkpoint"
        return ee, of_features + seconds_of(
            lambda: bwds.train(ee, features, decide_on=bench.held_out, epochs=epochs, checkpoint=checkpoint)
        )

    return bench.kept(name, make)


def bwds_sweep(bench: Bench, budget: str) -> Found:
    """One price for all exits, as published."""
    ee, seconds = trained_bwds(bench, budget)
    options = bench.judge(ee, f"bwds-{budget}", lambda record: bwds.curve(ee, record, progress=False))
    return Found(options, seconds, parameters(ee), len(ee.heads))


def bwds_prices(bench: Bench, budget: str) -> Found:
    ee, seconds = trained_bwds(bench, budget)
    return Found(bench.judge(ee, f"bwds-{budget}"), seconds, parameters(ee), len(ee.heads))


def gated(bench: Bench, budget: str, joint: bool) -> Found:
    """EENets at price 1, and thresholds of the gates as they are calibrated."""

    def build(model: torch.nn.Module) -> e2cm.EarlyExit:
        return eenets.build(model, bench.example, exits=bench.options.exits)

    return learned(bench, budget, "eenets", build, eenets.train, joint)


def ensembles(bench: Bench, budget: str, joint: bool) -> Found:
    """AEP with hybrid weights; samples may leave with what the ensemble says so far, which is ours."""

    def build(model: torch.nn.Module) -> e2cm.EarlyExit:
        return aep.build(model, bench.example, exits=bench.options.exits)

    return learned(bench, budget, "aep", build, aep.train, joint)


def learned(
    bench: Bench,
    budget: str,
    name: str,
    build: Callable[[torch.nn.Module], e2cm.EarlyExit],
    train: Callable[..., list[float]],
    joint: bool,
) -> Found:
    """Exits alone, from features that are kept, or exits and network together, from augmented images."""
    epochs, unique = bench.epochs(budget, FROZEN_LONG), f"{name}-{'joint-' if joint else ''}{budget}"

    def taught(ee: e2cm.EarlyExit, loader: Any) -> float:
        checkpoint = bench.work / f"{unique}.checkpoint"
        how = {"epochs": epochs, "joint": joint, "checkpoint": checkpoint}
        return seconds_of(lambda: train(ee, loader, **how, precision=bench.precision if joint else None))

    def make() -> tuple[e2cm.EarlyExit, float]:
        ee = build(bench.model)
        features, of_features = pooled(bench)
        return ee, of_features + taught(ee, features)

    if joint:
        ee = build(bench.network())
        seconds = taught(ee, bench.augmented())
    else:
        ee, seconds = bench.kept(unique, make)
    return Found(bench.judge(ee, unique), seconds, parameters(ee), len(ee.heads))


# ---- SDN and BranchyNet, the network trained with them; SDN with a curriculum ----------------------------------------

LR_OF_TRAINED = 0.01  # ours: the network is not trained from scratch, for which the papers' learning rates are


def jointly(bench: Bench, budget: str, name: str, build: Any, train: Callable[..., Any], curve: Curve) -> Found:
    ee = build(bench.network(), bench.example)
    epochs, checkpoint = bench.epochs(budget, 100), bench.work / f"{name}-{budget}.checkpoint"
    how = {"epochs": epochs, "lr": LR_OF_TRAINED, "checkpoint": checkpoint, "precision": bench.precision}
    seconds = seconds_of(lambda: train(ee, bench.augmented(), **how))
    return Found(bench.judge(ee, f"{name}-{budget}", curve), seconds, parameters(ee), len(ee.heads))


def sdn_joint(bench: Bench, budget: str) -> Found:
    build = functools.partial(sdn.build, exits=bench.options.exits)
    return jointly(bench, budget, "sdn-joint", build, functools.partial(sdn.train, joint=True), sdn.curve)


def branches(bench: Bench, budget: str) -> Found:
    return jointly(bench, budget, "branchynet", branchynet.build, branchynet.train, e2cm.curve)


def sdn_paced(bench: Bench, budget: str, order: str) -> Found:
    """The exits alone; the difficulty is the network's own loss, which needs no run of it: its logits are kept."""
    name = f"sdn-{order}-{budget}"

    def make() -> tuple[e2cm.EarlyExit, float]:
        ee = sdn.build(bench.model, bench.example, exits=bench.options.exits)
        features, seconds = bench.features(ee, "sdn")
        own_logits, labels = features.features[-1][: features.count], features.labels[: features.count]
        difficulty = torch.nn.functional.cross_entropy(own_logits.double(), labels, reduction="none")
        loader = curriculum.paced(features, difficulty, bench.options.batch, order=order)
        epochs, checkpoint = bench.epochs(budget, FROZEN_LONG), bench.work / f"{name}.checkpoint"
        return ee, seconds + seconds_of(lambda: sdn.train(ee, loader, epochs=epochs, checkpoint=checkpoint))

    ee, seconds = bench.kept(name, make)
    records = [bench.record_of_learned(ee, name, part, "sdn") for part in PARTS]
    return Found(options_of(*records, sdn.curve), seconds, parameters(ee), len(ee.heads))


# ---- the table ------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    run: Callable[[Bench, str], Found]
    family: str  # what --methods chooses by
    trained: bool = True  # False: it is the same for every budget


METHODS: dict[str, Method] = {
    "e2cm, whitened": Method(e2cm_whitened, "e2cm", trained=False),
    "e2cm, raw": Method(e2cm_raw, "e2cm", trained=False),
    "sdn": Method(sdn_frozen, "sdn"),
    "sdn, a threshold each": Method(sdn_thresholds, "sdn"),
    **{
        name: Method(run, "joined")
        for head in ("class_means", "whitened_means")
        for name, run in joined_ways(head).items()
    },
    "sdn, joint": Method(sdn_joint, "sdn, joint"),
    **{
        f"sdn, in order: {order}": Method(functools.partial(sdn_paced, order=order), "curriculum")
        for order in ("curriculum", "anti", "random")
    },
    "branchynet": Method(branches, "branchynet, joint"),
    "bwds": Method(bwds_sweep, "bwds"),
    "bwds, a price each": Method(bwds_prices, "bwds"),
    "eenets, exits alone": Method(lambda bench, budget: gated(bench, budget, joint=False), "eenets"),
    "eenets": Method(lambda bench, budget: gated(bench, budget, joint=True), "eenets, joint"),
    "aep, exits alone": Method(lambda bench, budget: ensembles(bench, budget, joint=False), "aep"),
    "aep": Method(lambda bench, budget: ensembles(bench, budget, joint=True), "aep, joint"),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(options)
    rows = []
    for name, method in METHODS.items():
        if method.family not in options.methods:
            continue
        for budget in options.budgets if method.trained else ["-"]:
            kept = options.work / f"row {name} {budget}.json"
            if not kept.exists():
                if options.finished:
                    continue
                found = method.run(bench, budget)
                row = {
                    "method": name,
                    "training": budget,
                    "points": at(BUDGETS, found.options),
                    "seconds": found.seconds,
                    "parameters": found.parameters,
                    "exits": found.exits,
                    "mirrored": options.mirror and method.trained,
                    "bfloat16": options.bfloat16 and method.family.endswith(", joint"),
                }
                partial = kept.with_suffix(".partial")
                partial.write_text(json.dumps(row))
                shutil.move(partial, kept)
            rows.append(json.loads(kept.read_text()))
            print(line(rows[-1]), flush=True)
    correct = sum(int((bench.model(x).argmax(1) == y).sum()) for x, y in bench.test)
    return {
        "network": options.call,
        "data": Path(options.data).name,
        "accuracy of the network": correct / len(bench.test.dataset),
        "trained on": len(bench.fit.dataset),
        "thresholds from": len(bench.held_out.dataset),
        "epochs of long": options.long or "each method's own",
        "rows": rows,
    }


HEADER = (
    "| method | training | " + " | ".join(f"{b:.2f}" for b in BUDGETS) + " | exits | numbers added | core-seconds |\n"
    "| :-- | :-- |" + " --: |" * (len(BUDGETS) + 3)
)


def line(row: dict[str, Any]) -> str:
    cells = [f"{point['accuracy']:.3f}" if point else "" for point in row["points"]]
    last = [str(row["exits"]), f"{row['parameters']:,}", f"{row['seconds']:.0f}"]
    return f"| {' | '.join([row['method'], row['training'], *cells, *last])} |"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for features, checkpoints and rows")
    families = sorted({method.family for method in METHODS.values()})
    parser.add_argument("--methods", nargs="+", default=families, choices=families, help="default: all")
    parser.add_argument(
        "--exits",
        nargs="+",
        default=sdn.FRACTIONS,
        type=lambda text: text if text == "blocks" else float(text),
        help="where learned exits stand: fractions of the FLOPs, or the word blocks",
    )
    parser.add_argument("--budgets", nargs="+", default=["one", "six", "long"], choices=["one", "six", "long"])
    parser.add_argument("--finished", action="store_true", help="only the rows that --work holds already")
    parser.add_argument("--long", type=int, help="epochs of the budget 'long' (default: each method's own)")
    parser.add_argument("--held-out", type=int, default=5000, help="training images for thresholds (default: 5000)")
    parser.add_argument("--bfloat16", action="store_true", help="forward passes of joint trainings, by autocast")
    parser.add_argument("--no-mirror", dest="mirror", action="store_false", help="images must not be mirrored, shifted")
    options = parser.parse_args()
    options.exits = "blocks" if options.exits == ["blocks"] else options.exits
    result = measure(options)
    print(HEADER, *map(line, result["rows"]), sep="\n")
    if options.json:
        write(options.json, result)


if __name__ == "__main__":
    main()
