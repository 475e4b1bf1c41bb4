"""Guarantees: the p-values against scipy and against convolution, that they err as seldom as they say, and that a risk
which was promised is kept."""

import functools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.records import random_record
from support.tensors import INF, generator, seeds

from e2cm_ext.calibration import binomial, guarantee
from e2cm_ext.calibration.curves import curve
from e2cm_ext.calibration.guarantee import (
    GuaranteedPoint,
    difference_cdf,
    fixed_sequence_test,
    guaranteed,
    lost_and_gained,
    p_value,
    samples_needed,
)
from e2cm_ext.calibration.record import Record


@pytest.fixture(autouse=True)
def _known_limits(monkeypatch):
    """The same limits are wanted thousands of times here."""
    monkeypatch.setattr(binomial, "upper_limit", functools.cache(binomial.upper_limit))


chances = st.floats(0, 1, allow_subnormal=False)


@given(st.integers(0, 400), st.lists(chances, min_size=1, max_size=3), st.integers(0, 500))
def test_binomial_probabilities_are_scipys(n, p, upto):
    found = binomial.pmf(n, p)
    # scipy overflows at the smallest of all numbers, whose probabilities differ from those of 1e-300 by nothing.
    scipys = np.array([value if value == 0 else max(value, 1e-300) for value in p])
    expected = stats.binom.pmf(np.arange(n + 1), n, scipys[:, None])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(binomial.pmf(n, p[0], upto), expected[0, : upto + 1], rtol=1e-9, atol=1e-13)


@given(st.integers(1, 500), st.data(), st.sampled_from([0.3, 0.05, 0.001]))
def test_upper_limits_are_clopper_s_and_pearson_s(n, data, error):
    k = data.draw(st.integers(0, n))
    expected = 1.0 if k == n else stats.beta.ppf(1 - error, k + 1, n - k)
    assert expected - 1e-12 <= binomial.upper_limit(k, n, error) <= expected + 1e-7


# ---- p-values --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.data(), st.floats(0.001, 0.5))
def test_agreement_is_a_binomial_test(n, data, epsilon):
    lost = data.draw(st.integers(0, n))
    expected = stats.binomtest(lost, n, epsilon, alternative="less").pvalue
    assert p_value(lost, 0, n, epsilon, 0.05, "agreement") == pytest.approx(expected, rel=1e-8, abs=1e-12)


def convolved(difference: int, n: int, epsilon: float, either: float) -> float:
    """P(lost - gained <= difference), sample by sample."""
    one = np.array([(either - epsilon) / 2, 1 - either, (either + epsilon) / 2])
    total = functools.reduce(np.convolve, [one] * n)  # of -n, ..., n
    return total[: max(0, difference + n + 1)].sum()


@given(st.integers(1, 60), st.data(), st.floats(0.001, 0.4), st.floats(0, 1))
def test_the_tail_is_that_of_a_sum(n, data, epsilon, share):
    difference = data.draw(st.integers(-n, n))
    either = epsilon + share * ((1 + epsilon**2) / 2 - epsilon)
    assert difference_cdf(difference, n, epsilon, either) == pytest.approx(
        convolved(difference, n, epsilon, either), abs=1e-10
    )


@given(st.integers(2, 60), st.data(), st.floats(0.01, 0.4), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_tail_is_largest_at_the_corner_that_the_test_takes(n, data, epsilon, share, part, more):
    """The lemma that the test stands on: it grows with the nuisance and shrinks with the risk."""
    highest = math.floor((n - 1) * epsilon) - 1
    difference = data.draw(st.integers(min(-n, highest), highest))
    limit = epsilon + share * ((1 + epsilon**2) / 2 - epsilon)
    either = epsilon + part * (limit - epsilon)
    risk = epsilon + more * (either - epsilon)
    assert convolved(difference, n, risk, either) <= difference_cdf(difference, n, epsilon, limit) + 1e-10


@given(st.integers(1, 60), st.data(), st.floats(0.01, 0.4), st.sampled_from([0.2, 0.05]))
def test_accuracy_is_the_tail_at_the_limit_and_what_the_limit_costs(n, data, epsilon, delta):
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    either = lost + gained
    limit = 1.0 if either == n else stats.beta.ppf(1 - delta / 10, either + 1, n - either)
    if lost - gained + 1 > (n - 1) * epsilon or limit > (1 + epsilon**2) / 2:
        expected = 1.0
    else:
        expected = delta / 10 + (convolved(lost - gained, n, epsilon, limit) if limit > epsilon else 0)
    found = p_value(lost, gained, n, epsilon, delta, "accuracy")
    assert found == pytest.approx(expected, abs=1e-5)


@functools.cache
def rejected(n: int, epsilon: float, delta: float) -> tuple[tuple[int, int], ...]:
    """All (lost, gained) for which the risk is held to be below epsilon."""
    pairs = ((lost, gained) for lost in range(n + 1) for gained in range(n - lost + 1))
    return tuple(pair for pair in pairs if p_value(*pair, n, epsilon, delta, "accuracy") <= delta)


def how_often(pairs, n: int, lost: float, gained: float) -> float:
    """The probability of any of these pairs, if samples are lost and gained with these."""
    b, c = np.array(pairs).T
    return stats.multinomial.pmf(np.stack([b, c, n - b - c], 1), n, [lost, gained, 1 - lost - gained]).sum()


@pytest.mark.parametrize(("n", "epsilon", "delta"), [(40, 0.2, 0.05), (60, 0.06, 0.2), (100, 0.1, 0.1)])
def test_accuracy_is_never_promised_wrongly_more_often_than_said(n, epsilon, delta):
    """Exactly, over all that can happen, for a risk at the boundary and above it and any number of gains."""
    worst = 0.0
    for risk in (epsilon, epsilon + 0.01, 2 * epsilon):
        for gained in (0.0, 0.001, 0.01, 0.03, 0.1, 0.2, 0.35):
            worst = max(worst, how_often(rejected(n, epsilon, delta), n, risk + gained, gained))
    assert delta / 5 < worst <= delta


def test_a_test_that_trusts_what_it_sees_promises_too_often():
    """The same without a confidence limit for the nuisance: so the test above can fail."""
    n, epsilon, delta = 40, 0.2, 0.05
    pairs = [
        (lost, gained)
        for lost in range(n + 1)
        for gained in range(n - lost + 1)
        if convolved(lost - gained, n, epsilon, min(1.0, max(epsilon, (lost + gained) / n))) <= delta
    ]
    assert max(how_often(pairs, n, epsilon + gained, gained) for gained in (0.01, 0.03, 0.1, 0.2)) > 1.1 * delta


@pytest.mark.parametrize("lost, gained", [(0.002, 0.0), (0.006, 0.004), (0.03, 0.03)])
def test_what_is_clearly_safe_passes(lost, gained):
    n, g = 3000, np.random.default_rng(0)
    counts = g.multinomial(n, [lost, gained, 1 - lost - gained], size=60)
    passed = [p_value(int(b), int(c), n, 0.02, 0.05, "accuracy") <= 0.05 for b, c, _ in counts]
    assert sum(passed) >= 54
    assert p_value(int(0.1 * n), 0, n, 0.02, 0.05, "accuracy") == 1


@pytest.mark.parametrize("of", ["accuracy", "agreement"])
def test_how_many_samples_are_needed(of):
    needed = samples_needed(0.0, 0.0, 0.01, 0.05, of)
    assert p_value(0, 0, needed, 0.01, 0.05, of) <= 0.05
    assert p_value(0, 0, needed - needed // 50, 0.01, 0.05, of) > 0.05
    assert math.log(20) / 0.01 - 2 < needed < 1.5 * math.log(20) / 0.01
    assert samples_needed(0.01, 0.0, 0.01, 0.05, of) is None
    assert samples_needed(0.1, 0.8, 0.5, 0.1, "accuracy") is None  # nothing can be shown where so much changes
    assert samples_needed(0.005, 0.0, 0.01, 0.05, of) > needed


# ---- one candidate after the other -----------------------------------------------------------------------------------

SAMPLES, EPSILON, DELTA, RUNS = 400, 0.05, 0.1, 4000


@functools.cache
def p_values() -> np.ndarray:
    """[RUNS, candidates]: two that are safe, then eight just above epsilon, each seen on samples of its own."""
    g = np.random.default_rng(1)
    known: dict[tuple[int, int], float] = {}
    columns = []
    for risk in (0.2 * EPSILON, 0.4 * EPSILON, *[1.001 * EPSILON] * 8):
        counts = g.multinomial(SAMPLES, [risk + 0.01, 0.01, 1 - risk - 0.02], size=RUNS)[:, :2]
        for b, c in set(map(tuple, counts.tolist())) - known.keys():
            known[b, c] = p_value(b, c, SAMPLES, EPSILON, DELTA, "accuracy")
        columns.append([known[b, c] for b, c in counts.tolist()])
    return np.array(columns).T


def test_a_sequence_of_tests_errs_no_more_often_than_one():
    accepted = np.array([len(fixed_sequence_test(row, DELTA)) for row in p_values()])
    assert (accepted > 2).mean() <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / RUNS)
    assert (accepted > 2).mean() > DELTA / 4  # and is no more careful than it must be
    assert (accepted >= 1).mean() > 0.9


def test_taking_the_best_of_those_that_pass_errs_more_often():
    """So the test above can fail."""
    assert (p_values()[:, 2:] <= DELTA).any(1).mean() > 2 * DELTA


# ---- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("of", ["accuracy", "agreement"])
def test_what_is_promised_is_kept(of):
    """On the population that the records are drawn from, but for a share of delta."""
    population = random_record(20_000, 2, seed=3)
    epsilon, delta, runs = 0.04 if of == "accuracy" else 0.3, 0.2, 120
    broken = fired = 0
    for run in range(runs):
        rows = torch.randint(len(population), (600,), generator=generator(run))
        point = guaranteed(population.part(rows), epsilon, delta, of=of, seed=run)
        lost, gained = lost_and_gained(population, point.thresholds, of)
        broken += (lost - gained) / len(population) > epsilon
        fired += point.accepted > 0
    assert broken <= delta * runs + 3 * math.sqrt(delta * (1 - delta) * runs)
    assert fired > runs / 2


def test_the_point_says_what_was_done():
    record = random_record(4000, 3)
    point = guaranteed(record, 0.05, 0.1, seed=5)
    first, second = (record.part(half) for half in torch.randperm(4000, generator=generator(5)).tensor_split(2))
    assert isinstance(point, GuaranteedPoint)
    replay = second.replay(point.thresholds)
    assert (point.flops, point.accuracy) == (replay.flops, replay.accuracy)
    assert point.risk == pytest.approx(float(second.accuracy[-1]) - replay.accuracy)
    assert point.p_value <= 0.1
    assert (point.epsilon, point.delta, point.of, point.samples) == (0.05, 0.1, "accuracy", 2000)
    front = curve(first).front.thresholds.flip(0)
    assert 0 < point.accepted < point.tested == point.accepted + 1 <= len(front)
    assert any(torch.equal(point.thresholds, thresholds) for thresholds in front)
    assert "accuracy lost at most 0.05 with probability 0.9" in str(point)
    daring = guaranteed(record, 0.2, 0.1, seed=5)
    assert daring.flops < point.flops and daring.accepted > point.accepted


@given(seeds)
def test_agreement_needs_no_labels(seed):
    record = random_record(300, 2, seed=seed)
    other = Record(record.confidence, record.prediction, torch.zeros(300, dtype=torch.int64), record.costs)
    with warnings.catch_warnings(action="ignore"):
        a, b = (guaranteed(r, 0.3, 0.1, of="agreement", method="paper") for r in (record, other))
    assert torch.equal(a.thresholds, b.thresholds) and (a.risk, a.p_value) == (b.risk, b.p_value)


@pytest.mark.parametrize(("rows", "epsilon", "help"), [(60, 0.01, "would be needed"), (60, 1e-9, "would not")])
def test_all_exits_are_off_if_nothing_can_be_promised(rows, epsilon, help):
    record = random_record(rows, 3)
    record.prediction[:, -1] = record.label
    with pytest.warns(UserWarning, match=f"all exits are off: of 30 samples .*{help}"):
        point = guaranteed(record, epsilon, 0.05)
    assert point.thresholds.tolist() == [INF] * 3
    assert (point.flops, point.risk, point.p_value, point.accepted, point.tested) == (1.0, 0.0, 0.0, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.05), r"`epsilon` of `risk` is 0\.0"),
        ((0.01, 1), "`delta` of `risk` is 1"),
        ((math.nan, 0.05), "`epsilon` of `risk` is nan"),
    ],
)
def test_risks_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        guaranteed(random_record(50, 2), *arguments)


def test_what_else_makes_no_sense():
    with pytest.raises(ValueError, match="`of` is 'loss'"):
        guaranteed(random_record(50, 2), 0.1, 0.1, of="loss")
    with pytest.raises(ValueError, match="holds 1 samples"):
        guaranteed(random_record(1, 2), 0.1, 0.1)
    with pytest.warns(UserWarning, match="all exits are off"):
        assert guarantee.guaranteed(random_record(50, 0), 0.1, 0.1).thresholds.shape == (0,)
