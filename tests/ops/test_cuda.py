"""The ops on a GPU: every test of test_ops.py and test_statistics.py, and what only a GPU can get wrong.

The tests of the CPU run as they are: here their calls take their arguments to the GPU, in the same layout, and bring
back what has come of it. With E2CM_EMULATED (see conftest.py) "the GPU" is the CPU, and the tests that need a real one
are skipped.
"""

import functools
import os
import threading

import pytest
import test_ops
import test_statistics
import torch
from support.tensors import (
    DTYPES,
    INF,
    NAN,
    assert_scores_match,
    clusters,
    generator,
    same_bits,
    sentinels,
)

from e2cm_ext import ClassMeans, Decisions, Stages, Statistics, ops
from e2cm_ext.heads.rules import Confidence, Entropy
from e2cm_ext.ops import cuda, reference
from e2cm_ext.runtime import cascade
from e2cm_ext.runtime.cuda_graphs import FixedCascade

EMULATED = bool(os.environ.get("E2CM_EMULATED"))
DEVICE = "cpu" if EMULATED else "cuda"
if not EMULATED and not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda
real = pytest.mark.skipif(EMULATED, reason="needs a GPU")
RICH = Statistics(mean=(4, 4), rms=(2, 2), max=(2, 2), pairs=4)

# ---- the tests of the CPU ------------------------------------------------------------------------

OPS = (
    "statistics",
    "class_distances",
    "class_scores",
    "linear_scores",
    "exit_step",
    "linear_step",
    "decide",
    "decide_masked",
    "compact",
)
# About the CPU alone: its memory, threads, torch's view of it, or results that are compared with no call in between.
NOT_HERE = {
    "test_rows_further_apart_than_2_31_elements",
    "test_more_than_2_31_elements",
    "test_the_same_bits_with_any_number_of_threads",
    "test_off_the_cpu_there_are_shapes",
    "test_the_fast_and_the_validated_path_agree_on_pairs",
    "test_pairs_as_operators_and_compiled",
    "test_lazy_views_of_torch_are_values_like_any_other",
}


def there(value):
    """The same tensor on the GPU: same strides, same offset from a multiple of 16 bytes."""
    if isinstance(value, Decisions):
        return Decisions(*map(there, value))
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return value
    value = value.detach()
    if value.layout is not torch.strided or value.is_neg() or value.is_conj() or type(value) is not torch.Tensor:
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return storage.to(DEVICE, copy=True).as_strided(value.shape, value.stride(), value.storage_offset())


def back(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, tuple):
        parts = map(back, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def on_gpu(op):
    @functools.wraps(op)
    def call(*arguments, **named):
        moved = [there(a) for a in arguments]
        moved_named = {key: there(a) for key, a in named.items()}
        try:
            result = op(*moved, **moved_named)
        finally:
            for cpu, gone in [*zip(arguments, moved, strict=True), *((named[k], moved_named[k]) for k in named)]:
                if isinstance(cpu, Decisions):
                    for column, answered in zip(cpu, gone, strict=True):
                        if column is not None:
                            column.copy_(answered)
        if op.__name__ == "decide_masked":
            both = ((arguments, named), (moved, moved_named))
            pending, gone = (a[2] if len(a) > 2 else n["pending"] for a, n in both)
            pending.copy_(gone)
        if not isinstance(result, tuple):
            return back(result)
        pairs = list(zip([*arguments, *named.values()], [*moved, *moved_named.values()], strict=True))
        parts = [next((cpu for cpu, gone in pairs if gone is part), None) for part in result]
        parts = [back(part) if cpu is None else cpu for part, cpu in zip(result, parts, strict=True)]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)

    return call


@pytest.fixture(autouse=True)
def _calls_go_to_the_gpu(request, monkeypatch):
    if request.node.name.startswith("test_here_"):
        return
    for name in OPS:
        monkeypatch.setattr(ops, name, on_gpu(getattr(ops, name)))


for module, prefix in ((test_ops, "ops"), (test_statistics, "statistics")):
    for name, test in list(vars(module).items()):
        if name.startswith("test_") and name not in NOT_HERE:
            globals()[f"test_{prefix}_{name.removeprefix('test_')}"] = test
del test  # which would be taken for one


# ---- what only a GPU can get wrong ---------------------------------------------------------------


def heads(classes, dim, dtype=torch.float32, rows=64):
    x, means, scale = (t.to(DEVICE) for t in clusters(rows, dim, classes, dtype))
    return x, means, scale, means.mean(0)


@pytest.mark.parametrize("classes", [10, 100])
def test_here_every_run_gives_the_same_bits(classes):
    x, means, scale, center = heads(classes, 5000, rows=256)
    expected = ops.class_scores(x, means, scale, center)
    for _ in range(20):
        for a, b in zip(ops.class_scores(x, means, scale, center), expected, strict=True):
            assert same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_here_features_may_start_anywhere(dtype, offset):
    """Not on a multiple of 16 bytes: the same bits as if they did."""
    for classes in (5, 40):
        x, means, scale, center = heads(classes, 1111, dtype)
        room = torch.full((x.numel() + offset,), NAN, dtype=dtype, device=DEVICE)
        moved = room[offset:].view(x.shape)
        moved.copy_(x)
        expected = ops.class_scores(x, means, scale, center)
        for a, b in zip(ops.class_scores(moved, means, scale, center), expected, strict=True):
            assert same_bits(a.cpu(), b.cpu())


def test_here_a_wrong_id_is_told():
    x, means, scale, _ = heads(3, 20, rows=4)
    out = Decisions.empty(4, 3, DEVICE)
    with pytest.raises(IndexError, match="`ids` holds a number that is not a row of `out`"):
        ops.exit_step(x, means, scale, -INF, torch.tensor([0, 1, 9, 3], device=DEVICE), out)
    assert out.prediction[:2].min() >= 0


@pytest.mark.parametrize("rule", ["confidence", "entropy"])
def test_here_settle_is_the_reference(rule):
    logits = torch.randn(50, 7, generator=generator(0)).to(DEVICE) * 2
    pending = torch.arange(50, device=DEVICE) % 3 != 0
    ids = torch.randperm(60, generator=generator(1))[:50].to(DEVICE)
    expected, still = Decisions(*(t.to(DEVICE) for t in sentinels(60, 7))), pending.clone()
    out = Decisions(*(t.clone() for t in expected))
    reference.decide_masked(logits, 0.9, still, ids, expected, rule=rule, exit=4)
    ops.decide_masked(logits, 0.9, pending, ids, out, rule=rule, exit=4)
    assert torch.equal(pending, still)
    assert torch.equal(out.prediction, expected.prediction)
    assert torch.equal(out.exit, expected.exit)
    torch.testing.assert_close(out.log_probs, expected.log_probs)


@real
def test_here_on_another_stream():
    x, means, scale, center = heads(10, 100_000)
    expected = ops.class_scores(x, means, scale, center)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        y = x * 1  # ready when the sleep is over
        got = ops.class_scores(y, means, scale, center)
        out = Decisions.empty(64, 10, DEVICE)
        survivors, kept = ops.exit_step(y, means, scale, 0.5, torch.arange(64, device=DEVICE), out)
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a.cpu(), b.cpu())
    assert same_bits(survivors.cpu(), x[kept].cpu())


@real
def test_here_the_host_does_not_wait():
    x, means, scale, center = heads(10, 300)
    maps = torch.randn(8, 16, 8, 8, device=DEVICE)
    weight, bias = torch.randn(10, RICH.size((16, 8, 8)), device=DEVICE), torch.zeros(10, device=DEVICE)
    pending, rows = torch.ones(64, dtype=torch.bool, device=DEVICE), torch.arange(64, device=DEVICE)
    out = Decisions.empty(64, 10, DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = ops.class_scores(x, means, scale, center)
        ops.decide_masked(scores.log_probs, 0.5, pending, rows, out)
        ops.linear_scores(maps, weight, bias, RICH)
        ops.class_distances(x, means)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(pending, ~(scores.confidence > 0.5))


@real
def test_here_a_graph_can_be_captured():
    x, means, scale, center = heads(10, 3000)
    expected = [t.clone() for t in ops.class_scores(x * 2, means, scale, center)]
    graph, y = torch.cuda.CUDAGraph(), x.clone()
    pending, rows = torch.ones(64, dtype=torch.bool, device=DEVICE), torch.arange(64, device=DEVICE)
    out = Decisions.empty(64, 10, DEVICE)
    # Kernels are loaded when they first run, which must not be during a capture.
    ops.decide_masked(expected[2], INF, pending, rows, out)
    with torch.cuda.graph(graph):
        scores = ops.class_scores(y, means, scale, center)
        ops.decide_masked(scores.log_probs, -INF, pending, rows, out)
    y.copy_(x * 2)
    graph.replay()
    for a, b in zip(scores, expected, strict=True):
        assert same_bits(a.cpu(), b.cpu())
    assert not pending.any()
    with (
        pytest.raises(RuntimeError, match=r"capture ops\.decide_masked instead"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.exit_step(y, means, scale, 0.5, rows, out)


@pytest.mark.parametrize("rule", [Confidence(), Entropy()])
@pytest.mark.parametrize("mode", ["bucket", "masked"])
def test_here_a_cascade_in_graphs(mode, rule):
    torch.manual_seed(0)
    stages = Stages([torch.nn.Linear(20, 30), torch.nn.Linear(30, 30), torch.nn.Linear(30, 5)]).to(DEVICE).eval()
    heads_ = [ClassMeans(5, (30,)).to(DEVICE) for _ in range(2)]
    with torch.inference_mode():
        for head in heads_:
            for pass_index in (0, 1):
                head.update(
                    torch.randn(50, 30, generator=generator(2)).to(DEVICE), torch.arange(50).to(DEVICE) % 5, pass_index
                )
                head.finish(pass_index)
            head.scale.mul_(0.2)
        x = torch.randn(33, 20, generator=generator(3)).to(DEVICE)
        thresholds = [0.4, 0.4] if rule.name == "confidence" else [-1.3, -1.3]
        fixed = FixedCascade(stages, heads_, rule, thresholds, x, 5, sizes=[4, 16, 40], mode=mode)
        for rows in (33, 7, 33, 1):
            expected = cascade.run(stages, heads_, rule, thresholds, x[:rows], 5)
            got = fixed(x[:rows])
            assert torch.equal(got.exit, expected.exit)
            assert torch.equal(got.prediction, expected.prediction)
            torch.testing.assert_close(got.log_probs, expected.log_probs, rtol=1e-3, atol=1e-3)


@real
def test_here_every_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    for device in range(torch.cuda.device_count()):
        problem = clusters(20, 500, 10)
        got = ops.class_scores(*(t.to(f"cuda:{device}") for t in problem))  # with cuda:0 current
        assert_scores_match(ops.ClassScores(*(t.cpu() for t in got)), problem)
        assert got.confidence.device.index == device


@real
def test_here_compiled():
    x, means, scale, center = heads(10, 64)

    def step(x):
        out = Decisions.empty(64, 10, DEVICE)
        scores = ops.class_scores(x + 1, means, scale, center)
        pending = torch.ones(64, dtype=torch.bool, device=DEVICE)
        ops.decide_masked(scores.log_probs, 0.3, pending, torch.arange(64, device=DEVICE), out)
        return *scores, pending, *out

    for a, b in zip(torch.compile(step, fullgraph=True)(x), step(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@real
def test_here_from_many_threads():
    x, means, scale, center = heads(10, 20_000)
    expected = [t.cpu() for t in ops.class_scores(x, means, scale, center)]
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                got = ops.class_scores(x, means, scale, center)
                wrong.extend(1 for a, b in zip(got, expected, strict=True) if not same_bits(a.cpu(), b))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_here_the_kernels_are_used():
    assert cuda.supports(torch.zeros(1, device=DEVICE))
