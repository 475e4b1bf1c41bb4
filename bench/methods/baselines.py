"""The methods: each a function of the workspace and a budget of training."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import e2cm_ext as e2cm
from e2cm_ext.methods import aep, branchynet, bwds, curriculum, eenets, joined, sdn, training

from ..common import seconds_of
from .results import Curve, Found, Option, options_of, parameters
from .workspace import PARTS, Workspace

FROZEN_LONG = 25  # epochs of exits on an unchanged network
JOINT_LONG = 100  # epochs of exits and network together
LR_OF_TRAINED = 0.01  # ours: the network is not trained from scratch, for which the papers' learning rates are

core_seconds = functools.partial(seconds_of, clock=time.process_time)
Run = Callable[[Workspace, str], Found]


def found_of(ee: e2cm.EarlyExit, options: list[Option], seconds: float) -> Found:
    return Found(options, seconds, parameters(ee), len(ee.heads))


# ---- E2CM alone -----------------------------------------------------------------------------------------------------


def means(work: Workspace, head: str) -> tuple[e2cm.EarlyExit, float]:
    """At every block."""

    def make() -> tuple[e2cm.EarlyExit, float]:
        ee = e2cm.EarlyExit(work.model, work.example, head=head)
        return ee, core_seconds(lambda: ee.fit(work.fit))

    return work.kept(head, make)


def e2cm_alone(work: Workspace, budget: str, head: str) -> Found:
    ee, seconds = means(work, head)
    return found_of(ee, work.options_of(ee, head), seconds)


# ---- SDN, alone and joined ------------------------------------------------------------------------------------------


def trained_sdn(work: Workspace, budget: str) -> tuple[e2cm.EarlyExit, float]:
    name = f"sdn-{budget}"

    def make() -> tuple[e2cm.EarlyExit, float]:
        ee = sdn.build(work.model, work.example, exits=work.options.exits)
        features, of_features = work.features(ee, "sdn")
        how = {"epochs": work.epochs(budget, FROZEN_LONG), "checkpoint": work.checkpoint(name)}
        return ee, of_features + core_seconds(lambda: sdn.train(ee, features, **how))

    return work.kept(name, make)


def records_of_sdn(work: Workspace, ee: e2cm.EarlyExit, name: str) -> list[e2cm.Record]:
    return [work.record_of_learned(ee, name, part, "sdn") for part in PARTS]


def sdn_frozen(work: Workspace, budget: str, curve: Curve) -> Found:
    """The exits alone. sdn.curve: one threshold for all exits, as published; e2cm_ext.curve: one for each."""
    ee, seconds = trained_sdn(work, budget)
    return found_of(ee, options_of(*records_of_sdn(work, ee, f"sdn-{budget}"), curve), seconds)


def sdn_paced(work: Workspace, budget: str, order: str) -> Found:
    """The exits alone; the difficulty is the network's own loss, which needs no run of it: its logits are kept."""
    name = f"sdn-{order}-{budget}"

    def make() -> tuple[e2cm.EarlyExit, float]:
        ee = sdn.build(work.model, work.example, exits=work.options.exits)
        features, seconds = work.features(ee, "sdn")
        own_logits, labels = features.features[-1][: features.count], features.labels[: features.count]
        difficulty = torch.nn.functional.cross_entropy(own_logits.double(), labels, reduction="none")
        loader = curriculum.paced(features, difficulty, work.options.batch, order=order)
        how = {"epochs": work.epochs(budget, FROZEN_LONG), "checkpoint": work.checkpoint(name)}
        return ee, seconds + core_seconds(lambda: sdn.train(ee, loader, **how))

    ee, seconds = work.kept(name, make)
    return found_of(ee, options_of(*records_of_sdn(work, ee, name), sdn.curve), seconds)


def consulting(work: Workspace, budget: str, head: str, leave: joined.Leave, agree: joined.Agree) -> Found:
    """SDN with class means at its own exits, which are asked, too."""
    ee, seconds = trained_sdn(work, budget)
    others, of_means = means(work, head)
    both = joined.join(ee, head, leave=leave, agree=agree)
    held_out, test = (
        (of_sdn, work.record(others, head, part).at_exits(ee.exit_names))
        for of_sdn, part in zip(records_of_sdn(work, ee, f"sdn-{budget}"), PARTS, strict=True)
    )
    options: list[Option] = []
    for option in joined.options(*held_out, both.costs, leave, agree):
        on_test = joined.record(*test, both.costs, option.limits, leave, agree)
        options += options_of(option.record, on_test)
    extra = parameters(ee) + parameters(others.at_exits(ee.exit_names))
    return Found(options, seconds + of_means, extra, len(ee.heads))


def blended(work: Workspace, budget: str, head: str) -> Found:
    """Ours: SDN times class means, at SDN's exits."""
    ee, seconds = trained_sdn(work, budget)
    others, of_means = means(work, head)
    both = joined.join(ee, others, multiply=True)
    return found_of(both, work.options_of(both, f"sdn-{budget} x {head}"), seconds + of_means)


def joined_ways(head: str) -> dict[str, Run]:
    short = head.split("_")[0]
    return {
        f"sdn x {short}": functools.partial(blended, head=head),
        **{
            f"sdn+{short}, {leave}, {agree}": functools.partial(consulting, head=head, leave=leave, agree=agree)
            for leave in ("either", "both")
            for agree in ("class", "decision")
        },
    }


# ---- BWDS, EENets, AEP: exits where SDN has them --------------------------------------------------------------------


def pooled(work: Workspace) -> tuple[training.Cached, float]:
    """Averages over the map, without running the network again: of SDN's averages over the equal cells of a grid."""
    ee = sdn.build(work.model, work.example, exits=work.options.exits)
    cached, seconds = work.features(ee, "sdn")
    columns = []
    for head, squeezed in zip(ee.heads, cached.features, strict=False):
        channels, *size = head.feature_shape
        if len(size) != 2 or min(size) < 4 or any(side % 4 for side in size):
            raise ValueError(f"maps are {size}; wanted multiples of 4, whose cells are equal")
        columns.append(squeezed[:, 1].reshape(len(squeezed), channels, -1).float().mean(2))
    columns.append(cached.features[-1])
    return training.Cached(columns, cached.labels, work.options.batch, variants=work.variants), seconds


def bwds_frozen(work: Workspace, budget: str, one_price: bool) -> Found:
    """Classifiers from the training images, decisions from those that are held out. one_price: as published."""
    name = f"bwds-{budget}"

    def make() -> tuple[e2cm.EarlyExit, float]:
        ee = bwds.build(work.model, work.example, exits=work.options.exits)
        features, of_features = pooled(work)
        how = {"epochs": work.epochs(budget, FROZEN_LONG), "checkpoint": work.checkpoint(name)}
        return ee, of_features + core_seconds(lambda: bwds.train(ee, features, decide_on=work.held_out, **how))

    ee, seconds = work.kept(name, make)
    curve = functools.partial(bwds.curve, ee, progress=False) if one_price else e2cm.curve
    return found_of(ee, work.options_of(ee, name, curve), seconds)


def learned(work: Workspace, budget: str, method: Any, name: str, joint: bool) -> Found:
    """EENets or AEP: exits alone, from features that are kept, or exits and network, from augmented images.

    EENets at price 1, and thresholds of the gates as they are calibrated. AEP with hybrid weights; samples may leave
    with the output of the ensemble so far, which is ours.
    """
    unique = f"{name}-{'joint-' if joint else ''}{budget}"
    how = {"epochs": work.epochs(budget, FROZEN_LONG), "joint": joint, "checkpoint": work.checkpoint(unique)}

    def build(model: torch.nn.Module) -> e2cm.EarlyExit:
        return method.build(model, work.example, exits=work.options.exits)

    def make() -> tuple[e2cm.EarlyExit, float]:
        ee = build(work.model)
        features, of_features = pooled(work)
        return ee, of_features + core_seconds(lambda: method.train(ee, features, **how))

    if joint:
        ee = build(work.network())
        seconds = core_seconds(lambda: method.train(ee, work.augmented(), precision=work.precision, **how))
    else:
        ee, seconds = work.kept(unique, make)
    return found_of(ee, work.options_of(ee, unique), seconds)


# ---- SDN and BranchyNet, the network trained with them --------------------------------------------------------------


def jointly(work: Workspace, budget: str, name: str, build: Any, train: Callable[..., Any], curve: Curve) -> Found:
    ee, unique = build(work.network(), work.example), f"{name}-{budget}"
    how = {"epochs": work.epochs(budget, JOINT_LONG), "lr": LR_OF_TRAINED, "checkpoint": work.checkpoint(unique)}
    seconds = core_seconds(lambda: train(ee, work.augmented(), precision=work.precision, **how))
    return found_of(ee, work.options_of(ee, unique, curve), seconds)


def sdn_joint(work: Workspace, budget: str) -> Found:
    build = functools.partial(sdn.build, exits=work.options.exits)
    return jointly(work, budget, "sdn-joint", build, functools.partial(sdn.train, joint=True), sdn.curve)


def branchynet_joint(work: Workspace, budget: str) -> Found:
    return jointly(work, budget, "branchynet", branchynet.build, branchynet.train, e2cm.curve)


# ---- all of them ----------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    run: Run
    family: str  # what --methods chooses by
    trained: bool = True  # False: it is the same for every budget

    @property
    def joint(self) -> bool:
        """Whether the network is trained with the exits."""
        return self.family.endswith(", joint")


def _learned(method: Any, name: str, joint: bool) -> Method:
    run = functools.partial(learned, method=method, name=name, joint=joint)
    return Method(run, f"{name}, joint" if joint else name)


METHODS: dict[str, Method] = {
    "e2cm, whitened": Method(functools.partial(e2cm_alone, head="whitened_means"), "e2cm", trained=False),
    "e2cm, raw": Method(functools.partial(e2cm_alone, head="class_means"), "e2cm", trained=False),
    "sdn": Method(functools.partial(sdn_frozen, curve=sdn.curve), "sdn"),
    "sdn, a threshold each": Method(functools.partial(sdn_frozen, curve=e2cm.curve), "sdn"),
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
    "branchynet": Method(branchynet_joint, "branchynet, joint"),
    "bwds": Method(functools.partial(bwds_frozen, one_price=True), "bwds"),
    "bwds, a price each": Method(functools.partial(bwds_frozen, one_price=False), "bwds"),
    "eenets, exits alone": _learned(eenets, "eenets", joint=False),
    "eenets": _learned(eenets, "eenets", joint=True),
    "aep, exits alone": _learned(aep, "aep", joint=False),
    "aep": _learned(aep, "aep", joint=True),
}
FAMILIES = sorted({method.family for method in METHODS.values()})
