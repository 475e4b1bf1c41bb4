"""The fast path of an exit (csrc/fast_path.cpp) and the validated path: a caller cannot tell them apart.

That the fast path is taken at all is tested too: without it, only the time of a call would change.
"""

import gc
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.op_arguments import DIM, ROWS, SPARSE, TAKES, WRONG, WRONG_FEATURES, call, good
from support.subprocesses import run_python
from support.tensors import (
    INF,
    LAYOUTS,
    NAN,
    assert_same_decisions,
    clusters,
    copy_of,
    forms_of_means,
    generator,
    laid_out,
    problems,
    same_bits,
    seeds,
    sentinels,
    shuffled_ids,
)
from torch.overrides import TorchFunctionMode

from e2cm_ext import Decisions, Statistics, native, ops
from e2cm_ext.ops import functional

HERE = Path(__file__).parent
OPS = ("exit_step", "linear_step", "decide")
NATIVE = {op: f"_try_{op}" for op in OPS}
ON = hasattr(torch.Tensor, "__dlpack_c_exchange_api__") and not os.environ.get("E2CM_NO_FAST_PATH")
needs_it = pytest.mark.skipif(not ON, reason="no fast path: torch before 2.10, or E2CM_NO_FAST_PATH")


def fall_back(*_):
    return None


@contextmanager
def replaced(way):
    """`way`(op, the native function) takes its place."""
    before = {op: getattr(functional, NATIVE[op]) for op in OPS}
    for op in OPS:
        setattr(functional, NATIVE[op], way(op, before[op]))
    try:
        yield
    finally:
        for op in OPS:
            setattr(functional, NATIVE[op], before[op])


def validated():
    return replaced(lambda op, native: fall_back)


@contextmanager
def spied():
    """A list with an entry for each call: whether the fast path took it. An error counts as taken."""
    seen = []

    def way(op, native):
        def spy(*arguments):
            try:
                result = native(*arguments)
            except BaseException:
                seen.append(True)
                raise
            seen.append(result is not None)
            return result

        return spy

    with replaced(way):
        yield seen


def outcome(op, arguments, into_copy=True):
    """All that a caller can see: the error and what it says, or the results; and what has been written."""
    out = copy_of(arguments["out"]) if into_copy and isinstance(arguments["out"], Decisions) else arguments["out"]
    try:
        survivors, ids = call(op, arguments | {"out": out})
    except Exception as error:
        return type(error), str(error).split("Invoked with")[0], out  # what pybind11 lists then are addresses
    return (survivors, survivors is arguments["x"]), (ids, ids is arguments["ids"]), out


def assert_same_outcome(got, expected):
    if isinstance(expected[0], type):
        assert got[:2] == expected[:2]
    else:
        for (a, a_is_input), (b, b_is_input) in zip(got[:2], expected[:2], strict=True):
            assert a_is_input == b_is_input
            assert same_bits(a.detach(), b.detach())
            assert a.stride() == b.stride()
            assert (a.dtype, a.device, a.layout, a.requires_grad) == (b.dtype, b.device, b.layout, b.requires_grad)
            assert a_is_input or type(a) is torch.Tensor
            assert a.is_inference() == b.is_inference()
    if isinstance(expected[2], Decisions) and got[2] is not expected[2]:
        assert_same_decisions(got[2], expected[2])


def assert_either_way(op, arguments, fast, into_copy=True):
    """`fast`: whether the fast path takes it, None if that does not matter."""
    with spied() as seen:
        got = outcome(op, arguments, into_copy)
    with validated():
        expected = outcome(op, arguments, into_copy)
    if ON and fast is not None:
        assert seen == [fast]
    assert_same_outcome(got, expected)
    return got


# ---- what takes the fast path -------------------------------------------------------------------------------


def arguments_for(x, means, scale, classes, center=True, log_probs=True, dtype=torch.float32):
    rows = x.shape[0]
    return {
        "x": x,
        "means": means,
        "scale": scale,
        "center": means[0].float() if center else None,  # in their memory order: mean(0) is in the usual one
        "weight": means / 32,
        "bias": scale,
        "statistics": None,
        "threshold": 0.5,
        "ids": shuffled_ids(rows, rows + 3),
        "out": sentinels(rows + 3, classes if log_probs else None),
        "scores": (torch.randn(rows, classes, generator=generator(1)) * 3).to(dtype),
        "rule": "confidence",
        "exit": 3,
    }


SHAPES = [(1,), (64,), (37,), (3, 5), (2, 3, 4), (8, 1, 1), (1, 4, 4), (3, 2, 4, 5)]
MOVED = ("contiguous", "channels_last", "rows apart", "channels_last rows apart")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", MOVED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_network_brings_takes_the_fast_path(op, layout, shape, dtype):
    for rows, classes in ((1, 10), (0, 3), (7, 1), (33, 5), (300, 4)):
        x, means, scale = clusters(rows, shape, classes, dtype, dtype)
        x, means = laid_out(x, layout), laid_out(means, layout.replace("rows apart", ""))
        for center, log_probs in ((True, True), (False, False)):
            a = arguments_for(x, means, scale, classes, center, log_probs, dtype)
            for rule in ("confidence", "entropy"):
                for threshold in (-INF, 0.5, INF):
                    assert_either_way(op, a | {"threshold": threshold, "rule": rule}, fast=True)


@pytest.mark.parametrize("op", OPS)
def test_some_leave_and_some_stay_above(op):
    """The cases above would prove little if all samples left in each of them."""
    x, means, scale = clusters(33, (8, 3, 3), 5)
    x, means = laid_out(x, "channels_last"), laid_out(means, "channels_last")
    (survivors, _), (ids, _), _ = assert_either_way(op, arguments_for(x, means, scale, 5), fast=True)
    assert 0 < len(ids) < 33
    assert survivors.is_contiguous(memory_format=torch.channels_last)


FLOATING, HEADS = ("x", "means", "scale", "center", "weight", "bias", "scores"), ("means", "weight")
TAKEN = {
    "a parameter": lambda a: a | {name: torch.nn.Parameter(a[name]) for name in FLOATING},
    "a gradient": lambda a: a | {name: a[name].clone().requires_grad_() for name in FLOATING},
    "a view": lambda a: (
        a | {"scores": torch.cat([a["scores"]] * 2)[:6]} | {n: torch.cat([a[n]] * 2)[4:] for n in HEADS}
    ),
    "a tuple": lambda a: a | {"out": tuple(a["out"])},
    "no log_probs": lambda a: a | {"out": a["out"]._replace(log_probs=None)},
    "no center": lambda a: a | {"center": None},
    "no scale": lambda a: a | {"scale": None},
    "means of another dtype": lambda a: a | {name: a[name].half() for name in ("means", "weight", "scores")},
    "flat means": lambda a: a | {n: a[n].flatten(1) for n in HEADS} | {"center": a["center"].flatten()},
    "scores apart": lambda a: a | {"scores": a["scores"].repeat(1, 2)[:, :4]},
    "one row for all": lambda a: a | {"x": a["x"][:1].expand(ROWS, *a["x"].shape[1:])},
    "a copy on write": lambda a: a | {"x": torch._lazy_clone(a["x"])},
    "another rule": lambda a: a | {"rule": "".join(["ent", "ropy"])},
    "a far exit": lambda a: a | {"exit": 2**63 - 1},
    "a near exit": lambda a: a | {"exit": -(2**63)},
    "a huge threshold": lambda a: a | {"threshold": 1e300},
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("case", TAKEN)
@pytest.mark.parametrize("op", OPS)
def test_cases_of_the_fast_path(op, case, flat):
    if op == "exit_step" and case == "no scale":
        pytest.skip("it needs one")
    a = TAKEN[case](good(flat))
    for threshold in (a["threshold"], -INF, INF):
        result = assert_either_way(op, a | {"threshold": threshold}, fast=True)
        if not result[0][1]:
            assert not result[0][0].requires_grad


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("state", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_of_autograd(op, state):
    with state():
        for threshold in (0.5, -INF):
            assert_either_way(op, good() | {"threshold": threshold}, fast=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float16])
def test_decide_moves_anything(dtype):
    a = good()
    a["x"] = (a["x"] * 5).to(dtype)
    assert_either_way("decide", a, fast=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_ids_out_of_range(op, bad):
    a = good()
    a["ids"][3] = bad
    error, says, out = assert_either_way(op, a, fast=True)
    assert error is IndexError
    assert f"`ids` holds {bad} at place 3" in says
    assert_same_decisions(out, a["out"])


def test_ids_may_lie_in_out():
    """Aliases are the caller's to avoid; either way does the same with them."""
    for fast_path in (True, False):
        a = good()
        shared = a["out"].prediction[:ROWS]
        shared.copy_(a["ids"])
        with replaced(lambda op, native, fast_path=fast_path: native if fast_path else fall_back):
            call("exit_step", a | {"ids": shared, "threshold": INF})
        assert torch.equal(shared, torch.arange(ROWS))


# ---- statistics ----------------------------------------------------------------------------------

LOOKS = [
    ((5, 4, 6), Statistics(mean=(2, 3), rms=(1, 1), max=(4, 2))),
    ((5, 4, 6), Statistics(max=(1, 4), channels=-1)),
    ((7, 20), Statistics(mean=(3, 1))),
    ((7, 20), Statistics(rms=(3, 1), channels=-1)),
    ((20,), Statistics(mean=(1, 1))),
    ((20,), Statistics(mean=(1, 1), max=(1, 1), channels=-1)),
]


def looking(shape, statistics, layout="contiguous", dtype=torch.float32, classes=4):
    x, _, _ = clusters(9, shape, 3, dtype)
    size = statistics.size(shape)
    means = torch.randn(classes, size, generator=generator(2))
    return arguments_for(laid_out(x, layout), means, torch.ones(classes), classes) | {"statistics": statistics}


@pytest.mark.parametrize("op", ["exit_step", "linear_step"])
@pytest.mark.parametrize(("shape", "statistics"), LOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_take_the_fast_path(op, shape, statistics, dtype):
    for layout in MOVED:
        a = looking(shape, statistics, layout, dtype)
        unreadable = statistics.channels == -1 and "channels_last" in layout and len(shape) == 3
        head = (a["means"], a["scale"], None) if op == "exit_step" else (a["weight"], a["bias"])
        scores = ops.class_scores if op == "exit_step" else ops.linear_scores
        confidence = scores(a["x"], *head, statistics).confidence
        for threshold in (-INF, float(confidence.median()), INF):
            (_, _), (ids, _), _ = assert_either_way(op, a | {"threshold": threshold}, fast=not unreadable)
        assert len(ids) == 9


@needs_it
@pytest.mark.parametrize("op", ["exit_step", "linear_step"])
@pytest.mark.parametrize(("shape", "statistics"), LOOKS)
def test_heads_that_do_not_fit_their_statistics(op, shape, statistics):
    a, size = looking(shape, statistics), statistics.size(shape)
    wrong = [{"means": a["means"][:, :-1], "weight": a["weight"][:, :-1]}, {"statistics": Statistics(mean=(9, 9))}]
    wrong += [{"x": a["x"][None].expand(9, 1, *a["x"].shape)[:, 0][:, :, None, None, None]}]
    wrong += [{"means": a["means"].reshape(4, size, 1), "weight": a["weight"].reshape(4, size, 1)}]
    for change in wrong:
        error, _, _ = assert_either_way(op, a | change, fast=False)
        assert issubclass(error, ValueError)
    for grid in ((30, 1), (1, 30)):  # and nothing else is wrong
        change = {"statistics": Statistics(mean=grid, channels=statistics.channels), "center": None}
        change |= dict.fromkeys(("means", "weight"), torch.zeros(4, 30 * shape[statistics.channels]))
        error, says, _ = assert_either_way(op, a | change, fast=False)
        assert "wanted a grid of no more" in says
    error, _, _ = assert_either_way("exit_step", a | {"center": torch.zeros(size + 1)}, fast=False)
    assert issubclass(error, ValueError)
    assert_either_way(op, a | {"means": apart(a["means"]), "weight": apart(a["weight"])}, fast=False)


@needs_it
def test_statistics_of_another_kind():
    class Other(Statistics):
        pass

    a = looking((5, 4, 6), Other(mean=(1, 1)))
    for op in ("exit_step", "linear_step"):
        assert_either_way(op, a, fast=False)
    a["x"] = a["x"][:0, :0]
    a["means"], a["weight"], a["center"] = torch.zeros(4, 0), torch.zeros(4, 0), None
    a["ids"] = a["ids"][:0]
    for op in ("exit_step", "linear_step"):
        assert_either_way(op, a | {"statistics": Statistics(mean=(1, 1))}, fast=False)  # no channel


# ---- what is not ---------------------------------------------------------------------------------


@needs_it
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_wrong_arguments_are_left_to_the_validated_path(op, flat):
    for argument, bad, error, _ in WRONG + (WRONG_FEATURES if op != "decide" else []):
        if argument not in TAKES[op]:
            continue
        a = good(flat)
        a[argument] = bad(a) if callable(bad) else bad
        got = assert_either_way(op, a, fast=False, into_copy=argument != "out")
        assert got[0] is error


@needs_it
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(("op", "argument", "sparse"), [case for case in SPARSE if case[0] in OPS])
def test_sparse_arguments(op, argument, sparse):
    a = good()
    a[argument] = sparse(a)
    assert_either_way(op, a, fast=False, into_copy=False)


class Subclass(torch.Tensor):
    pass


def each_tensor_of_out(change):
    return {
        f"out.{name}": lambda a, name=name: a["out"]._replace(**{name: change(getattr(a["out"], name))})
        for name in Decisions._fields
    }


def each_tensor(change):
    inputs = {name: lambda a, name=name: change(a[name]) for name in (*FLOATING, "ids")}
    return inputs | each_tensor_of_out(change)


def apart(t):
    """The same values, with holes between the last dimension's."""
    return torch.stack([t, t], -1)[..., 0]


CHANGES = {
    "lazy negative": lambda t: torch._neg_view(-t),
    "subclass": lambda t: t.as_subclass(Subclass),
    "apart": apart,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "None": lambda t: None,
    "double": lambda t: t.double(),
    "int32": lambda t: t.int(),
    "complex": lambda t: torch.complex(t.float(), t.float()),
    "lazy conjugate": lambda t: torch.complex(t.float(), t.float()).conj(),
    "bool": lambda t: t.bool(),
    "short": lambda t: t[:-1],
    "long": lambda t: torch.cat([t, t]),
    "one more dimension": lambda t: t[..., None],
    "0-d": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
    "no memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "not strided": lambda t: t.float().to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "type": lambda t: torch.Tensor,
}
# None is right for these.
FINE = {("decide", "scale", "None"), ("exit_step", "center", "None")} | {(op, "out.log_probs", "None") for op in OPS}
# decide moves samples of these, and of any shape.
FINE |= {("decide", "x", change) for change in ("apart", "double", "int32", "bool", "one more dimension")}
FINE |= {(op, "x", "one more dimension") for op in ("exit_step", "linear_step")}  # for means in a row


@needs_it
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("op", OPS)
def test_every_argument_in_forms_that_fall_back(op, change, flat):
    for name, changed in each_tensor(CHANGES[change]).items():
        argument = name.split(".")[0]
        if argument not in TAKES[op] or (op, name, change) == (
            "decide",
            "x",
            "quantized",
        ):  # torch cannot compare those
            continue
        a = good(flat)
        a[argument] = changed(a)
        if change == "subclass":  # goes on as an operator of torch.library
            with spied() as seen:
                call(op, a)
            assert seen == [False]
        elif name.startswith("out.") and change != "None":  # a copy would not be of that form
            before = copy_of(good(flat)["out"])
            error, _, _ = assert_either_way(op, a, fast=False, into_copy=False)
            assert issubclass(error, Exception)
            assert_same_decisions(a["out"]._replace(**{name[4:]: None}), before._replace(**{name[4:]: None}))
        else:
            assert_either_way(op, a, fast=None if (op, name, change) in FINE else False)


@needs_it
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "threshold",
    [1, True, np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5), NAN, None, "0.5", 1j, [0.5]],
)
def test_thresholds_that_need_checks_fall_back(op, threshold):
    assert_either_way(op, good() | {"threshold": threshold}, fast=False)


class Name(str):
    pass


class FourOfThem(tuple):
    def __iter__(self):
        return iter(tuple.__getitem__(self, slice(None)))


@needs_it
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "other",
    [
        {"rule": Name("entropy")},
        {"rule": "Entropy"},
        {"rule": b"entropy"},
        {"rule": None},
        {"exit": True},
        {"exit": np.int64(3)},
        {"exit": 2**63},
        {"exit": -(2**63) - 1},
        {"exit": 1.0},
        {"exit": "1"},
        {"exit": torch.tensor(1)},
    ],
)
def test_other_arguments(op, other):
    assert_either_way(op, good() | other, fast=False)


@needs_it
@pytest.mark.parametrize("op", OPS)
def test_other_containers(op):
    a = good()
    for out in (list(a["out"]), FourOfThem(a["out"]), (*a["out"], None), tuple(a["out"])[:3], {}):
        with spied() as seen:
            try:
                call(op, a | {"out": out})
            except TypeError as error:
                assert "wanted Decisions" in str(error)
        assert seen == [False]


@needs_it
def test_memory_orders_that_do_not_agree():
    x, means, scale = clusters(6, (3, 4, 5), 4)
    last = torch.channels_last
    orders = {
        "means": {"means": means.contiguous(memory_format=last)},
        "x": {"x": x.contiguous(memory_format=last)},
        "flat means": {"x": x.contiguous(memory_format=last), "means": means.flatten(1)},
        "transposed": {"x": laid_out(x, "transposed")},
        "features apart": {"x": laid_out(x, "features apart")},
        "means apart": {"means": laid_out(means, "rows apart")},
        "center": {
            "x": x.contiguous(memory_format=last),
            "means": means.contiguous(memory_format=last),
            "center": means.mean(0).contiguous(),
        },
        "many dimensions": {"x": x.reshape(6, 3, 1, 4, 1, 5), "means": means.flatten(1), "center": None},
    }
    for name, change in orders.items():
        a = arguments_for(x, means, scale, 4) | change
        assert_either_way("exit_step", a, fast=False)
        if name != "center":
            assert_either_way("linear_step", a | {"weight": a["means"]}, fast=False)


@needs_it
def test_a_lazy_negative_that_looks_dense():
    """Without a private function: with one feature a sample, the imaginary part of a lazy conjugate."""
    values = torch.randn(5, 1, dtype=torch.complex64, generator=generator(0))
    x = values.conj().imag
    assert x.is_neg()
    a = arguments_for(x, torch.tensor([[-1.0], [0.0], [1.0]]), torch.ones(3) / 4, 3, center=False)
    a["scores"] = ops.class_distances(x, a["means"])
    middle = float(ops.class_scores(x, a["means"], a["scale"]).confidence.median())
    for op in ("exit_step", "decide"):
        (survivors, _), (ids, _), _ = assert_either_way(op, a | {"threshold": middle}, fast=False)
        assert 0 < len(ids) < 5
        assert same_bits(survivors, -values.imag[torch.isin(a["ids"], ids)])


# ---- any mixture ---------------------------------------------------------------------------------


@given(problems(), st.data())
def test_both_paths_agree_on_any_problem(problem, data):
    x, means, scale = problem
    center = data.draw(st.sampled_from([None, means.float().mean(0)]))
    if center is not None:
        center = laid_out(center[None], data.draw(st.sampled_from(LAYOUTS)))[0]
    a = arguments_for(x, means, scale, len(scale), log_probs=data.draw(st.booleans()))
    a |= {
        "center": center,
        "means": data.draw(forms_of_means(means)),
        "weight": data.draw(forms_of_means(means)),
        "rule": data.draw(st.sampled_from(["confidence", "entropy"])),
    }
    a |= {"threshold": data.draw(st.sampled_from([-INF, 0.3, 0.6, 1.0, INF])), "exit": data.draw(seeds)}
    for op in OPS:
        assert_either_way(op, a, fast=None)


@given(st.data())
def test_both_paths_agree_on_any_mixture_of_arguments(data):
    """Values that are right for one argument and wrong for the next, in every place."""
    flat = data.draw(st.booleans())
    pool = [*good(flat).values(), None, 3, "x", torch.zeros(0), torch.zeros(0, 0), torch.zeros(2, 2, device="meta")]
    pool += [torch.zeros(ROWS, DIM, dtype=torch.int8), torch.zeros(ROWS, DIM).t(), torch.tensor(0.5)]
    pool += [torch.zeros(ROWS, 1), torch.zeros(1, DIM), Decisions.empty(0), Decisions.empty(ROWS, 1)]
    op = data.draw(st.sampled_from(OPS))
    a = good(flat)
    for name in data.draw(st.lists(st.sampled_from(TAKES[op]), min_size=1, max_size=3, unique=True)):
        a[name] = data.draw(st.sampled_from(pool))
    if isinstance(a["x"], torch.Tensor) and a["x"].is_meta:
        return  # reference.py: nothing to compare
    assert_either_way(op, a, fast=None)


# ---- states of torch -----------------------------------------------------------------------------


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Refusing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.is_neg:
            raise RuntimeError("not now")
        return function(*args, **(kwargs or {}))


class Strange(TorchFunctionMode):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return self.answer(result) if function is torch.Tensor.new_empty_strided else result


@pytest.mark.parametrize("op", OPS)
def test_torch_function_modes(op):
    with validated():
        expected = outcome(op, good())
    with Watching():
        assert_same_outcome(outcome(op, good()), expected)
    with Refusing(), pytest.raises(RuntimeError, match="not now"):
        call(op, good())


@needs_it
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "answer", [lambda t: t.to("meta"), lambda t: None, lambda t: 3, lambda t: t.to(torch.int16), lambda t: t[:-1]]
)
def test_a_mode_that_makes_no_tensors(op, answer):
    """Nothing is written where no room was made."""
    with Strange(answer), pytest.raises((RuntimeError, TypeError)):
        call(op, good() | {"threshold": {"exit_step": 0.7, "linear_step": 0.7, "decide": 0.4}[op]})  # one and more stay


@pytest.mark.parametrize("transform", ["vmap", "grad", "functionalize", "jvp"])
@pytest.mark.parametrize("op", OPS)
def test_functorch(op, transform):
    a = good()

    def result():
        def function(x):
            return call(op, a | {"x": x, "out": copy_of(a["out"])})[0].sum()

        try:
            if transform == "vmap":
                return torch.func.vmap(function)(a["x"][None])
            if transform == "jvp":
                return torch.func.jvp(function, (a["x"],), (a["x"],))
            return getattr(torch.func, transform)(function)(a["x"])
        except Exception as error:
            return type(error), str(error)

    got = result()
    with validated():
        assert str(got) == str(result())


@pytest.mark.parametrize("op", OPS)
def test_default_device_and_dtype_do_not_matter(op):
    a = good()
    with validated():
        expected = outcome(op, a)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    got = outcome(op, a)
    torch.set_default_device(None)
    assert_same_outcome(got, expected)


@needs_it
def test_a_compiled_graph_does_not_take_the_fast_path():
    def function(x, means, scale, ids, out):
        x, ids = ops.exit_step(x * 2, means, scale, 0.5, ids, out)
        return x + 1, ids

    a = good()
    with spied() as seen:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got, _ = compiled(a["x"], a["means"], a["scale"], a["ids"], copy_of(a["out"]))
        assert seen == []
        expected, _ = function(a["x"], a["means"], a["scale"], a["ids"], copy_of(a["out"]))
        assert seen == [True]
    assert same_bits(got, expected)


# ---- many calls ----------------------------------------------------------------------------------


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@needs_it
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("op", OPS)
def test_a_hundred_thousand_calls_leave_nothing_behind(op):
    arguments = good(flat=True)
    wrong_ids = arguments["ids"] + 3
    compiled = getattr(native, NATIVE[op][1:])
    positional = [*(arguments[name] for name in TAKES[op]), *([] if op == "decide" else [None]), 1]
    place = {name: TAKES[op].index(name) for name in ("threshold", "ids", "out")}

    def call_all(times):
        for threshold in (-INF, 0.7, INF):  # all leave, some do, none does
            positional[place["threshold"]] = threshold
            for _ in range(times):
                assert compiled(*positional) is not None
        positional[place["threshold"]] = NAN
        for _ in range(times):
            assert compiled(*positional) is None
        positional[place["threshold"]], positional[place["ids"]] = 0.5, wrong_ids
        for _ in range(times):
            with pytest.raises(IndexError):
                compiled(*positional)
        positional[place["ids"]] = arguments["ids"].to("meta")
        for _ in range(times // 10):  # an exception of C++ inside torch: slow
            assert compiled(*positional) is None
        positional[place["ids"]] = arguments["ids"]

    call_all(200)
    gc.collect()
    watched = [None, torch.Tensor, torch.Tensor.is_neg, *arguments.values(), *arguments["out"]]
    before, counts = resident(), [sys.getrefcount(o) for o in watched]
    call_all(20_000)
    gc.collect()
    assert resident() - before < 2 << 20
    for now, then in zip([sys.getrefcount(o) for o in watched], counts, strict=True):
        assert abs(now - then) < 1000


@pytest.mark.parametrize("op", OPS)
def test_eight_threads(op):
    """Small calls, so that they meet in the interpreter; some of them wrong."""

    def arguments(seed):
        x, means, scale = clusters(seed % 3 + 1, 64, 10, seed=seed)
        return arguments_for(x, means, scale, 10) | {"threshold": [0.4, -INF, INF][seed % 3], "exit": seed}

    all_arguments = [arguments(seed) for seed in range(8)]
    all_arguments[5]["ids"] = all_arguments[5]["ids"] + 100
    expected = [outcome(op, a) for a in all_arguments]

    def caller(seed):
        torch.set_num_threads(1)
        return [outcome(op, all_arguments[seed]) for _ in range(300)]

    with ThreadPoolExecutor(8) as pool:
        for seed, results in enumerate(pool.map(caller, range(8))):
            for got in results:
                assert_same_outcome(got, expected[seed])


# ---- without it ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_torch_without_the_exchange_api():
    code = """
import torch
if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__
from e2cm_ext import Decisions, native, ops
x, means, scale, ids, out = torch.randn(9, 5), torch.randn(3, 5), torch.ones(3), torch.arange(9), Decisions.empty(9, 3)
assert native.try_exit_step(x, means, scale, 0.5, ids, out, None, None, "confidence", 0, None, 1) is None
assert native.try_linear_step(x, means, scale, 0.5, ids, out, None, "confidence", 0, None, 1) is None
assert native.try_decide(x, x[:, :3], 0.5, ids, out, None, "confidence", 0, 1) is None
survivors, kept = ops.exit_step(x, means, scale, 0.5, ids, out)
assert torch.equal(survivors, x[kept]) and (out.exit >= 0).sum() == 9 - len(kept)
assert ops.decide(x, x[:, :3], 2.0, ids, out)[0] is x
"""
    run_python("-W", "ignore", "-c", code)


@pytest.mark.slow
@pytest.mark.subprocess
@needs_it
def test_tables_of_other_versions():
    """One of another major version is passed over, also in the chain; a capsule of another name is none."""
    code = """
import ctypes, torch
from e2cm_ext import Decisions, Statistics, native
api = ctypes.pythonapi
api.PyCapsule_GetPointer.restype = ctypes.c_void_p
api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
api.PyCapsule_New.restype = ctypes.py_object
api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
NAME = b"dlpack_exchange_api"
real = api.PyCapsule_GetPointer(torch.Tensor.__dlpack_c_exchange_api__, NAME)

class Table(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p)]
    _fields_ += [(f"function{i}", ctypes.c_void_p) for i in range(5)]

def met(capsule):
    class Tensor(torch.Tensor):
        __dlpack_c_exchange_api__ = capsule
    return native.register_torch_types(Tensor, torch.nn.Parameter, Decisions, Statistics)

table = Table(2, 0, None, *[1] * 5)
newer = Table(2, 0, real, *[1] * 5)
without = Table(1, 0, None, 1, 1, 1, None, 1)
at = ctypes.addressof
assert met(torch.Tensor.__dlpack_c_exchange_api__)
assert not met(api.PyCapsule_New(at(table), NAME, None))
assert met(api.PyCapsule_New(at(newer), NAME, None))
assert not met(api.PyCapsule_New(at(without), NAME, None))
other = b"dltensor"
assert not met(api.PyCapsule_New(real, other, None))
assert not met(None) and not met(3)
"""
    run_python("-W", "ignore", "-c", code)


@pytest.mark.subprocess
@pytest.mark.slow
@needs_it
def test_all_ops_on_the_validated_path():
    files = ["test_ops.py", "test_statistics.py", "test_validation.py", "test_packing.py", "test_fast_path.py"]
    told = {"E2CM_NO_FAST_PATH": "1", "HYPOTHESIS_PROFILE": "again"}
    files = [HERE / file for file in files]
    options = ("-q", "-x", "-p", "no:cacheprovider", "-m", "not slow")
    result = run_python("-W", "ignore", "-m", "pytest", *options, *files, env=told, timeout=500)
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) > 400


@needs_it
def test_the_number_of_arguments():
    for way in (native.try_exit_step, native.try_linear_step, native.try_decide):
        with pytest.raises(TypeError, match=r"takes \d+ arguments, not 3"):
            way(1, 2, 3)
