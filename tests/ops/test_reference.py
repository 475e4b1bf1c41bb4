"""The reference of the other tests: against numbers worked out by hand, and against scipy."""

import math

import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from support.tensors import INF, NAN, clusters, generator, sentinels

from e2cm_ext import Decisions
from e2cm_ext.ops import reference


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ---- by hand -------------------------------------------------------------------------------------


def test_distances_by_hand():
    x = doubles([3, 4], [0, 0])
    means = doubles([0, 0], [3, 0], [-5, -12])
    assert reference.class_distances(x, means).tolist() == [[5, 4, math.sqrt(64 + 256)], [0, 3, 13]]


def test_distances_flatten_features_and_ignore_the_center():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    means = x.flip(0)
    # Every feature of one sample is 12 away from the other's: sqrt(12 * 144).
    expected = [[math.sqrt(1728), 0.0], [0.0, math.sqrt(1728)]]
    for center in (None, torch.full((3, 2, 2), 1e6)):
        assert reference.class_distances(x.double(), means.double(), center).tolist() == expected
        assert reference.class_distances(x.double(), means.double().flatten(1), center).tolist() == expected


def test_log_probabilities_by_hand():
    # Distances over scales: 1, 1, 2. e^-1, e^-1, e^-2 over their sum: e / (2 e + 1), twice, and 1 / (2 e + 1).
    p = reference.log_probabilities(doubles([5, 4, 2]), doubles(5, 4, 1)).exp()[0].tolist()
    total = 2 * math.e + 1
    assert p == pytest.approx([math.e / total, math.e / total, 1 / total], rel=1e-15)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF, -INF])
def test_a_class_without_a_mean_has_probability_zero(bad):
    log_probs = reference.log_probabilities(doubles([0, 1, 1], [NAN, 1, 2]), doubles(bad, 1, 1))
    assert log_probs[:, 0].tolist() == [-INF, -INF]
    assert log_probs[0, 1:].tolist() == pytest.approx([-math.log(2)] * 2)
    assert log_probs[1, 1].item() == pytest.approx(-math.log(1 + 1 / math.e))


def test_log_softmax_by_hand():
    rows = doubles([0, 0], [math.log(3), 0], [-INF, 0], [NAN, 0], [INF, 0], [-INF, -INF], [INF, INF], [1000, 0])
    got = reference.log_softmax(rows)
    assert got[0].exp().tolist() == pytest.approx([0.5, 0.5])
    assert got[1].exp().tolist() == pytest.approx([0.75, 0.25])
    assert got[2].tolist() == [-INF, 0]
    assert got[3:7].isnan().all()
    assert got[7].tolist() == [0, -1000]


def test_best_by_hand():
    p = doubles([0.2, 0.5, 0.3], [0.4, 0.2, 0.4], [1, 0, 0])
    confidence, prediction = reference.best(torch.cat([p.log(), doubles([NAN, NAN, NAN])]))
    assert confidence[:3].tolist() == pytest.approx([0.5, 0.4, 1.0])
    assert confidence[3].isnan()
    assert prediction.tolist() == [1, 0, 0, 0]  # the lowest of equals; 0 where nothing is known


def test_leaves_by_hand():
    log_probs = doubles([0.5, 0.5], [0.75, 0.25], [1, 0], [NAN, NAN]).log()
    flat, lopsided = math.log(2), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))

    def leaves(threshold, rule):
        return reference.leaves(log_probs, threshold, rule).tolist()

    assert leaves(0.5, "confidence") == [False, True, True, False]  # strictly above
    assert leaves(0.75 + 1e-12, "confidence") == [False, False, True, False]
    assert leaves(1.0, "confidence") == [False] * 4
    assert leaves(-INF, "confidence") == [True, True, True, False]
    assert leaves(flat + 1e-12, "entropy") == [True, True, True, False]
    assert leaves(flat - 1e-12, "entropy") == [False, True, True, False]
    assert leaves(lopsided - 1e-12, "entropy") == [False, False, True, False]
    assert leaves(0.0, "entropy") == [False] * 4  # strictly below
    assert leaves(INF, "entropy") == [True, True, True, False]
    assert leaves(torch.tensor(0.6), "confidence") == [False, True, True, False]


def test_compact_by_hand():
    survivors, index = reference.compact(torch.tensor([[1], [2], [3]]), torch.tensor([True, False, True]))
    assert survivors.tolist() == [[1], [3]]
    assert index.tolist() == [0, 2]


@pytest.mark.parametrize("op", ["exit_step", "decide", "decide with scale"])
@pytest.mark.parametrize("with_log_probs", [False, True])
def test_leavers_are_written_where_their_ids_say(op, with_log_probs):
    x = doubles([0.0], [4.0], [10.0])
    means, scale = doubles([0.0], [8.0]), doubles(1, 1)
    # Distances: (0, 8), (4, 4), (10, 2): confidences 1 / (1 + e^-8), 1/2, 1 / (1 + e^-8); classes 0, 0, 1.
    ids, out = torch.tensor([3, 0, 1]), sentinels(4, 2 if with_log_probs else None)
    if op == "exit_step":
        survivors, kept = reference.exit_step(x, means, scale, 0.9, ids, out, exit=5)
    else:
        distances = doubles([0, 8], [4, 4], [10, 2])
        scores, divisor = (distances, scale) if op == "decide with scale" else (-distances, None)
        survivors, kept = reference.decide(x, scores, 0.9, ids, out, scale=divisor, exit=5)
    assert survivors.tolist() == [[4.0]]
    assert kept.tolist() == [0]
    assert out.prediction.tolist() == [-10_000, 1, -9_998, 0]
    assert out.exit.tolist() == [-20_000, 5, -19_998, 5]
    assert out.confidence.tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-8)), 2.5, 1 / (1 + math.exp(-8))])
    if with_log_probs:
        small = -math.log(1 + math.exp(-8))
        assert out.log_probs[1].tolist() == pytest.approx([small - 8, small], rel=1e-5)
        assert out.log_probs[3].tolist() == pytest.approx([small, small - 8], rel=1e-5)
        assert out.log_probs[[0, 2]].tolist() == sentinels(4, 2).log_probs[[0, 2]].tolist()


def test_empty_decisions():
    out = Decisions.empty(3, 2)
    assert out.prediction.tolist() == [-1] * 3
    assert out.exit.tolist() == [-1] * 3
    assert out.confidence.isnan().all()
    assert out.log_probs.isnan().all()
    assert [t.dtype for t in out] == [torch.int64, torch.float32, torch.int64, torch.float32]
    assert out.log_probs.shape == (3, 2)
    assert Decisions.empty(3).log_probs is None
    assert Decisions.empty(0, 2).log_probs.shape == (0, 2)
    assert Decisions.empty(2, device="meta").confidence.device.type == "meta"


# ---- against scipy -------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 10, 100])
def test_against_scipy(classes):
    x, means, scale = (t.double() for t in clusters(60, 33, classes, seed=classes))
    distances = cdist(x.numpy(), means.numpy())
    logits = -distances / scale.numpy()
    p = softmax(logits, axis=1)
    torch.testing.assert_close(reference.class_distances(x, means), torch.from_numpy(distances))
    confidence, prediction, log_probs = reference.class_scores(x, means, scale)
    torch.testing.assert_close(log_probs, torch.from_numpy(log_softmax(logits, axis=1)))
    torch.testing.assert_close(confidence, torch.from_numpy(p.max(1)))
    assert prediction.tolist() == p.argmax(1).tolist()
    h = entropy(p, axis=1)
    for threshold in (0.0, 0.1, 0.5, 1.0, 3.0):
        assert reference.leaves(log_probs, threshold, "entropy").tolist() == (h < threshold).tolist()
        assert reference.leaves(log_probs, threshold).tolist() == (p.max(1) > threshold).tolist()


def test_log_softmax_against_scipy():
    logits = torch.randn(50, 30, generator=generator(0), dtype=torch.float64) * 20
    logits[torch.rand(50, 30, generator=generator(1)) < 0.3] = -INF
    torch.testing.assert_close(reference.log_softmax(logits), torch.from_numpy(log_softmax(logits.numpy(), axis=1)))


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "works_in"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_the_dtype_that_the_reference_computes_in(dtype, works_in):
    x, means, _ = clusters(5, 8, 3)
    assert reference.class_distances(x.to(dtype), means.to(dtype)).dtype is works_in
    assert reference.log_softmax(x.to(dtype)).dtype is works_in
