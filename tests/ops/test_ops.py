"""The ops against float64, against themselves (bit for bit), and against numbers worked out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support.tensors import (
    DISTANCE_ERROR,
    DTYPES,
    FORMATS,
    INF,
    LAYOUTS,
    NAN,
    Problem,
    assert_distances_match,
    assert_log_probs_match,
    assert_same_decisions,
    assert_scores_match,
    assert_survivors,
    class_counts,
    clusters,
    copy_of,
    entropy_of,
    forms_of_means,
    generator,
    in_float64,
    laid_out,
    leaving_in_float64,
    log_prob_tolerance,
    problems,
    row_counts,
    same_bits,
    seeds,
    sentinels,
    shapes,
    shuffled_ids,
)

from e2cm_ext import Decisions, ops
from e2cm_ext.ops import reference

pytestmark = pytest.mark.usefixtures("device")

RULES = ("confidence", "entropy")
thresholds = st.one_of(
    st.sampled_from([-INF, INF, 0.0, -0.0, 1.0, 0.5, -1.0, 1e300]), st.floats(0, 1, width=32), st.floats(0, 5)
)


def float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float64).to(torch.float32).item()


def just_below(number: float) -> float:
    return float(np.nextafter(np.float32(number), np.float32(-np.inf)))


def just_above(number: float) -> float:
    return float(np.nextafter(np.float32(number), np.float32(np.inf)))


# ---- worked out by hand --------------------------------------------------------------------------

# x = (3, 4); means (0, 0), (3, 0), (3, 4); distances 5, 4, 0; over scales 5, 4, 1: 1, 1, 0.
X = torch.tensor([[3.0, 4.0]])
MEANS = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
SCALE = torch.tensor([5.0, 4.0, 1.0])
TOTAL = 1 + 2 / math.e  # e^0 + 2 e^-1
P = (1 / math.e / TOTAL, 1 / math.e / TOTAL, 1 / TOTAL)  # .2119, .2119, .5761
ENTROPY = -sum(p * math.log(p) for p in P)  # .9753


def test_distances_by_hand():
    assert ops.class_distances(X, MEANS).tolist() == [[5.0, 4.0, 0.0]]


def test_class_scores_by_hand():
    confidence, prediction, log_probs = ops.class_scores(X, MEANS, SCALE)
    assert prediction.tolist() == [2]
    assert confidence.item() == pytest.approx(0.5761168847658291, rel=1e-6)
    assert log_probs[0].tolist() == pytest.approx([math.log(p) for p in P], rel=1e-6)


@pytest.mark.parametrize(
    ("rule", "threshold", "leaves"),
    [
        ("confidence", P[2] - 1e-6, True),
        ("confidence", P[2] + 1e-6, False),
        ("entropy", ENTROPY + 1e-6, True),
        ("entropy", ENTROPY - 1e-6, False),
    ],
)
def test_exit_step_by_hand(rule, threshold, leaves):
    out = sentinels(3, 3)
    before = copy_of(out)
    survivors, kept = ops.exit_step(X, MEANS, SCALE, threshold, torch.tensor([1]), out, rule=rule, exit=7)
    if leaves:
        assert survivors.shape == (0, 2)
        assert kept.tolist() == []
        assert out.prediction.tolist() == [-10_000, 2, -9_998]
        assert out.exit.tolist() == [-20_000, 7, -19_998]
        assert out.confidence.tolist() == [0.5, pytest.approx(P[2], rel=1e-6), 2.5]
        assert out.log_probs[1].tolist() == pytest.approx([math.log(p) for p in P], rel=1e-6)
        assert torch.equal(out.log_probs[[0, 2]], before.log_probs[[0, 2]])
    else:
        assert survivors.tolist() == [[3.0, 4.0]]
        assert kept.tolist() == [1]
        assert_same_decisions(out, before)


@pytest.mark.parametrize("scale", [None, torch.tensor([5.0, 4.0, 1.0])])
def test_decide_by_hand(scale):
    scores = torch.tensor([[-1.0, -1.0, 0.0]]) if scale is None else torch.tensor([[5.0, 4.0, 0.0]])
    out = sentinels(1, 3)
    survivors, kept = ops.decide(X, scores, 0.576, torch.tensor([0]), out, scale=scale, exit=3)
    assert (len(survivors), len(kept)) == (0, 0)
    assert (out.prediction.item(), out.exit.item()) == (2, 3)
    assert out.confidence.item() == pytest.approx(P[2], rel=1e-6)
    assert out.log_probs[0].tolist() == pytest.approx([math.log(p) for p in P], rel=1e-6)


def test_compact_by_hand():
    x = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    survivors, index = ops.compact(x, torch.tensor([True, False, False, True]))
    assert survivors.tolist() == [[1, 2], [7, 8]]
    assert index.tolist() == [0, 3]
    assert index.dtype is torch.int64


# ---- distances -----------------------------------------------------------------------------------


@given(problems(), st.data())
def test_distances_match_float64(problem, data):
    means = data.draw(forms_of_means(problem.means))
    center = data.draw(st.sampled_from([None, "mean", "flat mean", "zero"]))
    if center is not None:
        average = problem.means.float().mean(0)
        center = {"mean": average, "flat mean": average.flatten(), "zero": torch.zeros_like(average)}[center]
    got = ops.class_distances(problem.x, means, center)
    assert got.is_contiguous()
    assert_distances_match(got, problem.x, problem.means)


@pytest.mark.parametrize(
    ("rows", "dim", "classes", "dtype"),
    [
        (5, 300_000, 10, torch.float32),
        (3, 299_993, 3, torch.bfloat16),
        (3, 200_704, 7, torch.float16),
        (2, 65_537, 101, torch.float32),
        (1, 131_071, 1, torch.float32),
        (7, 8_191, 1000, torch.float32),
        (67, 521, 1000, torch.bfloat16),
        (131, 64, 997, torch.float16),
    ],
)
def test_large_problems_match_float64(rows, dim, classes, dtype):
    problem = clusters(rows, dim, classes, dtype, dtype, spread=0.5)
    assert_distances_match(ops.class_distances(problem.x, problem.means), problem.x, problem.means)
    assert_scores_match(ops.class_scores(*problem), problem)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last rows apart"])
@pytest.mark.parametrize("shape", [(64, 28, 28), (16, 7, 14, 14)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_maps_match_float64(layout, shape, dtype):
    problem = clusters(9, shape, 10, dtype)
    problem = problem._replace(x=laid_out(problem.x, layout))
    assert_scores_match(ops.class_scores(*problem), problem)
    for means in (problem.means.flatten(1), laid_out(problem.means, "channels_last")):
        assert same_bits(ops.class_distances(problem.x, means), ops.class_distances(problem.x, problem.means))


@pytest.mark.parametrize("with_center", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 64, 513, 16_384, 200_704, 802_816])
def test_a_shared_offset_costs_no_digits(dim, with_center):
    """The contract: under 1e-5 for features in float32 that share an offset of 100, at any D, with a center or not."""
    x, means, _ = clusters(4, dim, 5, offset=100.0, spread=1.0)
    center = means.mean(0) if with_center else None
    assert_distances_match(ops.class_distances(x, means, center), x, means, error=1e-5)


@pytest.mark.parametrize("with_center", [False, True])
@pytest.mark.parametrize("offset", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_near_samples_far_from_the_origin(offset, spread, with_center):
    x, means, _ = clusters(33, 4099, 7, offset=offset, spread=spread)
    center = means.mean(0) if with_center else None
    assert_distances_match(ops.class_distances(x, means, center), x, means, error=1e-5)


@pytest.mark.parametrize("center", [-1e3, 1e6])
def test_a_bad_center_changes_nothing_but_rounding(center):
    x, means, _ = clusters(9, 777, 5)
    got = ops.class_distances(x, means, torch.full((777,), center))
    assert_distances_match(got, x, means, error=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dim", [1, 16, 37, 512, 1000, 5001])
def test_a_row_that_is_a_mean_has_distance_zero(dtype, offset, dim):
    means = clusters(0, dim, 11, dtype, dtype, offset=offset).means
    distances = ops.class_distances(means, means)
    assert distances.diag().tolist() == [0.0] * 11
    assert_distances_match(distances, means, means)


def test_distances_match_scipy():
    cdist = pytest.importorskip("scipy.spatial.distance").cdist
    x, means, _ = clusters(40, 123, 9)
    expected = torch.from_numpy(cdist(x.double().numpy(), means.double().numpy()))
    torch.testing.assert_close(ops.class_distances(x, means).double(), expected, rtol=DISTANCE_ERROR, atol=0)


def test_means_of_another_dtype_than_the_features():
    for dtype, means_dtype in itertools.product(DTYPES, DTYPES):
        x, means, _ = clusters(21, 777, 13, dtype, means_dtype)
        assert_distances_match(ops.class_distances(x, means, means.float().mean(0)), x, means)


def test_16_bit_features_are_widened_exactly():
    """Every finite bfloat16 and float16, subnormals among them, against a mean of zero."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        numbers = every[every.isfinite()][:, None]
        got = ops.class_distances(numbers, torch.zeros(1, 1))[:, 0]
        torch.testing.assert_close(got, numbers[:, 0].float().abs(), rtol=3e-7, atol=1e-44)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e-15, 1e15, 1e20, 1e30])
@pytest.mark.parametrize("dim", [1, 17, 1000])
def test_magnitudes_whose_squares_float32_cannot_hold(size, dim):
    x, means, scale = clusters(9, dim, 5)
    problem = Problem(x * size, means * size, scale * size)
    distances = ops.class_distances(problem.x, problem.means)
    expected = reference.class_distances(problem.x.double(), problem.means.double())
    torch.testing.assert_close(distances.double(), expected, rtol=DISTANCE_ERROR, atol=1e-44)
    if size > 1e-38:
        assert_scores_match(ops.class_scores(*problem), problem)


def test_a_huge_sample_among_ordinary_ones():
    x, means, scale = clusters(3, 10, 4)
    before = ops.class_scores(x, means, scale)
    x[1] = 1e20
    assert_distances_match(ops.class_distances(x, means), x, means)
    for a, b in zip(ops.class_scores(x, means, scale), before, strict=True):
        assert same_bits(a[::2], b[::2])


def test_features_may_require_a_gradient_and_results_do_not():
    x, means, scale = clusters(4, 6, 3)
    for result in ops.class_scores(x.requires_grad_(), torch.nn.Parameter(means), scale):
        assert not result.requires_grad


# ---- scores --------------------------------------------------------------------------------------


@given(problems(), st.data())
def test_scores_match_float64(problem, data):
    means = data.draw(forms_of_means(problem.means))
    got = ops.class_scores(problem.x, means, problem.scale, data.draw(st.sampled_from([None, problem.means[0]])))
    assert_scores_match(got, problem)


def test_probabilities_sum_to_one():
    for classes in (1, 2, 10, 1000):
        log_probs = ops.class_scores(*clusters(50, 24, classes)).log_probs
        torch.testing.assert_close(log_probs.double().exp().sum(1), torch.ones(50).double(), rtol=1e-5, atol=0)


def test_predictions_match_the_nearest_centroid_of_sklearn():
    NearestCentroid = pytest.importorskip("sklearn.neighbors").NearestCentroid
    g = generator(5)
    labels = torch.arange(600) % 10
    features = torch.randn(10, 32, generator=g)[labels] + 1.5 * torch.randn(600, 32, generator=g)
    classifier = NearestCentroid().fit(features[:400].numpy(), labels[:400].numpy())
    means = torch.from_numpy(np.asarray(classifier.centroids_)).float()
    prediction = ops.class_scores(features[400:], means, torch.full((10,), 3.0)).prediction
    assert prediction.tolist() == classifier.predict(features[400:].numpy()).tolist()
    assert (prediction == labels[400:]).float().mean() > 0.8


@given(class_counts, shapes, st.sampled_from(DTYPES), seeds)
@example(classes=1000, shape=(67,), dtype=torch.float32, seed=0)
def test_ties_go_to_the_lowest_class(classes, shape, dtype, seed):
    """All means the same: every class is as likely as the next, bit for bit."""
    x, means, _ = clusters(19, shape, classes, dtype, dtype, seed=seed)
    means = means[:1].expand_as(means)
    confidence, prediction, log_probs = ops.class_scores(x, means, torch.ones(classes))
    assert prediction.tolist() == [0] * 19
    assert same_bits(log_probs, log_probs[:, :1].expand_as(log_probs).contiguous())
    torch.testing.assert_close(confidence, torch.full((19,), 1 / classes), rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [2, 3, 7, 13, 49, 64, 100, 1000])
def test_duplicated_means_are_never_predicted_twice(classes):
    """The second half of the classes repeats the first, in another order: only the first of each pair is predicted."""
    x, means, _ = clusters(50, 200, classes, spread=0.3)
    half = classes // 2
    order = torch.randperm(half, generator=generator(1))
    means[classes - half :] = means[:half][order]
    got = ops.class_scores(x, means, torch.full((classes,), 20.0))
    assert int(got.prediction.max()) < classes - half
    assert same_bits(got.log_probs[:, classes - half :], got.log_probs[:, :half][:, order])


@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, NAN, INF, -INF])
@pytest.mark.parametrize("classes", [2, 10, 50])
def test_a_class_without_a_mean_is_never_predicted(bad, classes):
    """Even where its mean, which may hold anything, is the nearest; the other classes share the probability."""
    x, means, scale = clusters(40, 30, classes, spread=0.1)
    without = torch.arange(classes) % 2 == 1
    means[classes - 2 + classes % 2] = x[0]
    with_bad = torch.where(without, bad, scale)
    got = ops.class_scores(x, means, with_bad)
    assert_scores_match(got, Problem(x, means, with_bad))
    assert not without[got.prediction].any()
    assert got.log_probs[:, without].isneginf().all()
    assert got.log_probs[:, ~without].isfinite().all()
    alone = ops.class_scores(x, means[~without], scale[~without])
    torch.testing.assert_close(got.log_probs[:, ~without], alone.log_probs)


def test_a_mean_of_nans_does_not_matter_if_its_class_has_no_scale():
    x, means, scale = clusters(20, 17, 5)
    means[3], scale[3] = NAN, NAN
    got = ops.class_scores(x, means, scale)
    assert got.log_probs[:, 3].isneginf().all()
    rest = [0, 1, 2, 4]
    torch.testing.assert_close(got.log_probs[:, rest], ops.class_scores(x, means[rest], scale[rest]).log_probs)


@pytest.mark.parametrize("rule", RULES)
def test_without_any_mean_no_sample_leaves(rule):
    x, means, _ = clusters(5, 9, 4)
    got = ops.class_scores(x, means, torch.zeros(4))
    assert got.confidence.isnan().all()
    assert got.log_probs.isnan().all()
    assert got.prediction.tolist() == [0] * 5
    for threshold in (-INF, 0.0, INF):
        out = sentinels(5, 4)
        survivors, _ = ops.exit_step(x, means, torch.zeros(4), threshold, torch.arange(5), out, rule=rule)
        assert same_bits(survivors, x)
        assert_same_decisions(out, sentinels(5, 4))


def test_one_class_is_certain():
    confidence, prediction, log_probs = ops.class_scores(*clusters(5, 3, 1))
    assert confidence.tolist() == [1.0] * 5
    assert prediction.tolist() == [0] * 5
    assert log_probs.tolist() == [[0.0]] * 5


def test_far_classes_keep_their_log_probability():
    """Where a probability is zero in float32, its logarithm is not."""
    x, means = torch.zeros(1, 1), torch.tensor([[0.0], [100.0], [50_000.0]])
    got = ops.class_scores(x, means, torch.ones(3))
    assert got.confidence.tolist() == [1.0]
    assert got.log_probs.tolist() == [[0.0, -100.0, -50_000.0]]


# ---- rows that must not leave --------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "rows apart", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 5, 16, 37, 512, 1030])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rows_with_a_nan_or_an_infinity_never_leave(bad, dim, dtype, layout):
    x, means, scale = clusters(21, dim, 6, dtype)
    clean = ops.class_scores(laid_out(x, layout), means, scale)
    spoiled = {0: 0, 4: dim // 2, 7: dim - 1, 20: dim - 1}
    for row, column in spoiled.items():
        x[row, column] = bad
    is_spoiled = torch.tensor([row in spoiled for row in range(21)])
    x = laid_out(x, layout)
    got = ops.class_scores(x, means, scale)
    assert got.confidence[is_spoiled].isnan().all()
    assert got.log_probs[is_spoiled].isnan().all()
    assert (got.prediction[is_spoiled] == 0).all()
    for with_bad, without in zip(got, clean, strict=True):  # the neighbours do not notice
        assert same_bits(with_bad[~is_spoiled], without[~is_spoiled])
    for rule, threshold in itertools.product(RULES, (-INF, -1.0, 0.0, 0.5, INF)):
        out = sentinels(21, 6)
        _, kept = ops.exit_step(x, means, scale, threshold, torch.arange(21), out, rule=rule)
        assert set(spoiled) <= set(kept.tolist())
        everybody = threshold < 0 if rule == "confidence" else threshold == INF
        if everybody:
            assert kept.tolist() == list(spoiled)
        for answers, untouched in zip(out, sentinels(21, 6), strict=True):
            assert same_bits(answers[is_spoiled], untouched[is_spoiled])


# ---- exit_step -----------------------------------------------------------------------------------


@given(problems(), thresholds, st.sampled_from(RULES), st.booleans(), seeds, st.integers(-(2**63), 2**63 - 1))
def test_exit_step_is_scores_and_rule_and_compaction(problem, threshold, rule, with_log_probs, seed, exit):
    """Bit for bit: leavers' rows of `out` as class_scores has them, nothing else written; survivors untouched."""
    x, means, scale = problem
    rows, classes = x.shape[0], means.shape[0]
    room = rows + 3
    ids = shuffled_ids(rows, room, seed)
    out = sentinels(room, classes if with_log_probs else None)
    expected = copy_of(out)
    survivors, kept = ops.exit_step(x, means, scale, threshold, ids, out, rule=rule, exit=exit)

    confidence, prediction, log_probs = ops.class_scores(x, means, scale)
    if rule == "confidence":
        leaves = confidence > torch.tensor(threshold, dtype=torch.float64).float()
        assert torch.equal(kept, ids[~leaves])
    else:  # no op gives entropies: those too close to the threshold are believed
        leaves = ~torch.isin(ids, kept)
        by_float64, certain = leaving_in_float64(log_probs.double(), threshold, rule)
        assert torch.equal(leaves[certain], by_float64[certain])
    expected.prediction[ids[leaves]] = prediction[leaves]
    expected.confidence[ids[leaves]] = confidence[leaves]
    expected.exit[ids[leaves]] = exit
    if with_log_probs:
        expected.log_probs[ids[leaves]] = log_probs[leaves]
    assert_same_decisions(out, expected)
    assert_survivors(survivors, kept, x, ids, ~leaves)
    again, index = ops.compact(x, ~leaves)
    assert same_bits(again, survivors)
    assert torch.equal(ids[index], kept)


@given(problems(), st.floats(0, 1.5), st.sampled_from(RULES))
def test_exit_step_matches_float64(problem, threshold, rule):
    """Who leaves and with which answer, by the reference in float64 alone; doubtful rows are left out."""
    x, means, scale = problem
    rows, classes = x.shape[0], means.shape[0]
    confidence, prediction, log_probs = in_float64(problem)
    tolerance = log_prob_tolerance(*problem)
    leaves, certain = leaving_in_float64(log_probs, threshold, rule, margin=tolerance[:, 0] * (1 + math.log(classes)))
    ids = torch.arange(rows)
    out = Decisions.empty(rows, classes)
    _, kept = ops.exit_step(x, means, scale, threshold, ids, out, rule=rule)
    left = ~torch.isin(ids, kept)
    assert torch.equal(left[certain], leaves[certain])
    assert_log_probs_match(out.log_probs[left], log_probs[left], tolerance[left])
    assert not ((out.confidence[left] - confidence[left]).abs() > 2 * tolerance[left, 0]).any()
    best_two = log_probs.topk(min(2, classes), dim=1).values
    clear = (best_two[:, 0] - best_two[:, -1] > 2 * tolerance[:, 0]) | (classes == 1)
    assert torch.equal(out.prediction[left & clear], prediction[left & clear])


@pytest.mark.parametrize("classes", [1, 2, 10, 100])
def test_a_threshold_equal_to_the_confidence_is_not_passed(classes):
    x, means, scale = clusters(23, 40, classes)
    confidence = ops.class_scores(x, means, scale).confidence
    for row, c in enumerate(confidence.tolist()):
        # The last two are not floats, but lie between two: the comparison is in float32, where they are equal to c.
        between = (c + just_below(c)) / 2 * (1 - 2**-52) + c * 2**-52, c * (1 + 2**-27), c * (1 - 2**-27)
        cases = [(c, False), (just_above(c), False), (just_below(c), True)]
        cases += [(t, False) for t in between[1:] if float32(t) == c and t != c]
        assert len(cases) > 3
        for threshold, leaves in cases:
            for given_as in (threshold, torch.tensor(threshold, dtype=torch.float64)):
                _, kept = ops.exit_step(
                    x[row : row + 1], means, scale, given_as, torch.zeros(1, dtype=torch.int64), sentinels(1, classes)
                )
                assert (len(kept) == 0) == leaves, (threshold, c)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 8, 17])
@pytest.mark.parametrize("op", ["exit_step", "decide"])
def test_an_entropy_equal_to_the_threshold_is_not_passed(op, classes):
    """All classes equally likely: the entropy is log K, in float32."""
    x, one = torch.ones(1, 5), torch.zeros(1, dtype=torch.int64)

    def stays(threshold):
        out = sentinels(1, classes)
        if op == "decide":
            return len(ops.decide(x, torch.full((1, classes), 3.0), threshold, one, out, rule="entropy")[0]) == 1
        means = torch.zeros(classes, 5)
        return len(ops.exit_step(x, means, torch.ones(classes), threshold, one, out, rule="entropy")[0]) == 1

    entropy = float32(math.log(classes))
    assert stays(just_below(entropy))
    assert stays(entropy)
    assert not stays(just_above(entropy))


@given(problems(rows=st.sampled_from([1, 5, 33])), st.sampled_from(RULES))
def test_infinite_thresholds(problem, rule):
    x, means, scale = problem
    rows, classes = x.shape[0], means.shape[0]
    everybody, nobody = (-INF, INF) if rule == "confidence" else (INF, -INF)
    ids = torch.arange(rows)
    out = sentinels(rows, classes)
    survivors, kept = ops.exit_step(x, means, scale, nobody, ids, out, rule=rule)
    assert survivors is x  # nobody has left: not even a copy
    assert kept is ids
    assert_same_decisions(out, sentinels(rows, classes))
    survivors, kept = ops.exit_step(x, means, scale, everybody, ids, out, rule=rule)
    assert survivors.shape == (0, *x.shape[1:])
    assert survivors.dtype is x.dtype
    assert (kept.shape, kept.dtype) == ((0,), torch.int64)
    scores = ops.class_scores(x, means, scale)
    assert_same_decisions(out, Decisions(scores[1], scores[0], torch.zeros(rows, dtype=torch.int64), scores[2]))


def test_ids_and_scale_and_center_may_lie_anywhere():
    x, means, scale = clusters(30, 14, 4)
    ids = shuffled_ids(30, 40)
    plain, apart = sentinels(40, 4), sentinels(40, 4)
    expected = ops.exit_step(x, means, scale, 0.75, ids, plain, means.mean(0))
    spread = [torch.stack([t, t], 1)[:, 0] for t in (scale, ids, means.mean(0))]
    assert not any(t.is_contiguous() for t in spread)
    survivors, kept = ops.exit_step(x, means, spread[0], torch.tensor([0.75]), spread[1], apart, spread[2].double())
    assert 0 < len(kept) < 30
    assert same_bits(survivors, expected[0])
    assert torch.equal(kept, expected[1])
    assert_same_decisions(apart, plain)


def test_nothing_that_came_in_is_changed():
    x, means, scale = clusters(30, (3, 5, 7), 4)
    x, ids, center = laid_out(x, "channels_last"), torch.arange(30), means.mean(0)
    before = [t.clone() for t in (x, means, scale, ids, center)]
    ops.exit_step(x, means, scale, 0.5, ids, Decisions.empty(30, 4), center)
    ops.decide(x, x.flatten(1), 0.5, ids, Decisions.empty(30, 105))
    ops.compact(x, ids % 2 == 0)
    for t, b in zip((x, means, scale, ids, center), before, strict=True):
        assert same_bits(t, b)


def test_a_batch_may_go_through_many_exits():
    """The whole loop of a cascade: every sample leaves exactly once, at the first exit that is sure enough of it."""
    rows, classes, exits = 200, 10, 5
    heads = [clusters(rows, (4, 6, 6), classes, seed=s, spread=1.5) for s in range(exits)]
    out = Decisions.empty(rows, classes)
    ids = torch.arange(rows)
    limits = [0.5, 0.4, 0.3, 0.3, -INF]
    for number, (head, limit) in enumerate(zip(heads, limits, strict=True)):
        x = laid_out(head.x[ids], "channels_last")
        _, ids = ops.exit_step(x, head.means, head.scale, limit, ids, out, exit=number)
    assert len(ids) == 0
    for sample in range(rows):
        says = [
            ops.class_scores(laid_out(head.x[sample : sample + 1], "channels_last"), head.means, head.scale)
            for head in heads
        ]
        sure = [scores.confidence.item() > float32(limit) for scores, limit in zip(says, limits, strict=True)]
        number = sure.index(True)
        assert out.exit[sample].item() == number
        assert out.prediction[sample].item() == says[number].prediction.item()
        assert same_bits(out.confidence[sample], says[number].confidence[0])
        assert same_bits(out.log_probs[sample], says[number].log_probs[0])
    assert set(out.exit.tolist()) == set(range(exits))


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "dim", "dtype"),
    [
        (1, 1, torch.float32),
        (1, 513, torch.float32),
        (2, 100, torch.bfloat16),
        (3, 37, torch.float16),
        (5, 1000, torch.float32),
        (7, 17, torch.bfloat16),
        (10, 64, torch.float32),
        (10, 5003, torch.float32),
        (10, 4096, torch.bfloat16),
        (11, 511, torch.float16),
        (13, 700, torch.float32),
        (49, 777, torch.float32),
        (100, 512, torch.float32),
        (100, 1031, torch.bfloat16),
        (1000, 67, torch.float32),
        (1000, 601, torch.float32),
    ],
)
@pytest.mark.parametrize("with_center", [False, True])
def test_the_same_bits_in_any_batch(classes, dim, dtype, with_center):
    """Rows 0 to 69 at once, alone, and in batches of every shape between, at every place of a batch."""
    x, means, scale = clusters(70, dim, classes, dtype, dtype, offset=3.0)
    center = means.float().mean(0) if with_center else None
    whole = ops.class_scores(x, means, scale, center)
    distances = ops.class_distances(x, means, center)
    some = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 69)
    batches = [slice(row, row + 1) for row in range(0, 70, 1 if classes < 100 else 9)]
    batches += [slice(70 - size, 70) for size in some] + [slice(3, 3 + size) for size in some[:-3]]
    for batch in batches:
        part = ops.class_scores(x[batch], means, scale, center)
        for a, b in zip(part, whole, strict=True):
            assert same_bits(a, b[batch]), batch
        assert same_bits(ops.class_distances(x[batch], means, center), distances[batch]), batch


@pytest.mark.parametrize("size", range(1, 71))
def test_the_same_bits_in_batches_of_every_size(size):
    x, means, scale = clusters(70, 1029, 10)
    whole = ops.class_scores(x, means, scale)
    for first in {0, 70 - size, (70 - size) // 2}:
        part = ops.class_scores(x[first : first + size], means, scale)
        for a, b in zip(part, whole, strict=True):
            assert same_bits(a, b[first : first + size])


def test_the_same_bits_in_batches_too_large_to_be_done_in_one_go():
    """Room for sums is bounded: batches of very many rows and classes are done in pieces."""
    rows, classes = 9000, 1000
    x, means, scale = clusters(rows, 16, classes, seed=3)
    ids, whole, parts = shuffled_ids(rows, rows), Decisions.empty(rows, classes), Decisions.empty(rows, classes)
    survivors, kept = ops.exit_step(x, means, scale, 0.02, ids, whole)
    pieces = [slice(first, first + 1500) for first in range(0, rows, 1500)]
    halves = [ops.exit_step(x[piece], means, scale, 0.02, ids[piece], parts) for piece in pieces]
    assert 0 < len(kept) < rows
    assert same_bits(survivors, torch.cat([rows for rows, _ in halves]))
    assert torch.equal(kept, torch.cat([numbers for _, numbers in halves]))
    assert_same_decisions(parts, whole)
    scores = ops.class_scores(x, means, scale)
    last = ops.class_scores(x[-1500:], means, scale)
    assert all(same_bits(a[-1500:], b) for a, b in zip(scores, last, strict=True))
    assert same_bits(ops.class_distances(x, means)[-1500:], ops.class_distances(x[-1500:], means))


@pytest.mark.parametrize(
    ("rows", "classes", "dim", "dtype"),
    [
        (1, 10, 802_816, torch.float32),
        (3, 1, 262_147, torch.bfloat16),
        (5, 13, 70_001, torch.float16),
        (70, 10, 8_209, torch.float32),
        (257, 5, 2_049, torch.float32),
        (300, 49, 513, torch.float32),
        (67, 100, 1_031, torch.bfloat16),
        (65, 1000, 130, torch.float32),
        (4097, 10, 64, torch.float32),
    ],
)
def test_the_same_bits_on_any_number_of_threads(rows, classes, dim, dtype):
    x, means, scale = clusters(rows, dim, classes, dtype)
    ids = torch.arange(rows)
    logits = torch.randn(rows, classes, generator=generator(3))

    def everything():
        out, other = Decisions.empty(rows, classes), Decisions.empty(rows, classes)
        left = ops.exit_step(x, means, scale, 0.5, ids, out)
        right = ops.decide(x, logits, 0.3, ids, other)
        return [ops.class_distances(x, means), *ops.class_scores(x, means, scale), *left, *right, *out, *other]

    torch.set_num_threads(1)
    expected = everything()
    for threads in (2, 3, 8, 16):
        torch.set_num_threads(threads)
        for a, b in zip(everything(), expected, strict=True):
            assert same_bits(a, b), threads


@given(problems(shape=st.one_of(st.just((37,)), st.just((5, 3, 7)))))
def test_the_same_bits_wherever_the_rows_lie(problem):
    """Layouts whose samples are read in the same order give the same bits; so do means, however they are stored."""
    x, means, scale = problem
    expected = ops.class_scores(x.contiguous(), means, scale)
    for layout in ("rows apart", "features apart", "transposed"):
        got = ops.class_scores(laid_out(x.contiguous(), layout), means.flatten(1), scale)
        for a, b in zip(got, expected, strict=True):
            assert same_bits(a, b), layout


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_rows(dtype):
    x, means, scale = clusters(1, (3, 4, 5), 7, dtype)
    many = x.expand(20, 3, 4, 5)
    assert many.stride(0) == 0
    one = ops.class_scores(x, means, scale)
    for a, b in zip(ops.class_scores(many, means, scale), one, strict=True):
        assert same_bits(a, b.expand_as(a).contiguous())
    survivors, index = ops.compact(many, torch.arange(20) % 3 == 0)
    assert same_bits(survivors, x.expand(7, 3, 4, 5))
    assert index.tolist() == [0, 3, 6, 9, 12, 15, 18]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(12,), (3, 4), (5, 3, 4), (2, 3, 4, 5), (2, 2, 3, 2, 2)])
def test_features_are_read_where_they_lie(shape, layout):
    problem = clusters(11, shape, 4)
    x = laid_out(problem.x, layout)
    assert_scores_match(ops.class_scores(x, problem.means, problem.scale), problem)
    for memory_format in [f for dim, f in FORMATS.items() if dim == x.dim()]:
        assert x.is_contiguous(memory_format=memory_format) == (layout == "channels_last")


# ---- decide --------------------------------------------------------------------------------------


@st.composite
def head_scores(draw):
    """Logits, or distances and a scale: of any dtype, with infinities and NaNs among them."""
    rows, classes, seed = draw(row_counts), draw(st.one_of(class_counts, st.just(1000))), draw(seeds)
    g = generator(seed)
    scores = torch.randn(rows, classes, generator=g) * draw(st.sampled_from([0.1, 1.0, 5.0, 50.0]))
    scale = None
    if draw(st.booleans()):
        scores, scale = scores.abs(), 0.2 + torch.rand(classes, generator=g)
        if draw(st.booleans()):
            scale[torch.rand(classes, generator=g) < 0.3] = draw(st.sampled_from([0.0, NAN, INF, -2.0]))
    if draw(st.booleans()):
        odd = torch.tensor([INF, -INF, NAN, 0.0] if draw(st.booleans()) else [-INF])
        where = torch.rand(rows, classes, generator=g) < draw(st.sampled_from([0.01, 0.3]))
        values = odd[torch.randint(len(odd), (rows, classes), generator=g)]
        scores = torch.where(where, values if scale is None else values.abs(), scores)
    scores = scores.to(draw(st.sampled_from(DTYPES)))
    return laid_out(scores, draw(st.sampled_from(["contiguous", "rows apart", "features apart", "transposed"]))), scale


@given(head_scores(), thresholds, st.sampled_from(RULES), st.booleans(), seeds)
def test_decide_matches_float64(scores_and_scale, threshold, rule, with_log_probs, seed):
    scores, scale = scores_and_scale
    rows, classes = scores.shape
    room = rows + 2
    ids = shuffled_ids(rows, room, seed)
    x = torch.randn(rows, 3, generator=generator(seed))
    out = sentinels(room, classes if with_log_probs else None)
    survivors, kept = ops.decide(x, scores, threshold, ids, out, scale=scale, rule=rule, exit=9)

    if scale is None:
        log_probs = reference.log_softmax(scores.double())
        size = scores.double().nan_to_num(posinf=0, neginf=0).abs().amax(1)
    else:
        log_probs = reference.log_probabilities(scores.double(), scale.double())
        size = (scores.double() / scale.double()).nan_to_num(posinf=0, neginf=0).abs().amax(1)
    tolerance = 1e-6 + 3e-7 * size
    leaves, certain = leaving_in_float64(log_probs, threshold, rule, margin=tolerance * (1 + math.log(classes)) * 3)
    left = ~torch.isin(ids, kept)
    assert torch.equal(left[certain], leaves[certain])
    assert_survivors(survivors, kept, x, ids, ~left)

    at = ids[left]
    confidence, prediction = reference.best(log_probs)
    gap = (out.confidence[at].double() - confidence[left]).abs() / confidence[left]
    assert not (gap > 3 * tolerance[left]).any()
    # Equal scores tie exactly; scores over scales only up to rounding.
    clear = torch.ones_like(left) if scale is None else (log_probs.exp() > 0.5).any(1)
    assert torch.equal(out.prediction[at][clear[left]], prediction[left & clear])
    assert (out.exit[at] == 9).all()
    if with_log_probs:
        assert_log_probs_match(out.log_probs[at], log_probs[left], tolerance[left][:, None] * 3)
    untouched = torch.ones(room, dtype=torch.bool)
    untouched[at] = False
    for got, before in zip(out, sentinels(room, classes if with_log_probs else None), strict=True):
        assert got is None or same_bits(got[untouched], before[untouched])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decide_with_logits_that_are_not_finite(dtype, rule):
    """-inf rules a class out; NaN, +inf and nothing but -inf spoil the row."""
    logits = torch.tensor(
        [
            [0.0, -INF, -INF],
            [-INF, 5.0, -INF],
            [0.0, NAN, 0.0],
            [0.0, INF, 0.0],
            [-INF, -INF, -INF],
            [INF, INF, INF],
            [-INF, NAN, -INF],
        ]
    ).to(dtype)
    everybody = -INF if rule == "confidence" else INF
    out = sentinels(7, 3)
    _, kept = ops.decide(torch.zeros(7, 1), logits, everybody, torch.arange(7), out, rule=rule)
    assert kept.tolist() == [2, 3, 4, 5, 6]
    assert out.prediction[:2].tolist() == [0, 1]
    assert out.confidence[:2].tolist() == [1.0, 1.0]
    assert out.log_probs[:2].tolist() == [[0.0, -INF, -INF], [-INF, 0.0, -INF]]
    assert_same_decisions(Decisions(*(t[2:] for t in out)), Decisions(*(t[2:] for t in sentinels(7, 3))))


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_decide_ties_go_to_the_lowest_class(classes):
    logits = torch.zeros(20, classes)
    logits[torch.arange(20), torch.arange(20) % classes] = 1.0
    logits[:, -1] = 1.0
    out = Decisions.empty(20)
    ops.decide(logits, logits, -INF, torch.arange(20), out)
    assert out.prediction.tolist() == [row % classes for row in range(20)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("classes", [1, 5, 100])
def test_decide_on_distances_is_exit_step(rule, classes):
    x, means, scale = clusters(50, 40, classes)
    scale[classes // 2 + 1 :: 3] = 0.0
    a, b = sentinels(50, classes), sentinels(50, classes)
    one = ops.exit_step(x, means, scale, 0.6, torch.arange(50), a, rule=rule)
    distances = ops.class_distances(x, means)
    two = ops.decide(x, distances, 0.6, torch.arange(50), b, scale=scale, rule=rule)
    # A distance is rounded before it is divided in one, and maybe not in the other.
    assert one[1].tolist() == two[1].tolist()
    assert a.prediction.tolist() == b.prediction.tolist()
    torch.testing.assert_close(a.log_probs, b.log_probs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 33, 50])
@pytest.mark.parametrize("classes", [1, 3, 100, 1000])
def test_decide_gives_the_same_bits_in_any_batch(classes, size):
    logits = torch.randn(50, classes, generator=generator(2)) * 3
    whole, parts = Decisions.empty(50, classes), Decisions.empty(50, classes)
    x = torch.arange(50)[:, None]
    everything = ops.decide(x, logits, 0.4, torch.arange(50), whole)[1]
    kept = []
    for first in range(0, 50, size):
        batch = slice(first, first + size)
        kept += ops.decide(x[batch], logits[batch], 0.4, torch.arange(50)[batch], parts)[1].tolist()
    assert kept == everything.tolist()
    assert_same_decisions(parts, whole)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_entropies_of_every_size(classes):
    """Peaked and flat, and one class next to certain: right to 1e-5 around the threshold."""
    logits = torch.randn(400, classes, generator=generator(4)) * torch.logspace(-3, 2, 400)[:, None]
    entropy = entropy_of(reference.log_softmax(logits.double()))
    for threshold in (0.0, 1e-4, 0.01, 0.3, 0.69, 2.0, math.log(classes)):
        out = Decisions.empty(400)
        _, kept = ops.decide(logits, logits, threshold, torch.arange(400), out, rule="entropy")
        leaves = ~torch.isin(torch.arange(400), kept)
        certain = (entropy - threshold).abs() > 1e-5
        assert torch.equal(leaves[certain], (entropy < threshold)[certain])


# ---- compact -------------------------------------------------------------------------------------

ANY_DTYPE = (
    *DTYPES,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)


@given(
    row_counts, shapes, st.sampled_from(ANY_DTYPE), st.sampled_from(LAYOUTS), st.sampled_from([0, 0.5, 0.9, 1]), seeds
)
def test_compact(rows, shape, dtype, layout, share, seed):
    g = generator(seed)
    x = laid_out((torch.randn(rows, *shape, generator=g) * 50).to(dtype), layout)
    keep = torch.rand(rows, generator=g) < share
    survivors, index = ops.compact(x, keep)
    assert_survivors(survivors, index, x, torch.arange(rows), keep)
    if rows:
        assert survivors.data_ptr() != x.data_ptr() or survivors.numel() == 0
    for a, b in zip((survivors, index), reference.compact(x, keep), strict=True):
        assert same_bits(a, b)


def test_compact_takes_any_mask_of_bools():
    x = torch.arange(10)[:, None]
    everyone = torch.tensor([True]).expand(10)
    assert ops.compact(x, everyone)[1].tolist() == list(range(10))
    every_third = (torch.arange(30) % 9 == 0)[::3]
    assert ops.compact(x, every_third)[1].tolist() == [0, 3, 6, 9]


@pytest.mark.cpu_only
@pytest.mark.parametrize("view", ["conjugated", "negated"])
def test_lazy_views_of_torch_are_values_like_any_other(view):
    """x.conj() and the imaginary part of it change a flag, not the memory."""
    z = torch.randn(9, 5, dtype=torch.complex64, generator=generator(0))
    keep = torch.arange(9) % 2 == 0
    if view == "conjugated":
        assert same_bits(ops.compact(z.conj(), keep)[0], z.conj().resolve_conj()[keep])
        return
    x, means, scale = clusters(9, 5, 3)
    minus = [torch._neg_view(-t) for t in (x, means, scale)]
    assert all(t.is_neg() for t in minus)
    assert same_bits(ops.compact(minus[0], keep)[0], x[keep])
    for a, b in zip(ops.class_scores(*minus), ops.class_scores(x, means, scale), strict=True):
        assert same_bits(a, b)
    far = means + 7  # a center far enough away to leave its mark on the bits
    center, ids, out, expected = far.mean(0), torch.arange(9), sentinels(9, 3), sentinels(9, 3)
    ops.exit_step(x, means, scale, -INF, ids, expected, center)
    ops.exit_step(*minus, -INF, ids, out, torch._neg_view(-center))
    assert_same_decisions(out, expected)
    ops.exit_step(x, means, scale, -INF, ids, out, torch._neg_view(-center))
    assert_same_decisions(out, expected)
    lazy = sentinels(9, 3)._replace(confidence=torch._neg_view(torch.zeros(9)))
    with pytest.raises((TypeError, ValueError)):  # cannot be written into
        ops.exit_step(x, means, scale, -INF, ids, lazy)


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 4, 5), (0, 0), (4, 0), (4, 3, 0, 2)])
def test_empty_batches_and_empty_samples(shape):
    x, scale = torch.zeros(shape), torch.tensor([1.0, 2.0, 0.0])
    means = torch.zeros(3, *shape[1:])
    rows = shape[0]
    assert ops.class_distances(x, means).tolist() == [[0.0] * 3] * rows
    confidence, prediction, log_probs = ops.class_scores(x, means, scale)
    assert confidence.tolist() == [0.5] * rows
    assert prediction.tolist() == [0] * rows
    assert log_probs.shape == (rows, 3)
    out = Decisions.empty(rows, 3)
    survivors, kept = ops.exit_step(x, means, scale, 0.4, torch.arange(rows), out)
    assert survivors.shape == (0, *shape[1:])
    assert kept.shape == (0,)
    assert out.prediction.tolist() == [0] * rows
    assert ops.compact(x, torch.ones(rows, dtype=torch.bool))[0].shape == shape
    assert ops.decide(x, torch.zeros(rows, 2), 0.9, torch.arange(rows), Decisions.empty(rows))[0].shape == shape


def test_one_of_everything():
    assert ops.class_distances(torch.tensor([[3.0]]), torch.tensor([[1.0]])).tolist() == [[2.0]]


@pytest.mark.cpu_only
def test_rows_further_apart_than_2_31_elements():
    try:
        storage = torch.empty(2**32 + 100, dtype=torch.bfloat16)  # touched in a few places only
    except RuntimeError:
        pytest.skip("no room for 8 GB of addresses")
    near, means, scale = clusters(3, 20, 5, torch.bfloat16)
    x = storage.as_strided((3, 20), (2**31 + 7, 1))
    x.copy_(near)
    for a, b in zip(ops.class_scores(x, means, scale), ops.class_scores(near, means, scale), strict=True):
        assert same_bits(a, b)
    assert same_bits(ops.compact(x, torch.tensor([False, False, True]))[0], near[2:])
    out = Decisions.empty(3)
    _, kept = ops.decide(x, x, 0.99, torch.arange(3), out)
    assert_survivors(x[kept], kept, near, torch.arange(3), torch.isin(torch.arange(3), kept))


@pytest.mark.cpu_only
def test_more_than_2_31_elements():
    """2,200,000 samples of 1000 features that all lie in the same place."""
    x, means, _ = clusters(1, 1000, 1)
    rows = 2_200_000
    distances = ops.class_distances(x.expand(rows, 1000), means)
    assert same_bits(distances, ops.class_distances(x, means).expand(rows, 1).contiguous())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_of_torch_does_not_matter(dtype):
    x, means, scale = clusters(9, 5, 3)
    expected = ops.class_scores(x, means, scale), ops.class_distances(x, means)
    torch.set_default_dtype(torch.float64)  # wider than needed: if it were taken, wrong numbers, but no overrun
    for a, b in zip(ops.class_scores(x, means, scale), expected[0], strict=True):
        assert same_bits(a, b)
    assert same_bits(ops.class_distances(x, means), expected[1])
    torch.set_default_dtype(dtype)
    empty = Decisions.empty(2, 3)
    assert (empty.confidence.dtype, empty.log_probs.dtype) == (torch.float32, torch.float32)


def test_inference_mode_and_no_grad():
    x, means, scale = clusters(9, 5, 3)
    expected = ops.class_scores(x, means, scale)
    with torch.inference_mode():
        out = Decisions.empty(9, 3)
        survivors, kept = ops.exit_step(x * 1, means, scale, 0.5, torch.arange(9), out)
        for a, b in zip(ops.class_scores(x, means, scale), expected, strict=True):
            assert same_bits(a, b)
    assert same_bits(survivors, x[kept])


def test_names_and_defaults():
    x, means, scale = clusters(4, 5, 3)
    scores = ops.class_scores(x=x, means=means, scale=scale, center=None)
    assert scores._fields == ("confidence", "prediction", "log_probs")
    ops.exit_step(
        x=x, means=means, scale=scale, threshold=0.5, ids=torch.arange(4), out=Decisions.empty(4), center=None
    )
    ops.compact(x=x, keep=scores.confidence > 0.5)
    assert Decisions._fields == ("prediction", "confidence", "exit", "log_probs")


@given(problems(rows=st.sampled_from([1, 4, 21])), seeds)
def test_a_means_order_does_not_matter(problem, seed):
    """Classes in another order: the same distances in that order, bit for bit, and (ties aside) the same answers."""
    x, means, scale = problem
    order = torch.randperm(len(scale), generator=generator(seed))
    distances = ops.class_distances(x, means)
    assert same_bits(ops.class_distances(x, means[order]), distances[:, order])
    z = distances / scale
    assume(all(len(row.unique()) == len(row) for row in z))
    assert torch.equal(
        order[ops.class_scores(x, means[order], scale[order]).prediction], ops.class_scores(x, means, scale).prediction
    )


@pytest.mark.parametrize("classes", [7, 40])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_center_that_is_no_number_changes_nothing(classes, bad):
    x, means, _ = clusters(20, 700, classes)
    center = means.mean(0)
    center[5] = bad
    torch.testing.assert_close(
        ops.class_distances(x, means, center).double(),
        reference.class_distances(x.double(), means.double()),
        rtol=DISTANCE_ERROR,
        atol=0,
    )


@pytest.mark.parametrize("classes", [10, 32])
def test_an_outlier_does_not_take_the_digits_from_its_neighbours(classes):
    """Numbers of one block need not be of one size: what is small must count, too."""
    x, means = torch.full((20, 512), 0.247), torch.full((classes, 512), 0.247)
    x[:, 0], x[:, 1] = 50, 28
    means[:, 0], means[:, 1] = 50, 0
    true = torch.cdist(x.double(), means.double())
    torch.testing.assert_close(ops.class_distances(x, means).double(), true, rtol=1e-5, atol=0)

    x, weight = torch.zeros(2, 512), torch.zeros(classes, 512)
    x[:, 0], weight[:, 1] = 1e4, 1e4
    x[:, 2:], weight[:, 2:] = 0.1, 0.1 * torch.linspace(0, 1, classes)[:, None]
    got = ops.linear_scores(x, weight, torch.zeros(classes)).log_probs
    expected = (x.double() @ weight.double().T).log_softmax(1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
