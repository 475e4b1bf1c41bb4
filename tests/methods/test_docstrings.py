"""The examples in the docstrings of methods run."""

import functools
import inspect

import pytest
import torch
from support.networks import digits, example_of, trained
from torch import nn

import e2cm_ext as e2cm
from e2cm_ext.methods import aep, branchynet, bwds, curriculum, dec, eenets, joined, learned_head, sdn, training

MODULES = (aep, branchynet, bwds, curriculum, dec, eenets, joined, learned_head, sdn, training)
BUILD = {module: module.build for module in (aep, branchynet, eenets, sdn)}
BUILD[bwds] = functools.partial(bwds.build, prices=(1.0, 4.0))  # fewer than by default, which takes seconds
EXAMPLES = [
    (module, name)
    for module in MODULES
    for name in module.__all__
    if "\nExample:\n" in (inspect.getdoc(getattr(module, name)) or "")
]


def test_what_builds_and_trains_has_an_example():
    wanted = {(module, name) for module in MODULES for name in ("build", "train") if hasattr(module, name)}
    assert wanted <= set(EXAMPLES)


@pytest.mark.parametrize(("module", "name"), EXAMPLES, ids=lambda value: getattr(value, "__name__", value))
def test_example_runs(module, name):
    images, labels = (torch.cat(column) for column in zip(*digits()[0][:2], strict=True))
    model = trained()
    build = BUILD.get(module, sdn.build)
    scope = {
        "e2cm": e2cm,
        "LearnedHead": learned_head.LearnedHead,
        "nn": nn,
        "torch": torch,
        **{each.__name__.rpartition(".")[2]: each for each in MODULES},
        "model": model,
        "images": images,
        "labels": labels,
        "loader": [(images, labels)],
        "held_out": digits()[1][:2],
        "ee": training.finish(build(model, images[:1], exits=2)),
        "trained": training.finish(sdn.build(model, images[:1], exits=2)),
    }
    exec(example_of(getattr(module, name)), scope)
