"""WhitenedMeans: against scikit-learn's linear discriminant analysis on the same statistics, and against itself."""

import copy
import dataclasses
import io
import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import oas as their_oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from support.helpers import (
    INF,
    NAN,
    assert_survivors,
    entropy_of,
    generator,
    same_bits,
    sentinels,
    shuffled_ids,
)
from torch import nn

from e2cm_ext import Decisions, PooledMeans, Statistics, WhitenedMeans
from e2cm_ext.heads import ClassMeans, build, from_config, lda, statistics_of
from e2cm_ext.heads.lda import oas
from e2cm_ext.heads.rules import Rule, as_rule
from e2cm_ext.ops import reference

SHAPE = (6, 7, 5)
STATISTICS = Statistics(mean=(2, 2), rms=(1, 2), max=(2, 1), pairs=3)
CONFIDENCE = as_rule("confidence")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def problem(rows=400, shape=SHAPE, classes=4, seed=0, offset=0.0):
    """Features around class means that are the same for all seeds, and their labels."""
    g = generator(seed)
    labels = torch.randperm(rows, generator=g) % classes
    centers = 0.4 * torch.randn(classes, *shape, generator=generator(99))
    return centers[labels] + torch.randn(rows, *shape, generator=g) + offset, labels


def fit(head, *batches):
    for x, labels in batches:
        head.update(x, labels, 0)
    head.finish(0)
    return head


def head_of(x, classes=4, **options):
    """The discriminant itself."""
    return WhitenedMeans(classes, x.shape[1:], **({"mean_shrinkage": 0.0, "temperature": 1.0} | options))


def in_batches(x, labels, cuts):
    """Cut there; empty batches among them."""
    edges = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
    return [(x[a:b], labels[a:b]) for a, b in itertools.pairwise(edges)]


def looked_at(x, statistics=STATISTICS):
    return reference.statistics(x.double(), statistics)


def within(rows, labels):
    """Deviations of rows from the means of their classes."""
    return torch.cat([rows[labels == k] - rows[labels == k].mean(0) for k in labels.unique()])


def by_sklearn(rows, labels, shrinkage):
    """What it says about rows: function -> log-probabilities. Standardised by hand, as it shrinks towards the identity
    times one number."""
    scale = within(rows, labels).square().mean(0).sqrt().numpy()
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(rows.numpy() / scale, labels.numpy())
    return lambda rows: torch.from_numpy(model.predict_log_proba(rows.numpy() / scale))


def by_hand(rows, labels, classes, shrinkage, ridge=lda.RIDGE):
    """The same function by the formula of the docstring, in float64."""
    deviations = within(rows, labels)
    scale = (deviations.square().mean(0) + ridge * rows.var(0, correction=0)).sqrt()
    correlations = (1 - shrinkage) * (deviations / scale).T @ (deviations / scale) / len(rows)
    covariance = scale[:, None] * scale * correlations.fill_diagonal_(1)
    counts = labels.bincount(minlength=classes).double()
    means = torch.stack([rows[labels == k].mean(0) for k in range(classes)])

    def log_probs(rows):
        apart = rows[:, None] - means
        squares = (apart * torch.linalg.solve(covariance, apart.flatten(0, 1).T).T.view_as(apart)).sum(2)
        return (counts.log() - squares / 2).log_softmax(1)

    return log_probs


def assert_close(got, expected, error=1e-5):
    torch.testing.assert_close(got.double(), expected.double(), rtol=error, atol=error)


def assert_same_weights(got, expected, error=1e-5):
    """Of weights, relative to the largest: a small one is the difference of large ones."""
    assert_close(got.weight / expected.weight.abs().max(), expected.weight / expected.weight.abs().max(), error)
    assert_close(got.bias, expected.bias, 10 * error)
    assert torch.equal(got.counts, expected.counts)


# ---- what is learned ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shrinkage", "error"), [(0.0, 2e-2), (0.03, 5e-4), (1.0, 1e-4)])
@pytest.mark.parametrize("sizes", ["equal", "different"])
def test_it_is_linear_discriminant_analysis(shrinkage, error, sizes):
    """Where nothing else holds statistics apart that say the same, that is the little that is added to variances."""
    x, labels = problem(1000)
    if sizes == "different":
        some = (labels > 0) | (torch.arange(1000) % 5 == 0)
        x, labels = x[some], labels[some]
    fresh, _ = problem(seed=1)
    head = fit(head_of(x, statistics=STATISTICS, shrinkage=shrinkage), (x, labels))
    wanted = by_sklearn(looked_at(x), labels, shrinkage)(looked_at(fresh))
    assert_close(head(fresh), wanted, error)
    assert_close(head(fresh), by_hand(looked_at(x), labels, 4, shrinkage)(looked_at(fresh)), 2e-4)
    assert_close(by_hand(looked_at(x), labels, 4, shrinkage, ridge=0)(looked_at(fresh)), wanted, 1e-9)


@pytest.mark.parametrize(("samples", "size"), [(50, 10), (20, 60), (1000, 3)])
def test_shrinkage_is_that_of_scikit_learn(samples, size):
    rows = torch.randn(samples, size, generator=generator(0), dtype=torch.float64)
    rows = rows @ torch.randn(size, size, generator=generator(1), dtype=torch.float64)
    _, expected = their_oas(rows.numpy(), assume_centered=True)
    assert oas(rows.T @ rows / samples, samples) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rows", [30, 100, 2000])
def test_a_fit_shrinks_by_as_much(rows):
    """Fewer samples than statistics (66), and more."""
    x, labels = problem(rows)
    deviations = within(looked_at(x), labels)
    _, shrinkage = their_oas((deviations / deviations.square().mean(0).sqrt()).numpy(), assume_centered=True)
    assert_same_weights(
        fit(head_of(x, statistics=STATISTICS), (x, labels)),
        fit(head_of(x, statistics=STATISTICS, shrinkage=shrinkage), (x, labels)),
        1e-4,
    )
    assert 0 < shrinkage < 1


# Seen: 2e-4 and 2e-2. At 10^4 an average is rounded by a thousandth of what it varies by.
@pytest.mark.parametrize(("offset", "error"), [(1e2, 5e-4), (1e4, 5e-2)])
@pytest.mark.parametrize("statistics", [Statistics(mean=(2, 2)), Statistics(mean=(2, 2), max=(2, 2))])
def test_a_large_shared_offset(offset, error, statistics):
    x, labels = problem(1000, offset=offset)
    fresh, _ = problem(seed=1, offset=offset)
    head = fit(head_of(x, statistics=statistics, shrinkage=0.05), *zip(x.split(64), labels.split(64), strict=True))
    expected = by_hand(looked_at(x, statistics), labels, 4, 0.05)(looked_at(fresh, statistics))
    assert (head(fresh) - expected).abs().max() < error


def test_squares_at_a_large_shared_offset():
    """Root mean squares and pairs are then the means once more, with what float32 leaves of the differences."""
    x, labels = problem(1000, offset=1e4)
    fresh, truth = problem(seed=1, offset=1e4)
    right = {}
    for name, statistics in (("means", Statistics(mean=(2, 2))), ("all", STATISTICS)):
        head = fit(head_of(x, statistics=statistics), (x, labels))
        right[name] = (head(fresh).argmax(1) == truth).double().mean().item()
    assert right["all"] > right["means"] - 0.03


@given(
    rows=st.integers(12, 80),
    cuts=st.lists(st.integers(0, 80), max_size=5),
    offset=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_any_batches_in_any_order_give_the_same(rows, cuts, offset, seed):
    x, labels = problem(rows, seed=seed, offset=offset)
    statistics = Statistics(mean=(2, 2), max=(1, 1))
    expected = fit(head_of(x, statistics=statistics, shrinkage=0.2), (x, labels))
    order = torch.randperm(rows, generator=generator(seed))
    head = fit(head_of(x, statistics=statistics, shrinkage=0.2), *in_batches(x[order], labels[order], cuts))
    assert_same_weights(head, expected)


def test_more_than_is_summed_at_a_time(monkeypatch):
    x, labels = problem()
    expected = fit(head_of(x, statistics=STATISTICS), (x, labels))
    for rows, columns in ((7, 256), (512, 5), (1, 66), (100, 65)):
        monkeypatch.setattr(lda, "_CHUNK_ROWS", rows)
        monkeypatch.setattr(lda, "_BLOCK_COLUMNS", columns)
        assert_same_weights(fit(head_of(x, statistics=STATISTICS), *in_batches(x, labels, [30, 300])), expected)


def test_whoever_made_the_labels_may_write_into_them():
    x, labels = problem()
    expected = fit(head_of(x), (x, labels))
    head, buffer = head_of(x), labels.clone()
    head.update(x, buffer, 0)
    buffer.zero_()
    head.finish(0)
    assert_same_weights(head, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_features(dtype):
    x, labels = problem()
    x = x.to(dtype)
    got, expected = (fit(head_of(x, statistics=STATISTICS), (some, labels)) for some in (x, x.float()))
    assert got.weight.dtype is got.bias.dtype is torch.float32
    assert_same_weights(got, expected)
    assert_close(got(x), expected(x.float()))


@pytest.mark.parametrize("statistics", [None, STATISTICS])
def test_channels_last_makes_no_difference(statistics):
    x, labels = problem()
    last = x.contiguous(memory_format=torch.channels_last)
    heads = [fit(head_of(x, statistics=statistics), (some, labels)) for some in (x, last)]
    for a, b in itertools.product(heads, (x, last)):
        assert same_bits(a(b), heads[0](x))


@pytest.mark.parametrize("shape", [(7,), (1,), (9, 6), (1, 5), (6, 1, 1), (6, 1, 3), (1, 8, 8)])
def test_vectors_tokens_and_small_maps(shape):
    x, labels = problem(600, shape)
    head = fit(head_of(x, shrinkage=0.1), (x, labels))
    fresh, truth = problem(600, shape, seed=1)
    assert_close(
        head(fresh), by_hand(looked_at(x, head.statistics), labels, 4, 0.1)(looked_at(fresh, head.statistics)), 1e-3
    )
    if math.prod(shape) > 5:
        assert (head(fresh).argmax(1) == truth).double().mean() > 0.4


# ---- statistics and classes that say nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4, 1e-30])
@pytest.mark.parametrize("noise", [0, 1e-7])
@pytest.mark.parametrize("batch", [1, 33, 400])
def test_a_dead_channel_tells_nothing(constant, noise, batch):
    """Not even where it is another number later on: its weight is 0."""
    x, labels = problem()
    statistics = Statistics(mean=(2, 2), rms=(1, 1), max=(1, 1))
    x[:, 2] = constant * (1 + noise * x[:, 2])
    head = fit(head_of(x, statistics=statistics, shrinkage=0.1), *zip(x.split(batch), labels.split(batch), strict=True))
    alive = [c for c in range(6) if c != 2]
    expected = fit(head_of(x[:, alive], statistics=statistics, shrinkage=0.1), (x[:, alive], labels))
    assert_close(head(x), expected(x[:, alive]), 1e-4)
    assert torch.equal((head.weight == 0).all(0), looked_at(x, statistics).std(0) <= 1e-6 * abs(constant))
    elsewhere = x.clone()
    elsewhere[:, 2] += 1
    assert_close(head(elsewhere), head(x), 1e-4)


def test_a_statistic_that_tells_the_classes_apart_by_itself():
    """It is the same within every class: an infinite weight would be right, and useless."""
    x, labels = problem(shape=(5,))
    x[:, 3] = labels.float()
    head = fit(head_of(x), (x, labels))
    assert head.weight.isfinite().all()
    assert torch.equal(head(x).argmax(1), labels)


def test_nothing_but_constants():
    x, labels = torch.full((8, *SHAPE), 3.0), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    head = fit(WhitenedMeans(2, SHAPE), (x, labels))
    assert_close(head(torch.randn(5, *SHAPE)), torch.tensor([[0.75, 0.25]]).log().expand(5, 2))


def test_a_class_without_samples_is_never_predicted():
    x, labels = problem()
    head = fit(head_of(x, 7), (x, labels + 1))
    expected = fit(head_of(x), (x, labels))
    assert head.counts.tolist() == [0, *[100] * 4, 0, 0]
    log_probs = head(x)
    assert log_probs[:, [0, 5, 6]].isneginf().all()
    assert_close(log_probs[:, 1:5], expected(x))


def test_one_class():
    x, labels = problem(classes=1)
    head = fit(head_of(x, 1), (x, labels))
    assert torch.equal(head(x), torch.zeros(400, 1))
    assert_close(fit(head_of(x, 3), (x, labels + 1))(x).exp(), torch.tensor([[0.0, 1, 0]]).expand(400, 3))


@pytest.mark.parametrize("shape", [(30,), SHAPE, (1,)])
def test_one_sample_per_class(shape):
    x, labels = problem(4, shape)
    head = fit(head_of(x), (x, labels))
    assert head.weight.isfinite().all()
    assert torch.equal(head(x).argmax(1), labels)


def test_means_are_pulled_by_what_is_chance():
    """Means of n samples of d numbers with variance 1 are sqrt(d / n) away from where they should be."""
    squares, counts = torch.tensor([30.0, 50.0, 7.0]).double(), torch.tensor([10, 40, 0])
    assert lda.james_stein_shrinkage(squares, counts, 20) == pytest.approx((20 / 10 + 20 / 40) / 80)
    assert lda.james_stein_shrinkage(squares, counts, 10_000) == 0.9
    assert lda.james_stein_shrinkage(torch.zeros(3).double(), counts, 20) == 0.0


def test_a_pulled_head_is_one_with_means_nearer_to_their_middle():
    x, labels = problem(240)
    plain = fit(head_of(x, statistics=STATISTICS, shrinkage=0.1), (x, labels))
    pulled = fit(head_of(x, statistics=STATISTICS, shrinkage=0.1, mean_shrinkage=0.25), (x, labels))
    assert_close(pulled.weight, 0.75 * plain.weight)
    # A score at the middle of all means is half the squared length that is left of a class's mean, and its prior.
    rows = looked_at(x)
    middle = torch.stack([rows[labels == k].mean(0) for k in range(4)]).mean(0).float()
    at_middle, prior = plain.bias + plain.weight @ middle, labels.bincount().div(240).log()
    assert_close(pulled.bias + pulled.weight @ middle, prior + 0.75**2 * (at_middle - prior), 1e-4)


def test_few_samples_are_pulled_and_that_helps():
    """Many classes, few samples of each: nearer to the truth, by the likelihood of new samples."""
    x, labels = problem(240, classes=12)
    fresh, their = problem(600, classes=12, seed=1)
    losses = []
    for mean_shrinkage in (0.0, None):
        head = fit(head_of(x, 12, statistics=STATISTICS, mean_shrinkage=mean_shrinkage), (x, labels))
        losses.append(torch.nn.functional.nll_loss(head(fresh), their))
    assert losses[1] < losses[0] - 0.1


def test_temperature_keeps_confidences_apart():
    """At a mean it is 16 nats to the next class, on average, where it would be more; predictions stay."""
    x, labels = problem()
    far = x + 6 * torch.randn(4, *SHAPE, generator=generator(3))[labels]
    cold = fit(head_of(far, statistics=STATISTICS), (far, labels))
    warm = fit(head_of(far, statistics=STATISTICS, temperature=None), (far, labels))
    assert torch.equal(cold(far).argmax(1), warm(far).argmax(1))
    rows = looked_at(far).float()
    means = torch.stack([rows[labels == k].mean(0) for k in range(4)])

    def nats(head):
        scores = means @ head.weight.T + head.bias - labels.bincount().div(400).log()
        own = scores.diagonal().clone()
        return float((own - scores.fill_diagonal_(-INF).amax(1)).mean())

    assert nats(cold) > 20
    assert nats(warm) == pytest.approx(16, rel=1e-3)
    near = fit(head_of(x, statistics=STATISTICS), (x, labels))
    assert nats(near) < 16
    assert_same_weights(fit(head_of(x, statistics=STATISTICS, temperature=None), (x, labels)), near)
    assert_close(4 * fit(head_of(x, temperature=4.0), (x, labels)).weight, fit(head_of(x), (x, labels)).weight)


@pytest.mark.parametrize("shrinkage", [None, 0.0])
def test_statistics_that_are_sums_of_others(shrinkage):
    """Fewer samples than statistics: their covariance has no inverse, but for what is done about it."""
    x, labels = problem(40)
    fresh, truth = problem(seed=1)
    head = fit(head_of(x, statistics=STATISTICS, shrinkage=shrinkage), (x, labels))
    assert (head(fresh).argmax(1) == truth).double().mean() > 0.3
    assert head(fresh).isfinite().all()


def test_an_unfitted_head_lets_nobody_go():
    x, _ = problem(9)
    head = head_of(x)
    assert not head.fitted
    assert head(x).isnan().all()
    assert len(head.step(x, -INF, torch.arange(9), Decisions.empty(9), rule=CONFIDENCE, exit=0)[0]) == 9


# ---- wrong batches, interrupted fits -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e25])  # of 1e25 the square is infinite
@pytest.mark.parametrize("first", [True, False])
def test_features_that_are_not_finite_leave_no_trace(bad, first):
    x, labels = problem()
    head = head_of(x, statistics=STATISTICS)
    if not first:
        head.update(x[:50], labels[:50], 0)
    spoiled = x.clone()
    spoiled[37, 1, 2, 3] = bad
    with pytest.raises(ValueError, match="in sample 37 of the batch"):
        head.update(spoiled, labels, 0)
    with pytest.raises(ValueError, match="`labels` go from 0 to 4"):
        head.update(x, labels + (labels == 3), 0)
    start = 0 if first else 50
    fit(head, (x[start:], labels[start:]))
    batches = [(x, labels)] if first else in_batches(x, labels, [50])
    expected = fit(head_of(x, statistics=STATISTICS), *batches)
    assert same_bits(head.weight, expected.weight)
    assert same_bits(head.bias, expected.bias)
    assert torch.equal(head.counts, expected.counts)


@pytest.mark.parametrize("how", ["second fit", "reset"])
def test_what_was_before_leaves_no_trace(how):
    x, labels = problem()
    expected = fit(head_of(x), (x, labels))
    head = head_of(x)
    head.update(x + 5, labels, 0)
    if how == "reset":
        head.reset()
    else:
        head.finish(0)
    fit(head, (x, labels))
    assert same_bits(head.weight, expected.weight)
    assert same_bits(head.bias, expected.bias)
    assert torch.equal(head.counts, expected.counts)


def test_no_sample_at_all():
    with pytest.raises(ValueError, match="no sample in pass 0"):
        WhitenedMeans(2, SHAPE).finish(0)
    head = WhitenedMeans(2, SHAPE)
    head.update(torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="no sample in pass 0"):
        head.finish(0)


def test_a_fit_in_inference_mode_can_go_on_outside_of_it():
    x, labels = problem()
    expected = fit(head_of(x), *in_batches(x, labels, [100]))
    head = head_of(x)
    with torch.inference_mode():
        head.update(x[:100] * 1, labels[:100] * 1, 0)
    head.update(x[100:].requires_grad_(), labels[100:], 0)
    head.finish(0)
    assert same_bits(head.weight, expected.weight)
    assert not head(x.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"shrinkage": 1.5}, ValueError, "`shrinkage` is 1.5; wanted a number from 0 to 1, or None"),
        ({"shrinkage": NAN}, ValueError, "`shrinkage` is nan"),
        ({"mean_shrinkage": -0.1}, ValueError, "`mean_shrinkage` is -0.1; wanted a number from 0 to 1, or None"),
        ({"temperature": 0.0}, ValueError, "`temperature` is 0.0; wanted a number above 0, or None"),
        ({"statistics": (1, 1)}, TypeError, "`statistics` is a tuple; wanted e2cm_ext.Statistics or None"),
        ({"statistics": {"color": 1}}, ValueError, "`statistics` is .*color"),
        ({"statistics": Statistics(mean=(8, 1))}, ValueError, r"`mean` is \(8, 1\).*7 x 5"),
        ({"statistics": Statistics(pairs=4)}, ValueError, r"`pairs` is 4.*6 channels.*at most 3"),
    ],
)
def test_wrong_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        WhitenedMeans(4, SHAPE, **arguments)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 4, 5, 6)])
def test_shapes_that_it_does_not_know(shape):
    with pytest.raises(ValueError, match=rf"`feature_shape` has {len(shape)} axes.*use class_means"):
        WhitenedMeans(4, shape)
    with pytest.raises(ValueError, match=f"a sample of shape .{shape[0]}.*has no map"):
        WhitenedMeans(4, shape, statistics=Statistics(mean=(1, 1)))


# ---- merging, processes ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 120), min_size=1, max_size=3), st.sampled_from([0.0, 30.0]), st.integers(0, 1000))
def test_parts_merged_are_the_whole(cuts, offset, seed):
    """Parts without a sample among them; every part has an origin of its own."""
    x, labels = problem(120, seed=seed, offset=offset)
    x += 5 * (torch.arange(120) // 40).view(-1, 1, 1, 1)
    options = {"statistics": Statistics(mean=(2, 2), max=(1, 1)), "shrinkage": 0.2}
    expected = fit(head_of(x, **options), (x, labels))
    first, *others = (head_of(x, **options) for _ in range(len(cuts) + 1))
    for head, batch in zip((first, *others), in_batches(x, labels, cuts), strict=True):
        head.update(*batch, 0)
    for other in others:
        before = copy.deepcopy(other)
        first.merge(other)
        if before._label_counts is not None and before._label_counts.any():
            assert same_bits(fit(other).weight, fit(before).weight)
    first.finish(0)
    assert_same_weights(first, expected)


def test_merging_takes_copies():
    x, labels = problem()
    whole, part = head_of(x), head_of(x)
    part.update(x[:100], labels[:100], 0)
    whole.merge(part)
    part.update(x[100:], labels[100:], 0)
    assert_same_weights(fit(whole), fit(head_of(x), (x[:100], labels[:100])))
    assert_same_weights(fit(part), fit(head_of(x), (x, labels)))


def test_what_cannot_be_merged():
    x, _ = problem(9)
    head = head_of(x)
    for other in (head_of(x, 5), head_of(x, shrinkage=0.5), head_of(x, statistics=STATISTICS), PooledMeans(4, SHAPE)):
        with pytest.raises(ValueError, match=r"`other` is .*Means\(.*; wanted another WhitenedMeans\("):
            head.merge(other)


def one_process(rank, file, x, labels, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    results = []
    for first in (150, 0):  # the second time, process 0 has nothing at all
        mine = slice(0, first) if rank == 0 else slice(first, None)
        head = head_of(x, statistics=STATISTICS)
        if len(x[mine]):
            head.update(x[mine], labels[mine], 0)
        head.finish(0)
        results.append({name: t.numpy().copy() for name, t in head.state_dict().items()})
    queue.put((rank, results))
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path):
    x, labels = problem(offset=3.0)
    labels = labels.sort().values  # the processes have seen other classes
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (str(tmp_path / "meeting"), x, labels, queue)
    processes = [context.Process(target=one_process, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = fit(head_of(x, statistics=STATISTICS), (x, labels))
    for one, other in zip(results[0], results[1], strict=True):
        assert one.keys() == other.keys() == expected.state_dict().keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
        head = head_of(x, statistics=STATISTICS)
        head.load_state_dict({name: torch.from_numpy(value) for name, value in one.items()})
        assert_same_weights(head, expected)


# ---- answers -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Margin(Rule):
    name = "margin"

    def certainty(self, log_probs):
        first, second = log_probs.exp().topk(2, dim=1).values.unbind(1)
        return first - second


RULES = [CONFIDENCE, as_rule("entropy"), Margin()]


@pytest.mark.parametrize("the_rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("statistics", [None, STATISTICS])
def test_a_step_is_forward_and_the_rule(the_rule, last, statistics):
    x, labels = problem(offset=1.0)
    head = fit(head_of(x, statistics=statistics), (x, labels))
    x, _ = problem(200, seed=1, offset=1.0)
    x[[3, 50]] = NAN
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    log_probs, (certainty, prediction) = head(x), head.score(x, the_rule)
    expected = reference.linear_scores(x.double(), head.weight.double(), head.bias.double(), head.statistics)[2]
    assert_close(log_probs.nan_to_num(), expected.nan_to_num(), 1e-4)
    assert torch.equal(log_probs.isnan().all(1), expected.isnan().all(1))
    assert certainty[[3, 50]].isnan().all()
    ordered = certainty[certainty.isfinite()].sort().values
    for threshold in (-INF, ((ordered[30] + ordered[31]) / 2).item(), INF):
        ids, out, wanted = shuffled_ids(200, 250), sentinels(250, 4), sentinels(250, 4)
        survivors, kept = head.step(x, threshold, ids, out, rule=the_rule, exit=7)
        leaves = certainty > threshold
        assert (leaves.sum() in (0, 198)) == math.isinf(threshold)
        assert_survivors(survivors, kept, x, ids, ~leaves)
        at = ids[leaves]
        wanted.prediction[at], wanted.exit[at] = prediction[leaves], 7
        wanted.log_probs[at], wanted.confidence[at] = log_probs[leaves], log_probs[leaves].amax(1).exp()
        if the_rule is CONFIDENCE:  # the same bits, by which it was decided
            assert same_bits(out.confidence[at], certainty[leaves])
        if not isinstance(the_rule, Margin):
            by_reference = sentinels(250, 4)
            limit = the_rule.limit(threshold)
            reference.linear_step(
                x.double(), head.weight.double(), head.bias.double(), limit, ids, by_reference, head.statistics,
                rule=the_rule.name, exit=7,
            )  # fmt: skip
            assert torch.equal(by_reference.exit, out.exit)
            assert torch.equal(by_reference.prediction, out.prediction)
        for name in ("prediction", "exit"):
            assert torch.equal(getattr(out, name), getattr(wanted, name))
        assert_close(out.confidence, wanted.confidence)
        assert_close(out.log_probs, wanted.log_probs)
    if the_rule.name == "entropy":
        assert_close(certainty.nan_to_num(), -entropy_of(log_probs).nan_to_num(), 1e-4)


def test_an_answer_depends_on_nobody_else():
    x, labels = problem()
    head = fit(head_of(x), (x, labels))
    together = head(x)
    assert all(same_bits(head(x[i : i + 1]), together[i : i + 1]) for i in range(0, 400, 37))
    assert head(x[:0]).shape == (0, 4)


def test_flops():
    assert WhitenedMeans(10, SHAPE, statistics=STATISTICS).flops() == (1 + 2 + 1 + 2 * 3) * 210 + 2 * 10 * 66
    assert WhitenedMeans(10, (64,)).flops() == 64 + 2 * 10 * 64


# ---- keeping and moving ------------------------------------------------------------------------------------------


def assert_same_head(got, expected, x):
    assert type(got) is type(expected)
    assert got.config() == expected.config()
    assert got.fitted == expected.fitted
    assert same_bits(got(x), expected(x))
    for name, buffer in expected.named_buffers():
        assert same_bits(dict(got.named_buffers())[name], buffer), name


@pytest.mark.parametrize("options", [{}, {"statistics": STATISTICS, "shrinkage": 0.25}])
def test_keeping_a_head(options):
    x, labels = problem()
    head = fit(head_of(x, **options), (x, labels))
    assert_same_head(copy.deepcopy(head), head, x)
    assert_same_head(pickle.loads(pickle.dumps(head)), head, x)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    fresh = from_config(json.loads(json.dumps(head.config())))
    assert not fresh.fitted
    fresh.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert_same_head(fresh, head, x)
    assert repr(fresh) == repr(head)
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)):
        assert_same_head(cast(nn.Sequential(copy.deepcopy(head)))[0], head, x)
    assert_close(head.half()(x.half()), head(x.half().float()), 1e-4)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        WhitenedMeans(5, SHAPE, **options).load_state_dict(head.state_dict())


def test_sums_are_gone_after_a_fit():
    assert fit(WhitenedMeans(4, SHAPE), problem())._scatter is None


def test_a_copy_in_the_middle_of_a_fit():
    x, labels = problem()
    head = head_of(x)
    head.update(x[:100], labels[:100], 0)
    assert set(head.state_dict()) == {"counts", "weight", "bias", "_extra_state"}
    other = copy.deepcopy(head)
    head.update(x[100:200] + 9, labels[100:200], 0)
    assert_same_weights(fit(other, (x[100:], labels[100:])), fit(head_of(x), (x, labels)))


def test_to_another_device():
    head = WhitenedMeans(6, SHAPE).to("meta")
    assert {buffer.device.type for buffer in head.buffers()} == {"meta"}
    assert head.to_empty(device="cpu").weight.dtype is torch.float32


def test_compiled():
    torch.compiler.reset()
    x, labels = problem()
    head = fit(head_of(x), (x, labels))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for some in (x, x[:7], x.contiguous(memory_format=torch.channels_last)):
        assert same_bits(compiled(some), head(some))


# ---- which statistics, which head --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((100,), Statistics(mean=(1, 1))),
        ((100, 1, 1), Statistics(mean=(1, 1))),
        ((197, 192), Statistics(mean=(1, 1), pairs=5, channels=-1)),
        ((5, 3), Statistics(mean=(1, 1), pairs=2, channels=-1)),
        ((16, 32, 32), Statistics(mean=(4, 4), rms=(4, 4), max=(4, 4), pairs=8)),
        ((32, 16, 16), Statistics(mean=(4, 4), rms=(2, 2), max=(2, 2), pairs=12)),
        ((64, 8, 8), Statistics(mean=(4, 4), pairs=12)),
        ((128, 2, 1), Statistics(mean=(2, 1), pairs=8)),
        ((512, 7, 7), Statistics(mean=(1, 1), pairs=2)),
        ((2048, 7, 7), Statistics(mean=(1, 1))),
        ((3, 2, 9), Statistics(mean=(2, 4), rms=(2, 4), max=(2, 4), pairs=2)),
    ],
)
def test_the_statistics_that_are_chosen(shape, expected):
    assert statistics_of(shape) == expected == WhitenedMeans(3, shape).statistics
    turned = (*shape[1:], shape[0]) if expected.channels == 0 else (shape[1], shape[0])
    other = 0 if len(shape) == 2 else -1
    assert statistics_of(turned, channels=other) == dataclasses.replace(expected, channels=other)
    with pytest.raises(ValueError, match="`channels` is 1; wanted 0"):
        statistics_of(shape, channels=1)


def test_the_choice_is_of_a_moderate_size():
    sizes = [statistics_of((channels, 14, 14)).size((channels, 14, 14)) for channels in range(1, 2049)]
    assert max(sizes) <= 2560
    assert all(size >= 384 for size in sizes[7:])


def test_it_is_known_by_name_where_it_suits():
    shapes = [(16, 8, 8), (7, 5), (4096,), (4097,), (3, 4, 5, 6)]
    assert [type(head) for head in build("whitened_means", 4, shapes)] == [*[WhitenedMeans] * 3, *[ClassMeans] * 2]
    assert build(WhitenedMeans, 4, [(5000,)])[0].weight.shape == (4, 5000)
    with pytest.raises(ValueError, match="has 4 axes"):
        build(WhitenedMeans, 4, [(3, 4, 5, 6)])
