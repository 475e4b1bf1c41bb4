"""Statistics of maps, and the heads that look at them: against float64, against themselves (bit for bit), by hand."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tensors import (
    DTYPES,
    INF,
    LAYOUTS,
    NAN,
    assert_log_probs_match,
    assert_same_decisions,
    assert_survivors,
    entropy_of,
    generator,
    laid_out,
    one_thread,
    same_bits,
    seeds,
    sentinels,
    shuffled_ids,
)

from e2cm_ext import Statistics, ops
from e2cm_ext.ops import functional, reference

pytestmark = pytest.mark.usefixtures("device")

RICH = Statistics(mean=(4, 4), rms=(2, 2), max=(2, 2), pairs=4)
# Of a mean, relative to the mean magnitude of its cell; of a root mean square, to itself; of the square of what a pair
# gives (a root is infinitely steep at 0), to the mean magnitude of the products. Seen at worst: 1e-6.
ERROR = 5e-6


# ---- worked out by hand --------------------------------------------------------------------------


def test_statistics_of_a_map_by_hand():
    """A map of 3 x 5 in cells of 1 and 2 rows, 2 and 3 columns; a second channel that is its negative."""
    plane = torch.tensor([[3.0, 4.0, 0.0, 0.0, 9.0], [1.0, 1.0, 1.0, 2.0, 3.0], [1.0, 5.0, 6.0, 0.0, 0.0]])
    x = torch.stack([plane, -plane])[None]
    wanted = Statistics(mean=(2, 2), rms=(1, 1), max=(2, 1))
    means = [3.5, 3, 2, 2]
    squares = 9 + 16 + 81 + 1 + 1 + 1 + 4 + 9 + 1 + 25 + 36
    rms = math.sqrt(squares / 15)
    expected = [*means, *(-m for m in means), rms, rms, 9, 6, 0, 0]
    torch.testing.assert_close(ops.statistics(x, wanted)[0], torch.tensor(expected))
    assert wanted.size(x.shape[1:]) == len(expected)
    assert wanted.flops(x.shape[1:]) == 4 * 30
    assert Statistics(rms=(3, 5)).flops((2, 3, 5)) == 60


def test_pairs_by_hand():
    """Three channels: of each with itself, and of each with the next; the last one's next is the first."""
    x = torch.tensor([[[3.0, 1.0]], [[4.0, 2.0]], [[-2.0, 0.0]]])[None]
    root = [math.copysign(math.sqrt(abs(product / 2)), product) for product in (10, 20, 4, 14, -8, -6)]
    wanted = Statistics(pairs=2)
    torch.testing.assert_close(ops.statistics(x, wanted)[0], torch.tensor(root))
    assert wanted.size((3, 1, 2)) == 6
    assert wanted.flops((3, 1, 2)) == 2 * 2 * 6
    torch.testing.assert_close(ops.statistics(x, Statistics(mean=(1, 1), pairs=1))[0, 3:], torch.tensor(root[:3]))
    for channels in range(1, 9):  # as many as there are different ones
        most, all_of_them = (channels + 1) // 2, {frozenset((c, d)) for c in range(channels) for d in range(channels)}
        seen = [frozenset((c, (c + o) % channels)) for o in range(most) for c in range(channels)]
        assert len(seen) == len(set(seen)) == len(all_of_them) - (channels // 2 if channels % 2 == 0 else 0)
        Statistics(pairs=most).map_of((channels, 2, 2))
        with pytest.raises(
            ValueError, match=rf"`pairs` is {most + 1}, but .* {channels} channels.*at most {most}, half"
        ):
            Statistics(pairs=most + 1).map_of((channels, 2, 2))


def test_the_means_of_a_grid_that_divides_the_map_are_those_of_torch():
    x = torch.randn(4, 24, 8, 12, generator=generator(0))
    expected = torch.nn.functional.adaptive_avg_pool2d(x, (4, 3)).flatten(1)
    torch.testing.assert_close(ops.statistics(x, Statistics(mean=(4, 3))), expected)


def test_tokens_and_vectors():
    tokens, vectors = torch.randn(3, 6, 5, generator=generator(0)), torch.randn(3, 5, generator=generator(1))
    got = ops.statistics(tokens, Statistics(mean=(2, 1), channels=-1))
    torch.testing.assert_close(got, tokens.reshape(3, 2, 3, 5).mean(2).transpose(1, 2).flatten(1))
    got = ops.statistics(tokens, Statistics(mean=(5, 1)))
    assert same_bits(got, tokens[:, :, :].flatten(1))
    assert same_bits(ops.statistics(vectors, Statistics(mean=(1, 1))), vectors)
    assert same_bits(ops.statistics(vectors, Statistics(rms=(1, 1), channels=-1)), vectors.square().sqrt())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "`mean`, `rms` and `max` are all"),
        ({"mean": (0, 1)}, r"`mean` is \(0, 1\); wanted \(rows, columns\), both 1 or more"),
        ({"rms": (-1, 1)}, r"`rms` is \(-1, 1\)"),
        ({"max": 3}, "`max` is 3; wanted two whole numbers"),
        ({"max": (1.5, 1)}, r"`max` is \(1.5, 1\); wanted two whole numbers"),
        ({"max": (1, 1, 1)}, r"`max` is \(1, 1, 1\); wanted two whole numbers"),
        ({"mean": (1, 1), "pairs": -1}, "`pairs` is -1; wanted a whole number of offsets, from 0 up"),
        ({"pairs": True}, "`pairs` is True"),
        ({"pairs": 1.5}, "`pairs` is 1.5"),
        ({"mean": (1, 1), "channels": 1}, "`channels` is 1; wanted 0"),
        ({"mean": (1, 1), "channels": False}, "`channels` is False; wanted 0"),
    ],
)
def test_wrong_statistics(arguments, says):
    with pytest.raises(ValueError, match=says):
        Statistics(**arguments)


def test_maps_that_do_not_fit():
    for shape, wanted, says in [
        (
            (3, 4, 5),
            Statistics(mean=(5, 1)),
            r"`mean` is \(5, 1\), but a sample of shape \[3, 4, 5\] has a map of 4 x 5",
        ),
        ((7, 3), Statistics(max=(7, 2), channels=-1), r"`max` is \(7, 2\).*\[7, 3\].*7 x 1.*`channels` -1"),
        ((3,), Statistics(mean=(1, 1), rms=(2, 1)), r"`rms` is \(2, 1\).*\[3\].*1 x 1"),
        ((4, 3, 5), Statistics(pairs=3), r"`pairs` is 3, but .*\[4, 3, 5\] has 4 channels.*wanted at most 2"),
        ((5, 4), Statistics(pairs=3, channels=-1), r"`pairs` is 3, but .*\[5, 4\] has 4 channels, with `channels` -1"),
        ((1, 2, 3, 4), Statistics(mean=(1, 1)), r"a sample of shape \[1, 2, 3, 4\] has no map"),
    ]:
        x, head = torch.zeros(2, *shape), (torch.zeros(3, 8), torch.zeros(3))
        for function in (wanted.size, wanted.flops):
            with pytest.raises(ValueError, match=says):
                function(shape)
        with pytest.raises(ValueError, match=says):
            ops.statistics(x, wanted)
        with pytest.raises(ValueError, match=says):
            ops.linear_scores(x, *head, wanted)
        with pytest.raises(ValueError, match=says):
            ops.linear_step(x, *head, 0.5, torch.arange(2), sentinels(2, 3), wanted)
    with pytest.raises(TypeError, match=r"`wanted` is a tuple; wanted e2cm_ext\.Statistics"):
        ops.statistics(torch.zeros(2, 3), (1, 1))
    with pytest.raises(ValueError, match=r"`weight` has shape \[3, 8\].*one sample of the statistics, \[448\]"):
        ops.linear_scores(torch.zeros(2, 16, 8, 8), *head, RICH)


def test_statistics_are_values():
    assert Statistics(mean=[1, 1]) == Statistics(mean=(1, 1)) != Statistics(mean=(1, 1), channels=-1)
    assert Statistics(**dataclasses.asdict(RICH)) == copy.deepcopy(RICH) == RICH
    assert hash(RICH) == hash(copy.copy(RICH))


# ---- against float64 -----------------------------------------------------------------------------


def grid_within(draw, rows, columns):
    if draw(st.integers(0, 3)) == 0:
        return (0, 0)
    return draw(st.integers(1, min(rows, 6))), draw(st.integers(1, min(columns, 6)))


@st.composite
def statistics_of(draw, shape, channels):
    _, rows, columns = Statistics(mean=(1, 1), channels=channels).map_of(shape)
    grids = [grid_within(draw, rows, columns) for _ in range(3)]
    most = (shape[channels] + 1) // 2
    pairs = draw(st.one_of(st.sampled_from([0, 0, most]), st.integers(0, most)))
    if not pairs and not any(map(any, grids)):
        grids[draw(st.integers(0, 2))] = (1, 1)
    return Statistics(*grids, pairs, channels=channels)


CHANNELS = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 100, 130])
SIDES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 14, 16, 17, 33])


@st.composite
def maps(draw):
    """x in any layout and dtype, and statistics that fit it."""
    channels, axis = draw(CHANNELS), draw(st.sampled_from([0, -1]))
    rest = draw(st.one_of(st.tuples(SIDES, SIDES), st.tuples(st.sampled_from([1, 2, 49, 197, 600])), st.just(())))
    if draw(st.integers(0, 15)) == 0:
        rest = (2, 300)  # a row that is more than a piece
    shape = (channels, *rest) if axis == 0 else (*rest, channels)
    x = torch.randn(draw(st.sampled_from([0, 1, 2, 3, 5])), *shape, generator=generator(draw(seeds)))
    x = x * draw(st.sampled_from([1e-3, 1.0, 1e3])) + draw(st.sampled_from([0.0, 3.0]))
    x = x.to(draw(st.sampled_from(DTYPES)))
    return laid_out(x, draw(st.sampled_from(LAYOUTS))), draw(statistics_of(shape, axis))


@one_thread()
def assert_statistics_match(got, x, wanted):
    assert got.dtype is torch.float32
    assert got.is_contiguous()
    assert got.shape == (x.shape[0], wanted.size(x.shape[1:]))
    wide, channels = x.double(), wanted.map_of(x.shape[1:])[0]
    got, expected, magnitudes = (
        got.double(),
        reference.statistics(wide, wanted),
        reference.statistics(wide.abs(), wanted),
    )
    end = got.shape[1] - channels * wanted.pairs  # here pairs start
    for values in (got, expected, magnitudes):
        values[:, end:] *= values[:, end:].abs()
    # A maximum is exact; what is added up is off by so much of the magnitudes that are added up.
    tolerance = ERROR * magnitudes
    tolerance[:, end - channels * math.prod(wanted.max) : end] = 0
    assert not ((got - expected).abs() > tolerance).any()


@given(maps())
def test_statistics_match_float64(problem):
    x, wanted = problem
    assert_statistics_match(ops.statistics(x, wanted), x, wanted)


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 32, 32), (32, 16, 16), (64, 8, 8), (24, 56, 56), (7, 37, 41), (960, 7, 7)])
def test_maps_of_networks_match_float64(shape, dtype, form):
    x = laid_out(torch.randn(3, *shape, generator=generator(0)).to(dtype), form)
    for wanted in (RICH, Statistics(mean=(1, 1)), Statistics(max=(3, 2)), Statistics(mean=(7, 5), rms=(2, 3))):
        assert_statistics_match(ops.statistics(x, wanted), x, wanted)


@pytest.mark.parametrize("channels", [*range(1, 71), 300])
def test_pairs_of_any_number_of_channels(channels):
    g = generator(channels)
    for number, size in enumerate([(1, 1), (2, 3), (33, 7)]):
        x = torch.randn(2, channels, *size, generator=g).to(DTYPES[(channels + number) % 3])
        for pairs in {1, (channels + 3) // 4, (channels + 1) // 2}:
            wanted = Statistics(pairs=pairs)
            got = ops.statistics(x, wanted)
            assert_statistics_match(got, x, wanted)
            assert all(same_bits(ops.statistics(laid_out(x, layout), wanted), got) for layout in LAYOUTS)
            last = Statistics(pairs=pairs, channels=-1)
            assert same_bits(ops.statistics(x.movedim(1, -1), last), got)


def test_a_shared_offset_costs_no_digits():
    """Sums of many equal numbers: float32 alone would be off by 1e-4 here."""
    x = torch.full((1, 16, 300, 300), 1.1)
    got = ops.statistics(x, Statistics(mean=(1, 1), rms=(1, 1), pairs=8))
    torch.testing.assert_close(got, torch.full_like(got, 1.1), rtol=ERROR, atol=0)


@given(maps(), st.data())
def test_nothing_that_is_not_finite_is_lost(problem, data):
    x, wanted = problem
    if x.numel() == 0:
        return
    dense = x.contiguous().clone()
    flat = dense.flatten()
    place = data.draw(st.integers(0, flat.numel() - 1))
    flat[place] = data.draw(st.sampled_from([NAN, INF, -INF]))
    spoiled = laid_out(flat.reshape(x.shape), data.draw(st.sampled_from(LAYOUTS)))
    with one_thread():
        expected = reference.statistics(spoiled.double(), wanted)
    got = ops.statistics(spoiled, wanted)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
    assert not got[place // (flat.numel() // x.shape[0])].isfinite().all()


# ---- the same bits -------------------------------------------------------------------------------


@given(maps(), st.data())
def test_the_same_bits_alone_in_a_batch_and_in_any_layout(problem, data):
    x, wanted = problem
    together = ops.statistics(x, wanted)
    assert same_bits(ops.statistics(laid_out(x.contiguous(), data.draw(st.sampled_from(LAYOUTS))), wanted), together)
    for b in range(x.shape[0]):
        assert same_bits(ops.statistics(x[b : b + 1], wanted), together[b : b + 1])


@pytest.mark.cpu_only
def test_the_same_bits_with_any_number_of_threads():
    x = torch.randn(70, 48, 16, 16, generator=generator(0))
    weight, bias = torch.randn(10, RICH.size(x.shape[1:]), generator=generator(1)) / 30, torch.zeros(10)
    with one_thread():
        alone, scores = ops.statistics(x, RICH), ops.linear_scores(x, weight, bias, RICH)
    torch.set_num_threads(5)
    assert same_bits(ops.statistics(x, RICH), alone)
    for a, b in zip(ops.linear_scores(x, weight, bias, RICH), scores, strict=True):
        assert same_bits(a, b)


# ---- linear heads --------------------------------------------------------------------------------

CLASSES = st.sampled_from([1, 2, 3, 7, 10, 23, 24, 25, 33, 100])


@st.composite
def linear_problems(draw):
    x, wanted = draw(maps())
    wanted = draw(st.sampled_from([None, wanted]))
    g, classes = generator(draw(seeds)), draw(CLASSES)
    size = math.prod(x.shape[1:]) if wanted is None else wanted.size(x.shape[1:])
    weight = torch.randn(classes, size, generator=g) / math.sqrt(size)
    if wanted is None and draw(st.booleans()):
        weight = weight.reshape(classes, *x.shape[1:])
    bias = torch.randn(classes, generator=g)
    if classes > 2 and draw(st.booleans()):
        bias[draw(st.integers(0, classes - 1))] = -INF
    return x, weight.to(draw(st.sampled_from(DTYPES))), bias, wanted


@one_thread()
def in_float64(x, weight, bias, wanted):
    """Confidence, prediction, log-probabilities, and how far a log-probability may be from that."""
    if wanted is not None and wanted.pairs:  # their roots have been looked at elsewhere, and are far off near 0
        x, wanted = ops.statistics(x, wanted), None
    x, weight, bias = x.double(), weight.double(), bias.double()
    # A product may be off by so much of the magnitudes that its feature is made of, which may be larger than it is.
    made_of = x.abs() if wanted is None else reference.statistics(x.abs(), wanted)
    magnitude = made_of.flatten(1) @ weight.flatten(1).abs().T
    tolerance = 2 * ERROR * (1 + magnitude.amax(1, keepdim=True))
    return reference.linear_scores(x, weight, bias, wanted), tolerance


@given(linear_problems())
def test_linear_scores_match_float64(problem):
    (confidence, prediction, log_probs), tolerance = in_float64(*problem)
    got = ops.linear_scores(*problem)
    assert_log_probs_match(got.log_probs, log_probs, tolerance)
    assert (got.confidence.dtype, got.prediction.dtype) == (torch.float32, torch.int64)
    assert not ((got.confidence.double() - confidence).abs() > 2 * tolerance[:, 0] * confidence).any()
    clear = log_probs.topk(min(2, log_probs.shape[1]), dim=1).values
    clear = clear[:, 0] - clear[:, -1] > 2 * tolerance[:, 0] if log_probs.shape[1] > 1 else slice(None)
    assert torch.equal(got.prediction[clear], prediction[clear])


def steps(x, head, wanted, kind):
    """The scores of a head, and its step at a threshold."""
    if kind == "linear":
        return ops.linear_scores(x, *head, wanted), lambda *a, **k: ops.linear_step(x, *head, *a, wanted, **k)
    return (
        ops.class_scores(x, *head, None, wanted),
        lambda *a, **k: ops.exit_step(x, *head, *a, None, wanted, **k),
    )


@given(linear_problems(), st.sampled_from(["linear", "means"]), st.sampled_from(["confidence", "entropy"]), st.data())
def test_a_step_does_what_the_scores_say(problem, kind, rule, data):
    x, weight, bias, wanted = problem
    rows, classes = x.shape[0], weight.shape[0]
    scores, step = steps(x, (weight, bias if kind == "linear" else bias.exp()), wanted, kind)
    certainty = scores.confidence if rule == "confidence" else entropy_of(scores.log_probs)
    certain = certainty[certainty.isfinite()].tolist()
    threshold = data.draw(st.sampled_from([-INF, INF, *certain]))
    ids, out = shuffled_ids(rows, rows + 3), sentinels(rows + 3, classes)
    expected = sentinels(rows + 3, classes)
    survivors, kept = step(threshold, ids, out, rule=rule, exit=7)
    stays = torch.isin(ids, kept)
    leaves = certainty > threshold if rule == "confidence" else certainty < threshold
    if rule == "confidence":
        assert torch.equal(stays, ~leaves)  # strictly above, of the same bits
    else:
        sure = (certainty - threshold).abs() > 1e-5
        assert torch.equal(stays[sure], ~leaves[sure])
    assert_survivors(survivors, kept, x, ids, stays)
    at = ids[~stays]
    expected.prediction[at], expected.confidence[at] = scores.prediction[~stays], scores.confidence[~stays]
    expected.exit[at], expected.log_probs[at] = 7, scores.log_probs[~stays]
    assert_same_decisions(out, expected)


@pytest.mark.parametrize("kind", ["linear", "means"])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e25])
def test_a_spoiled_sample_never_leaves(kind, classes, bad):
    """Nor do its neighbours notice. (Of 1e25 the square is infinite.)"""
    x = torch.randn(5, 24, 8, 8, generator=generator(0))
    head = torch.randn(classes, RICH.size(x.shape[1:]), generator=generator(1)) / 30, torch.ones(classes)
    before, _ = steps(x, head, RICH, kind)
    x[2, 23, 7, 7] = bad
    scores, step = steps(x, head, RICH, kind)
    assert scores.log_probs[2].isnan().all()
    _, kept = step(-INF, torch.arange(5), sentinels(5, classes))
    assert kept.tolist() == [2]
    others = [0, 1, 3, 4]
    assert all(same_bits(a[others], b[others]) for a, b in zip(scores, before, strict=True))


def test_class_scores_of_statistics_are_those_of_what_ops_statistics_says():
    x = torch.randn(40, 16, 32, 32, generator=generator(0))
    features = ops.statistics(x, RICH)
    for classes in (10, 50):
        means, scale = features[: classes % 40] + 0.1, torch.ones(classes % 40)
        expected = ops.class_scores(features, means, scale, means.mean(0))
        for a, b in zip(ops.class_scores(x, means, scale, means.mean(0), RICH), expected, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("classes", [7, 40])
def test_an_infinite_weight_rules_its_class_out_or_spoils_the_sample(classes):
    x, weight, bias = torch.rand(5, 600) + 0.1, torch.randn(classes, 600), torch.zeros(classes)
    weight[3, 550] = -INF
    x[1, 550], x[2, 550] = -1, 0  # against the infinity: too likely, or no number
    x[4, 20] = 1e25  # whose square is infinite
    got, expected = ops.linear_scores(x, weight, bias), reference.linear_scores(x, weight, bias)
    assert got.log_probs[:, 3].isneginf().tolist() == [True, False, False, True, True]
    assert got.confidence.isnan().tolist() == [False, True, True, False, False]
    torch.testing.assert_close(got.log_probs, expected[2].float(), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_a_class_with_a_bias_of_minus_infinity_is_never_predicted():
    x, weight, bias = torch.rand(9, 8, 4, 4), torch.ones(3, 128), torch.tensor([0.0, -INF, -1.0])
    weight[1] = 100
    scores = ops.linear_scores(x, weight, bias)
    assert (scores.prediction == 0).all()
    assert scores.log_probs[:, 1].eq(-INF).all()
    assert ops.linear_scores(x, weight, torch.full((3,), -INF)).log_probs.isnan().all()


def test_large_batches_are_worked_on_in_parts():
    """More statistics than are made at a time, and more sums."""
    x = torch.randn(700, 100, 4, 4, generator=generator(0))
    wanted = Statistics(mean=(4, 4), rms=(1, 1), pairs=5)
    weight, bias = torch.randn(3, wanted.size(x.shape[1:]), generator=generator(1)) / 30, torch.zeros(3)
    scores = ops.linear_scores(x, weight, bias, wanted)
    for first in (0, 150, 690):
        part = ops.linear_scores(x[first : first + 10], weight, bias, wanted)
        assert all(same_bits(a[first : first + 10], b) for a, b in zip(scores, part, strict=True))
    survivors, kept = ops.linear_step(
        x, weight, bias, float(scores.confidence.median()), torch.arange(700), sentinels(700, 3), wanted
    )
    assert torch.equal(kept, (scores.confidence <= scores.confidence.median()).nonzero().flatten())
    assert same_bits(survivors, x[kept])


@pytest.mark.cpu_only
def test_off_the_cpu_there_are_shapes():
    x = torch.zeros(5, 16, 8, 8, device="meta")
    head = torch.zeros(3, 448, device="meta"), torch.zeros(3, device="meta")
    assert ops.statistics(x, RICH).shape == (5, 448)
    assert [tuple(t.shape) for t in ops.linear_scores(x, *head, RICH)] == [(5,), (5,), (5, 3)]
    assert [tuple(t.shape) for t in ops.class_scores(x, *head, None, RICH)] == [(5,), (5,), (5, 3)]


# ---- pairs on every way into the module ----------------------------------------------------------


@pytest.mark.cpu_only
@pytest.mark.parametrize("shape", [(16, 8, 8), (5, 16), (16,)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_fast_and_the_validated_path_agree_on_pairs(monkeypatch, shape, layout):
    wanted = Statistics(mean=(1, 1), pairs=3, channels=0 if len(shape) == 3 else -1)
    x = laid_out(torch.randn(20, *shape, generator=generator(0)), layout)
    weight, ones = torch.randn(4, wanted.size(shape), generator=generator(1)) / 5, torch.ones(4)
    for kind in ("linear", "means"):
        scores, step = steps(x, (weight, ones), wanted, kind)
        threshold, answers = float(scores.confidence.median()), []
        for way in ("fast", "validated"):
            with monkeypatch.context() as patched:
                if way == "validated":
                    patched.setattr(functional, "_try_linear_step", lambda *_: None)
                    patched.setattr(functional, "_try_exit_step", lambda *_: None)
                out = sentinels(20, 4)
                answers.append((*step(threshold, torch.arange(20), out), *out))
        assert all(same_bits(a, b) for a, b in zip(*answers, strict=True))
        assert 0 < len(answers[0][1]) < 20


@pytest.mark.slow
@pytest.mark.cpu_only
def test_pairs_as_operators_and_compiled():
    torch.compiler.reset()
    x = torch.randn(12, 6, 4, 5, generator=generator(0))
    wanted = Statistics(mean=(2, 2), pairs=3)
    weight, bias = torch.randn(4, wanted.size(x.shape[1:]), generator=generator(1)) / 5, torch.zeros(4)
    e2cm, numbers = torch.ops.e2cm_ext, list(wanted.numbers)
    torch.library.opcheck(e2cm.statistics.default, (x, numbers))
    torch.library.opcheck(e2cm.linear_scores.default, (x, weight, bias, numbers))
    rest = (torch.tensor(0.5), torch.arange(12), *sentinels(12, 4))
    torch.library.opcheck(e2cm.linear_step.default, (x, weight, bias, *rest, numbers, "confidence", 2))

    def scores(x):
        return ops.linear_scores(2 * x, weight, bias, wanted).log_probs, ops.statistics(x, wanted)

    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    for some in (x, x[:5], x.contiguous(memory_format=torch.channels_last)):
        assert all(same_bits(a, b) for a, b in zip(compiled(some), scores(some), strict=True))
    torch.compiler.reset()
