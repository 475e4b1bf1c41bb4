"""What only a GPU can get wrong. The tests of test_ops.py and test_statistics.py run on it too: see conftest.py.

With E2CM_EMULATED (see tests/conftest.py) "the GPU" is the CPU, and the tests that need a real one are skipped.
"""

import threading

import pytest
import torch
from support.gpu import DEVICE, EMULATED, HAS_GPU
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

if not HAS_GPU:
    pytest.skip("torch sees no GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda
real = pytest.mark.skipif(EMULATED, reason="needs a GPU")
RICH = Statistics(mean=(4, 4), rms=(2, 2), max=(2, 2), pairs=4)


def heads(classes, dim, dtype=torch.float32, rows=64):
    x, means, scale = (t.to(DEVICE) for t in clusters(rows, dim, classes, dtype))
    return x, means, scale, means.mean(0)


@pytest.mark.parametrize("classes", [10, 100])
def test_every_run_gives_the_same_bits(classes):
    x, means, scale, center = heads(classes, 5000, rows=256)
    expected = ops.class_scores(x, means, scale, center)
    for _ in range(20):
        for a, b in zip(ops.class_scores(x, means, scale, center), expected, strict=True):
            assert same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_features_may_start_anywhere(dtype, offset):
    """Not on a multiple of 16 bytes: the same bits as if they did."""
    for classes in (5, 40):
        x, means, scale, center = heads(classes, 1111, dtype)
        room = torch.full((x.numel() + offset,), NAN, dtype=dtype, device=DEVICE)
        moved = room[offset:].view(x.shape)
        moved.copy_(x)
        expected = ops.class_scores(x, means, scale, center)
        for a, b in zip(ops.class_scores(moved, means, scale, center), expected, strict=True):
            assert same_bits(a.cpu(), b.cpu())


def test_a_wrong_id_is_told():
    x, means, scale, _ = heads(3, 20, rows=4)
    out = Decisions.empty(4, 3, DEVICE)
    with pytest.raises(IndexError, match="`ids` holds a number that is not a row of `out`"):
        ops.exit_step(x, means, scale, -INF, torch.tensor([0, 1, 9, 3], device=DEVICE), out)
    assert out.prediction[:2].min() >= 0


@pytest.mark.parametrize("rule", ["confidence", "entropy"])
def test_decide_masked_is_the_reference(rule):
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
def test_on_another_stream():
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
def test_the_host_does_not_wait():
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
def test_a_graph_can_be_captured():
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
def test_a_cascade_in_graphs(mode, rule):
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
def test_every_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    for device in range(torch.cuda.device_count()):
        problem = clusters(20, 500, 10)
        got = ops.class_scores(*(t.to(f"cuda:{device}") for t in problem))  # with cuda:0 current
        assert_scores_match(ops.ClassScores(*(t.cpu() for t in got)), problem)
        assert got.confidence.device.index == device


@real
def test_compiled():
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
def test_from_many_threads():
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


def test_the_kernels_are_used():
    assert cuda.supports(torch.zeros(1, device=DEVICE))
