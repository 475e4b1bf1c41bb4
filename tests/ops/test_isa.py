"""Every instruction set that this machine and this build have: the op tests at each, and all against each other."""

import os
import re
from pathlib import Path

import pytest
import torch
from support.subprocesses import run_python

import e2cm_ext

pytestmark = pytest.mark.subprocess

HERE = Path(__file__).parent
LEVELS = e2cm_ext.build_info()["isa_available"]

# Prints nothing; saves what every op says about problems of many shapes.
SAVE = """
import sys
import torch
from support.tensors import clusters, generator
from e2cm_ext import Decisions, Statistics, build_info, ops

assert build_info()["isa"] == sys.argv[2]
answers = []
sizes = [(1, 1, 1), (3, 5, 2), (17, 37, 10), (33, 512, 13), (70, 1031, 49), (5, 70_001, 7), (9, 601, 1000)]
for rows, dim, classes in sizes:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, means, scale = clusters(rows, dim, classes, dtype, dtype, seed=dim)
        out = Decisions.empty(rows, classes)
        ops.decide(x, torch.randn(rows, classes, generator=generator(1)), float("-inf"), torch.arange(rows), out)
        answers.append([ops.class_distances(x, means), *ops.class_scores(x, means, scale), *out])
rich = Statistics(mean=(4, 4), rms=(2, 3), max=(2, 2))
for shape in [(3, 5, 7), (16, 32, 32), (40, 14, 14), (130, 4, 4)]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(6, *shape, generator=generator(2)).to(dtype)
        for maps in (x, x.contiguous(memory_format=torch.channels_last)):
            answers.append([ops.statistics(maps, rich)])
        for classes in (10, 50):
            weight = torch.randn(classes, rich.size(shape), generator=generator(3)) / rich.size(shape) ** 0.5
            answers.append([*ops.linear_scores(x, weight, torch.zeros(classes), rich)])
torch.save(answers, sys.argv[1])
"""


def python(isa, *arguments, check=True):
    told = {"E2CM_ISA": isa, "HYPOTHESIS_PROFILE": os.environ.get("HYPOTHESIS_PROFILE", "again")}
    return run_python(*arguments, env=told, check=check, timeout=500)


def test_the_level_in_use():
    info = e2cm_ext.build_info()
    assert info["isa"] == (os.environ.get("E2CM_ISA") or LEVELS[0])
    assert LEVELS[-1] == "scalar"  # every machine has it
    assert len(set(LEVELS)) == len(LEVELS)


@pytest.mark.slow
def test_the_best_level_is_taken_if_none_is_asked_for():
    result = python("", "-c", "import e2cm_ext; print(e2cm_ext.build_info()['isa'])")
    assert result.stdout.strip() == LEVELS[0]


@pytest.mark.slow
@pytest.mark.parametrize("isa", LEVELS)
def test_all_ops_at_every_level(isa):
    if isa == e2cm_ext.build_info()["isa"] and not os.environ.get("E2CM_ISA"):
        pytest.skip("the level of this very run")
    what = [HERE / name for name in ("test_isa.py::test_the_level_in_use", "test_ops.py", "test_statistics.py")]
    result = python(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *what)
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) > 400


@pytest.mark.slow
def test_the_levels_agree_to_rounding(tmp_path):
    answers = {}
    for isa in LEVELS:
        python(isa, "-c", SAVE, tmp_path / isa, isa)
        answers[isa] = torch.load(tmp_path / isa)
    for isa in LEVELS[:-1]:
        for one, other in zip(answers[isa], answers["scalar"], strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["sse9", "scalar,avx2"])
def test_a_level_that_is_not_there(wrong):
    result = python(wrong, "-c", "import e2cm_ext", check=False)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(r"(ImportError|RuntimeError): ", last)
    assert f"E2CM_ISA={wrong}: this machine and this build have {','.join(LEVELS)}" in last
    assert "unset it" in last
