"""Errors of wrong arguments name the argument, what came and what is wanted; and nothing crashes the process."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.op_arguments import CLASSES, DIM, ROWS, SPARSE, TAKES, WRONG, WRONG_FEATURES, call, good
from support.subprocesses import run_python
from support.tensors import INF, NAN, assert_same_decisions, copy_of, same_bits

from e2cm_ext import Decisions, ops


def cases():
    for op, taken in TAKES.items():
        of_this_op = [case for case in WRONG if case[0] in taken]
        if "means" in taken or "weight" in taken:
            of_this_op += WRONG_FEATURES
        for number, case in enumerate(of_this_op):
            yield pytest.param(op, *case, id=f"{op}-{case[0]}-{number}")


@pytest.mark.parametrize(("op", "argument", "bad", "error", "says"), list(cases()))
def test_wrong_arguments(op, argument, bad, error, says):
    for flat in (False, True):
        arguments = good(flat)
        before = copy_of(arguments["out"])
        arguments[argument] = bad(arguments) if callable(bad) else bad
        with pytest.raises(error) as caught:
            call(op, arguments)
        for part in says[:1] if flat else says:  # what is wanted of shapes depends on those of x
            assert part in str(caught.value)
        if argument != "out":
            assert_same_decisions(arguments["out"], before)


def test_good_arguments():
    """What the cases above spoil is right to begin with."""
    for op in TAKES:
        call(op, good())
        call(op, good(flat=True))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(("op", "argument", "sparse"), SPARSE)
def test_sparse_arguments_are_refused(op, argument, sparse):
    for flat in (False, True):
        arguments = good(flat)
        arguments[argument] = sparse(arguments)
        with pytest.raises(TypeError, match=f"`{argument}[.`].*torch.sparse"):
            call(op, arguments)


def test_a_mean_is_wanted_even_for_an_empty_batch():
    with pytest.raises(ValueError, match=r"`means` has shape \[4, 31\]"):
        ops.class_distances(torch.zeros(0, 30), torch.zeros(4, 31))
    with pytest.raises(ValueError, match="`threshold` is NaN"):
        ops.decide(torch.zeros(0, 1), torch.zeros(0, 3), NAN, torch.zeros(0).long(), Decisions.empty(0))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("op", ["exit_step", "linear_step", "decide"])
@pytest.mark.parametrize("bad", [-1, 7, 8, 2**31, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("threshold", [-INF, INF])
def test_ids_out_of_range_are_noticed_before_anything_is_written(op, bad, place, threshold, flat):
    arguments = good(flat) | {"threshold": threshold}
    arguments["ids"][place] = bad
    before = copy_of(arguments["out"])
    with pytest.raises(IndexError, match=f"`ids` holds {bad} at place {place}, but `out` has rows 0 to 6"):
        call(op, arguments)
    assert_same_decisions(arguments["out"], before)


@pytest.mark.parametrize("op", ["exit_step", "linear_step", "decide"])
def test_an_out_without_rows(op):
    arguments = good() | {"out": Decisions.empty(0, CLASSES)}
    with pytest.raises(IndexError, match="`ids`"):
        call(op, arguments)


@pytest.mark.parametrize("op", ["exit_step", "linear_step", "decide"])
@pytest.mark.parametrize("exit", [2**63, -(2**63) - 1, "first", None, 1.5])
def test_an_exit_that_is_no_int64(op, exit):
    arguments = good() | {"exit": exit}
    before = copy_of(arguments["out"])
    with pytest.raises(TypeError, match=f"`exit` is {re.escape(repr(exit))}; wanted the number of the exit"):
        call(op, arguments)
    assert_same_decisions(arguments["out"], before)


def test_an_unhashable_rule():
    with pytest.raises((TypeError, ValueError)):
        call("exit_step", good() | {"rule": ["confidence"]})


@pytest.mark.parametrize("threshold", [1, True, np.float32(0.5), np.array(0.5), torch.tensor(1), torch.tensor([[0.5]])])
def test_whatever_is_a_number_is_a_threshold(threshold):
    for op in ("exit_step", "linear_step", "decide"):
        arguments, as_float = good(), good()
        call(op, arguments | {"threshold": threshold})
        call(op, as_float | {"threshold": float(threshold)})
        assert_same_decisions(arguments["out"], as_float["out"])


@pytest.mark.parametrize("threshold", [1e300, -1e300, 1e-300])
def test_thresholds_beyond_float32_become_infinite_or_zero(threshold):
    arguments = good() | {"threshold": threshold}
    _, kept = call("exit_step", arguments)
    assert len(kept) == (ROWS if threshold > 1 else 0)


def test_scales_and_centers_may_be_of_any_floating_dtype():
    a = good()
    expected = ops.class_scores(a["x"], a["means"], a["scale"].half().float(), a["center"].half().float())
    for dtype in (torch.float16, torch.float64):
        got = ops.class_scores(a["x"], a["means"], a["scale"].half().to(dtype), a["center"].half().to(dtype))
        for one, other in zip(got, expected, strict=True):
            assert same_bits(one, other)


def test_meta_tensors_have_shapes_and_no_answers():
    """Another device than the CPU takes the way of reference.py: sizes that do not depend on data come out."""
    a = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in good().items()}
    scores = call("class_scores", a)
    assert [tuple(t.shape) for t in scores] == [(ROWS,), (ROWS,), (ROWS, CLASSES)]
    assert [tuple(t.shape) for t in call("linear_scores", a)] == [(ROWS,), (ROWS,), (ROWS, CLASSES)]
    assert call("class_distances", a).device.type == "meta"
    with pytest.raises(NotImplementedError):
        call("compact", a)


@given(st.data())
def test_any_mixture_is_answered_or_refused(data):
    """Values that are right for one argument and wrong for the next, in every place: an answer or a clean error."""
    pool = [*good().values(), None, 3, "x", torch.zeros(0), torch.zeros(0, 0), torch.zeros(2, 2, device="meta")]
    pool += [
        torch.zeros(ROWS, DIM, dtype=torch.int8),
        torch.zeros(ROWS, DIM).t(),
        torch.tensor(0.5),
        Decisions.empty(0),
    ]
    op = data.draw(st.sampled_from(sorted(TAKES)))
    arguments = good()
    for name in data.draw(st.lists(st.sampled_from(TAKES[op]), min_size=1, max_size=3, unique=True)):
        arguments[name] = data.draw(st.sampled_from(pool))
    try:
        call(op, arguments)
    except (TypeError, ValueError, IndexError) as error:
        assert re.search(r"`\w+(\.\w+)?`|unhashable", str(error))
    except NotImplementedError:
        assert arguments["x"].device.type == "meta"


# ---- states of torch in which a careless extension would write through a null pointer -----------------

PREPARE = """
import faulthandler, torch
from e2cm_ext import Decisions, Statistics, ops
look = Statistics(mean=(1, 1))
x, means, scale = torch.randn(40, 33), torch.randn(5, 33), torch.ones(5)
ids, out, keep = torch.arange(40), Decisions.empty(40, 5), torch.arange(40) % 2 == 0
expected = ops.class_scores(x, means, scale)
def everything():
    got = ops.class_scores(x, means, scale)
    ops.class_distances(x, means)
    ops.exit_step(x, means, scale, 0.3, ids, out)
    ops.statistics(x, look)
    ops.linear_scores(x, means, scale)
    ops.linear_step(x, means, scale, 0.3, ids, out, look)
    ops.decide(x, x[:, :5], 0.3, ids, out)
    ops.compact(x, keep)
    return got
"""
STATES = {
    "default device": """
torch.set_default_device("meta")
assert all(torch.equal(a, b) for a, b in zip(everything(), expected))
""",
    "default dtype": """
for dtype in (torch.bfloat16, torch.float16, torch.float64):
    torch.set_default_dtype(dtype)
    for _ in range(300):
        assert all(torch.equal(a, b) for a, b in zip(everything(), expected))
""",
    "fake mode, real tensors": """
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    try:
        everything()
    except Exception as error:
        print("refused:", error)
""",
    "real and fake tensors": """
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    fake = {"means": torch.randn(5, 33), "scale": torch.ones(5), "ids": torch.arange(40), "keep": keep}
for name, value in fake.items():
    real, globals()[name] = globals()[name], value
    try:
        everything()
    except Exception as error:
        print("refused:", error)
    globals()[name] = real
""",
    "functorch": """
try:
    torch.func.vmap(lambda row: ops.class_distances(row, means))(x[None])
except Exception as error:
    print("refused:", error)
""",
}


# Imports everything once; each state is then met by a fork. Prints, for each, how that ended and what it said.
RUN_STATES = """
import json, os, sys, traceback
states, results = json.loads(sys.argv[1]), {}
for name, code in states.items():
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(writer, 2)
        try:
            exec(code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    said = open(reader, errors="replace").read()
    results[name] = os.waitstatus_to_exitcode(os.wait()[1]), said
print("results:", json.dumps(results))
"""


@pytest.fixture(scope="module")
def after_states():
    """For each state the exit code of a process that calls all ops in it, and what that wrote to stderr."""
    out = run_python("-W", "ignore", "-c", PREPARE + RUN_STATES, json.dumps(STATES)).stdout
    return json.loads(out.rpartition("results:")[2])


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("state", STATES)
def test_no_state_of_torch_crashes_the_process(state, after_states):
    code, said = after_states[state]
    assert code == 0, f"{code}: {said}"
