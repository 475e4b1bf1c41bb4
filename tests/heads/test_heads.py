"""Heads: what they learn, against numpy; the stream, merging, processes; keeping and moving them."""

import copy
import functools
import io
import itertools
import json
import math
import pickle
import textwrap
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from support.distributed import heads_of_two_processes
from support.tensors import FORMATS, INF, NAN, assert_same_decisions, generator, same_bits, sentinels, shuffled_ids
from torch import nn

from e2cm_ext import Decisions, ops
from e2cm_ext.heads import ClassMeans, Head, PooledMeans, WhitenedMeans, all_reduce_sum, build, class_means, from_config
from e2cm_ext.heads.rules import Rule, as_rule

CONFIDENCE = as_rule("confidence")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def problem(rows=90, shape=(3, 4, 5), classes=6, seed=0, offset=0.0):
    """Features around class means, and their labels, class 0 first: with batches in that order, every batch differs."""
    g = generator(seed)
    labels = torch.arange(rows) % classes
    labels = labels.sort().values
    means = torch.randn(classes, *shape, generator=g)
    return means[labels] + torch.randn(rows, *shape, generator=g) + offset, labels


def fit(head, *batches):
    """head, fitted on (x, labels) batches."""
    for pass_index in range(head.passes):
        for x, labels in batches:
            head.update(x, labels, pass_index)
        head.finish(pass_index)
    return head


def in_batches(x, labels, *sizes):
    return list(zip(x.split(list(sizes)), labels.split(list(sizes)), strict=True))


def by_numpy(x, labels, classes):
    """Means, the mean distance of ALL samples to each (equation 4), the root of the mean square distance, in double."""
    x, labels = x.double().flatten(1).numpy(), labels.numpy()
    means = np.stack([x[labels == k].mean(0) for k in range(classes)])
    distances = cdist(x, means)
    return tuple(map(torch.from_numpy, (means, distances.mean(0), np.sqrt((distances**2).mean(0)))))


def assert_close(got, expected, error=1e-6):
    torch.testing.assert_close(got.double(), expected.double(), rtol=error, atol=error)


# ---- what is learned ---------------------------------------------------------------------------------------------


def test_means_and_scales_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 7.0]])
    labels = torch.tensor([0, 0, 1])
    # Means (1, 0) and (1, 7). Distances to the first 1, 1, 7; to the second sqrt(50), sqrt(50), 0: over all three.
    head = fit(ClassMeans(2, (2,)), (x, labels))
    assert head.means.tolist() == [[1, 0], [1, 7]]
    assert head.scale.tolist() == pytest.approx([3, 2 * math.sqrt(50) / 3])
    assert head.center.tolist() == [1, 3.5]
    assert head.counts.tolist() == [2, 1]
    squares = fit(ClassMeans(2, (2,), passes=1), (x, labels))
    assert squares.means.tolist() == [[1, 0], [1, 7]]
    assert squares.scale.tolist() == pytest.approx([math.sqrt((1 + 1 + 49) / 3), math.sqrt(100 / 3)])


def test_the_answer_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 7.0]])
    head = fit(ClassMeans(2, (2,)), (x, torch.tensor([0, 0, 1])))
    # At (1, 3): distances 3 and 4, over 3 and 4.714.
    logits = torch.tensor([[-1.0, -4 / (2 * math.sqrt(50) / 3)]])
    assert_close(head(torch.tensor([[1.0, 3.0]])), logits.log_softmax(1))


@pytest.mark.parametrize("shape", [(1,), (17,), (5, 7), (3, 4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("last", [False, True])
def test_against_numpy(shape, last):
    x, labels = problem(shape=shape)
    if last and x.dim() in FORMATS:
        x = x.contiguous(memory_format=FORMATS[x.dim()])
    means, scale, rms = by_numpy(x, labels, 6)
    for passes, expected in ((2, scale), (1, rms)):
        head = fit(ClassMeans(6, shape, passes=passes), (x, labels))
        assert head.means.shape == (6, *shape)
        assert_close(head.means.flatten(1), means)
        assert_close(head.center.flatten(), means.mean(0))
        assert_close(head.scale, expected)
        assert head.counts.tolist() == [15] * 6
        assert_close(head(x), (-torch.from_numpy(cdist(x.double().flatten(1), means)) / expected).log_softmax(1), 1e-5)


@given(
    rows=st.integers(6, 60),
    classes=st.integers(1, 6),
    shape=st.sampled_from([(7,), (3, 5), (3, 2, 4)]),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_batches_in_any_order_give_the_same(rows, classes, shape, cuts, last, seed):
    x, labels = problem(rows, shape, classes, seed)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = by_numpy(x, labels, classes)
    order = torch.randperm(rows, generator=generator(seed))
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]  # empty batches among them
    batches = [(x[order[a:b]], labels[order[a:b]]) for a, b in itertools.pairwise(edges)]
    for passes in (1, 2):
        head = fit(ClassMeans(classes, shape, passes=passes), *batches)
        assert_close(head.means.flatten(1), expected[0], 1e-5)
        assert_close(head.scale, expected[3 - passes], 1e-5)


@pytest.mark.parametrize("passes", [1, 2])
def test_batches_larger_than_what_is_summed_at_a_time(monkeypatch, passes):
    x, labels = problem(shape=(10,))
    expected = by_numpy(x, labels, 6)
    for few in (1, 7, 64):
        monkeypatch.setattr(class_means, "_FLOAT64_NUMBERS", 10 * few + 5)
        monkeypatch.setattr(class_means, "_FLOAT32_ROWS", few)
        head = fit(ClassMeans(6, (10,), passes=passes), (x, labels))
        assert_close(head.means, expected[0])
        assert_close(head.scale, expected[3 - passes])


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_large_offset_costs_no_accuracy(offset):
    x, labels = problem(shape=(64,), offset=offset)
    means, scale, rms = by_numpy(x, labels, 6)
    for passes, expected in ((2, scale), (1, rms)):
        head = fit(ClassMeans(6, (64,), passes=passes), *in_batches(x, labels, 30, 60))
        torch.testing.assert_close(head.means.double(), means, rtol=1e-7 if passes == 1 else 2e-7, atol=0)
        torch.testing.assert_close(
            head.scale.double(), expected, rtol=2e-4 if offset > 1e3 and passes == 2 else 1e-6, atol=0
        )


@pytest.mark.parametrize(("passes", "sizes"), [(1, [2001]), (1, [1] * 2001), (2, [1] * 2001), (2, [2001])])
def test_sums_do_not_stay_where_float32_would(passes, sizes):
    # 2^24 + 1 is no float32: added one by one to 2^24, ones change nothing.
    x = torch.cat([torch.full((1, 1), 2.0**24), torch.ones(2000, 1)])
    head = fit(ClassMeans(1, (1,), passes=passes), *in_batches(x, torch.zeros(2001, dtype=torch.int64), *sizes))
    lost = 127 if passes == 2 and sizes == [2001] else 0  # of the first 128, which are summed in float32
    assert head.means.item() == pytest.approx((2**24 + 2000 - lost) / 2001, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [ClassMeans, PooledMeans])
def test_16_bit_features_give_float32_statistics(dtype, make):
    x, labels = problem()
    x = x.to(dtype)
    got = fit(make(6, (3, 4, 5)), (x, labels))
    expected = fit(make(6, (3, 4, 5)), (x.float(), labels))
    assert got.means.dtype is got.scale.dtype is got.center.dtype is torch.float32
    assert_close(got.means, expected.means)
    assert_close(got.scale, expected.scale)
    assert_close(got(x), expected(x.float()), 1e-5)


# ---- one pass ----------------------------------------------------------------------------------------------------


def test_how_far_root_mean_squares_are_from_mean_distances():
    """The figures of the docstring: on scikit-learn's digits, and the formula behind them."""
    images, labels = load_digits(return_X_y=True)
    x, labels = torch.from_numpy(images).float(), torch.from_numpy(labels)
    exact, quick = (fit(ClassMeans(10, (64,), passes=passes), (x, labels)) for passes in (2, 1))
    assert torch.equal(exact.means, quick.means)
    ratio = quick.scale / exact.scale
    assert (ratio >= 1).all()
    distances = torch.from_numpy(cdist(x.double(), exact.means.double()))
    assert_close(ratio, (1 + (distances.std(0, correction=0) / distances.mean(0)) ** 2).sqrt(), 1e-5)
    assert (ratio.min().item(), ratio.max().item()) == pytest.approx((1.010, 1.024), abs=5e-4)
    log_probs, approximate = exact(x), quick(x)
    others = (log_probs.argmax(1) != approximate.argmax(1)).float().mean().item()
    assert others == pytest.approx(0.004, abs=5e-4)
    assert (log_probs.exp().amax(1) - approximate.exp().amax(1)).abs().max() < 0.002


# ---- classes and samples that are missing ------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("make", [ClassMeans, PooledMeans])
def test_a_class_without_samples_is_never_predicted(passes, make):
    x, labels = problem()
    head = fit(make(9, (3, 4, 5), passes=passes), (x, labels + 1))  # classes 0, 7, 8 have none
    without = fit(make(6, (3, 4, 5), passes=passes), (x, labels))
    assert head.counts.tolist() == [0, *[15] * 6, 0, 0]
    assert head.scale.isnan().tolist() == [True, *[False] * 6, True, True]
    assert all(torch.equal(head.means[k], head.center) for k in (0, 7, 8))  # not far from the others: see ops
    log_probs = head(x)
    assert log_probs[:, [0, 7, 8]].isneginf().all()
    assert_close(log_probs[:, 1:7], without(x), 1e-5)
    assert_close(head.center, without.center)


def test_no_sample_leaves_when_features_do_not_tell_classes_apart():
    head = fit(ClassMeans(2, (3,)), (torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])))
    assert head.scale.tolist() == [0, 0]
    assert head(torch.zeros(2, 3)).isnan().all()


def test_no_sample_at_all():
    head = ClassMeans(2, (3,))
    with pytest.raises(ValueError, match="no sample in pass 0: `update` was not called; the loader may be used up"):
        head.finish(0)
    head.update(torch.rand(4, 3), torch.tensor([0, 0, 1, 1]), 0)
    head.finish(0)
    head.update(torch.rand(0, 3), torch.zeros(0, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="no sample in pass 1"):
        head.finish(1)
    assert not head.fitted


def test_no_sample_leaves_at_an_unfitted_head():
    x, _ = problem()
    for head in (ClassMeans(6, (3, 4, 5)), PooledMeans(6, (3, 4, 5))):
        assert not head.fitted
        assert head(x).isnan().all()
        out = Decisions.empty(90)
        survivors, _ = head.step(x, -INF, torch.arange(90), out, rule=CONFIDENCE, exit=0)
        assert len(survivors) == 90


# ---- bad batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pass_index", [0, 1])
def test_features_that_are_not_finite(bad, dtype, pass_index):
    x, labels = problem()
    head = ClassMeans(6, (3, 4, 5))
    for earlier in range(pass_index):
        head.update(x, labels, earlier)
        head.finish(earlier)
    spoiled = x.to(dtype, copy=True)
    spoiled[37, 1, 2, 3] = bad
    with pytest.raises(ValueError, match="`x` holds NaN or infinity in sample 37 of the batch"):
        head.update(spoiled, labels, pass_index)
    # The batch has left no trace.
    for later in range(pass_index, 2):
        head.update(x, labels, later)
        head.finish(later)
    assert same_bits(head.scale, fit(ClassMeans(6, (3, 4, 5)), (x, labels)).scale)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2]), "go from 0 to 2; wanted 0 to 1"),
        (torch.tensor([0, 1, -1]), "go from -1 to 1; wanted 0 to 1"),
        (torch.tensor([0, 1]), r"int64 \[2\]; wanted int64 \[3\]"),
        (torch.tensor([[0], [1], [1]]), r"int64 \[3, 1\]; wanted int64 \[3\]"),
        (torch.tensor([0.0, 1.0, 1.0]), r"float32 \[3\]; wanted int64 \[3\]"),
        (torch.tensor([0, 1, 1], dtype=torch.int32), r"int32 \[3\]; wanted int64 \[3\]"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    for head in (ClassMeans(2, (4,)), LinearHead(2, (4,))):
        with pytest.raises(ValueError, match="`labels` .*" + message):
            head.update(torch.rand(3, 4), labels, 0)


def test_features_that_do_not_fit():
    head = ClassMeans(2, (4, 2, 2))
    with pytest.raises(ValueError, match=r"`x` has shape \[3, 4, 2\]; wanted \[batch, 4, 2, 2\]"):
        head.update(torch.rand(3, 4, 2), torch.zeros(3, dtype=torch.int64), 0)
    with pytest.raises(TypeError, match="`x` is a list"):
        head.update([1.0], torch.zeros(1, dtype=torch.int64), 0)


def test_passes_have_an_order():
    x, labels = problem(shape=(4,))
    head = ClassMeans(6, (4,))
    with pytest.raises(RuntimeError, match=r"pass 1 of ClassMeans cannot start: 0 of 2 are finished.*reset\(\)"):
        head.update(x, labels, 1)
    with pytest.raises(RuntimeError, match="pass 1 of ClassMeans cannot start"):
        head.finish(1)
    head.update(x, labels, 0)
    head.finish(0)
    assert not head.fitted
    with pytest.raises(RuntimeError, match="pass 0 of ClassMeans cannot start: 1 of 2 are finished"):
        head.update(x, labels, 0)
    head.update(x, labels, 1)
    head.finish(1)
    assert head.fitted


@pytest.mark.parametrize("interrupted_in", [0, 1])
def test_after_reset_an_interrupted_fit_leaves_no_trace(interrupted_in):
    x, labels = problem()
    head = ClassMeans(6, (3, 4, 5))
    for pass_index in range(interrupted_in + 1):
        head.update(x + 1, labels, pass_index)
        if pass_index < interrupted_in:
            head.finish(pass_index)
    head.reset()
    fit(head, (x, labels))
    expected = fit(ClassMeans(6, (3, 4, 5)), (x, labels))
    assert same_bits(head.means, expected.means)
    assert same_bits(head.scale, expected.scale)
    assert torch.equal(head.counts, expected.counts)


def test_a_second_fit_starts_from_nothing():
    x, labels = problem()
    for passes in (1, 2):
        head = fit(ClassMeans(6, (3, 4, 5), passes=passes), (x + 5, labels))
        fit(head, (x, labels))
        expected = fit(ClassMeans(6, (3, 4, 5), passes=passes), (x, labels))
        assert same_bits(head.means, expected.means)
        assert same_bits(head.scale, expected.scale)


def test_the_mean_distance_is_over_the_samples_of_the_second_pass():
    x, labels = problem(shape=(8,))
    head = ClassMeans(6, (8,))
    head.update(x, labels, 0)
    head.finish(0)
    head.update(x[:40], labels[:40], 1)
    head.finish(1)
    assert_close(head.scale, torch.from_numpy(cdist(x[:40].double(), head.means.double()).mean(0)))


# ---- merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("formats", [(False, False), (True, True), (False, True), (True, False)])
def test_two_halves_merged_are_the_whole(passes, formats):
    x, labels = problem()
    x = x[torch.randperm(90, generator=generator(3))]
    expected = by_numpy(x, labels, 6)
    halves = [ClassMeans(6, (3, 4, 5), passes=passes) for _ in range(2)]
    parts = [slice(0, 31), slice(31, 90)]
    for pass_index in range(passes):
        for head, part, last in zip(halves, parts, formats, strict=True):
            some = x[part].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            head.update(some, labels[part], pass_index)
        first, second = halves
        first.merge(second)
        first.finish(pass_index)
        halves[1] = copy.deepcopy(first)
    assert_close(halves[0].means.flatten(1), expected[0], 1e-6)
    assert_close(halves[0].scale, expected[3 - passes], 1e-6)
    assert halves[0].counts.tolist() == [15] * 6
    assert halves[0].fitted


def test_merging_takes_copies():
    x, labels = problem(shape=(4,))
    whole, part = ClassMeans(6, (4,)), ClassMeans(6, (4,))
    part.update(x[:50], labels[:50], 0)
    whole.merge(part)
    part.update(x[50:], labels[50:], 0)
    whole.merge(ClassMeans(6, (4,)))  # has seen nothing
    whole.finish(0)
    assert whole.counts.sum() == 50
    first = ClassMeans(6, (4,))
    first.update(x[:50], labels[:50], 0)
    first.finish(0)
    assert same_bits(whole.means, first.means)


def test_what_cannot_be_merged():
    x, labels = problem(shape=(4,))
    head = ClassMeans(6, (4,))
    for other in (ClassMeans(5, (4,)), ClassMeans(6, (5,)), ClassMeans(6, (4,), passes=1), PooledMeans(6, (4,))):
        with pytest.raises(ValueError, match=r"`other` is .*Means\(.*; wanted another ClassMeans\("):
            head.merge(other)
    ahead = ClassMeans(6, (4,))
    ahead.update(x, labels, 0)
    ahead.finish(0)
    with pytest.raises(RuntimeError, match="`other` is in pass 1, this head in pass 0"):
        head.merge(ahead)
    head.update(x + 1, labels, 0)
    head.finish(0)
    with pytest.raises(ValueError, match="other means"):
        head.merge(ahead)


# ---- processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.subprocess
def test_two_processes_learn_what_one_does(tmp_path):
    x, labels = problem()
    heads = (ClassMeans, functools.partial(ClassMeans, passes=1), PooledMeans, LinearHead)
    makes = [functools.partial(make, 6, (3, 4, 5)) for make in heads]
    shares = (40, 0)  # the second time, process 0 has nothing at all
    results = heads_of_two_processes(makes, x, labels, shares, tmp_path, channels_last=(False, True))
    for make, *found in zip(heads * 2, *results, strict=True):
        expected = fit(make(6, (3, 4, 5)), (x, labels)).state_dict()
        for state in found:
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_allclose(state[name], value.numpy(), rtol=1e-6, atol=1e-6, err_msg=name)


# ---- memory order ------------------------------------------------------------------------------------------------


def is_last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("last", [False, True])
def test_means_follow_the_order_of_the_features(last):
    x, labels = problem()
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    head = fit(ClassMeans(6, (3, 4, 5)), (x, labels))
    assert is_last(head.means) == last
    assert is_last(head.center[None]) == last
    assert head.config()["channels_last"] is last
    # Both as they are in memory: neither is copied before the comparison.
    assert ops.validation.features("x", x).channels_last == last
    look = ops.validation.resolve_input("statistics", x, None)
    assert ops.validation.class_vectors("means", look, head.means)[0].data_ptr() == head.means.data_ptr()
    assert ops.validation.center_of_means(look, head.center).data_ptr() == head.center.data_ptr()


def test_to_memory_format_converts_means_as_it_does_weights():
    x, labels = problem()
    head = fit(ClassMeans(6, (3, 4, 5)), (x, labels))
    before = head(x)
    values = head.means.clone()
    network = nn.Sequential(head).to(memory_format=torch.channels_last)
    assert is_last(head.means)
    assert is_last(head.center[None])
    assert torch.equal(head.means, values)
    assert_close(network(x.contiguous(memory_format=torch.channels_last)), before)
    network.to(memory_format=torch.contiguous_format)
    assert head.means.is_contiguous()
    assert head.center.is_contiguous()


# ---- keeping and moving ------------------------------------------------------------------------------------------


def some_heads():
    x, labels = problem()
    last = x.contiguous(memory_format=torch.channels_last)
    return [
        fit(ClassMeans(6, (3, 4, 5)), (x, labels)),
        fit(ClassMeans(6, (3, 4, 5), passes=1), (last, labels)),
        fit(PooledMeans(6, (3, 4, 5), grid=2), (x, labels)),
        fit(LinearHead(6, (3, 4, 5)), (x, labels)),
    ]


HEAD_REGISTRY = ["class means", "channels last", "pooled", "linear"]


def assert_same_head(got, expected):
    x, _ = problem(seed=1)
    assert type(got) is type(expected)
    assert got.config() == expected.config()
    assert got.fitted == expected.fitted
    assert same_bits(got(x), expected(x))
    for name, buffer in expected.named_buffers():
        assert same_bits(dict(got.named_buffers())[name], buffer), name
        assert dict(got.named_buffers())[name].stride() == buffer.stride(), name


@pytest.mark.parametrize("number", range(4), ids=HEAD_REGISTRY)
def test_keeping_a_head(number):
    head = some_heads()[number]
    assert head.fitted
    assert_same_head(copy.deepcopy(head), head)
    assert_same_head(pickle.loads(pickle.dumps(head)), head)

    # By way of a file: only a state of tensors, and a config of text.
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    fresh = from_config(json.loads(json.dumps(head.config())))
    assert not fresh.fitted
    fresh.load_state_dict(state)
    assert_same_head(fresh, head)

    # Without the config's word on the memory order, and by way of a format that knows of none.
    plain = type(head)(**{k: v for k, v in head.config().items() if k not in ("kind", "channels_last")})
    plain.load_state_dict(head.state_dict())
    assert_same_head(plain, head)
    rebuilt = from_config(head.config())
    rebuilt.load_state_dict({name: value.contiguous() for name, value in state.items()})
    assert_same_head(rebuilt, head)
    nested = nn.ModuleList([from_config(head.config())])
    nested.load_state_dict(nn.ModuleList([head]).state_dict())
    assert_same_head(nested[0], head)


def test_an_unfitted_state_is_one_after_loading_too():
    head = fit(ClassMeans(6, (3, 4, 5)), problem())
    head.load_state_dict(ClassMeans(6, (3, 4, 5)).state_dict())
    assert not head.fitted
    with pytest.raises(RuntimeError, match="size mismatch for means"):
        head.load_state_dict(ClassMeans(6, (3, 4, 6)).state_dict())


def test_statistics_are_no_state_and_are_dropped():
    x, labels = problem()
    head = ClassMeans(6, (3, 4, 5), passes=1)
    before = set(head.state_dict())
    head.update(x, labels, 0)
    assert set(head.state_dict()) == before
    assert not head.means.any()
    head.finish(0)
    held = [value for value in vars(head).values() if isinstance(value, torch.Tensor)]
    assert held == []


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)])
def test_casts_leave_statistics_in_float32(cast):
    for head in some_heads()[:3]:
        expected = copy.deepcopy(head)
        assert_same_head(cast(nn.Sequential(head))[0], expected)
    linear = cast(some_heads()[3])
    assert linear.weight.dtype is not torch.float32  # a head of one's own does as its author says


def test_half_features_after_half():
    x, _ = problem()
    for head in some_heads()[:3]:
        expected = head(x.half().float())
        assert_close(head.half()(x.half()), expected, 1e-3)


def test_to_another_device():
    head = ClassMeans(6, (3, 4, 5)).to("meta")
    assert {buffer.device.type for buffer in head.buffers()} == {"meta"}
    assert head.to_empty(device="cpu").means.device.type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4), ids=HEAD_REGISTRY)
def test_a_compiled_head_gives_the_same_answers(number):
    torch.compiler.reset()
    head = some_heads()[number]
    x, _ = problem(seed=1)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for some in (x, x[:7], x.contiguous(memory_format=torch.channels_last)):
        assert_close(compiled(some), head(some), 1e-6)


def test_a_fit_in_inference_mode_can_go_on_outside_of_it():
    x, labels = problem()
    for head in (ClassMeans(6, (3, 4, 5)), LinearHead(6, (3, 4, 5))):
        expected = fit(copy.deepcopy(head), *in_batches(x, labels, 30, 60))
        for pass_index in range(head.passes):
            with torch.inference_mode():
                head.update(x[:30] * 1, labels[:30] * 1, pass_index)
            head.update(x[30:], labels[30:], pass_index)
            head.finish(pass_index)
        assert_same_head(head, expected)


def test_features_with_gradients_are_taken_without_them():
    x, labels = problem()
    head = fit(ClassMeans(6, (3, 4, 5)), (x.requires_grad_(), labels))
    assert not head.means.requires_grad
    assert not head(x).requires_grad


# ---- pooling -----------------------------------------------------------------------------------------------------


def pooled_by_numpy(x, cells):
    """Cell i of n goes from floor(i size / n) to floor((i + 1) size / n)."""
    edges = [[(i * s // n, (i + 1) * s // n) for i in range(n)] for s, n in zip(x.shape[2:], cells, strict=True)]
    x = x.double().numpy()
    averages = [[x[:, :, a:b, c:d].mean((2, 3)) for c, d in edges[1]] for a, b in edges[0]]
    return torch.from_numpy(np.stack([np.stack(row, -1) for row in averages], -2)).flatten(1)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 7), (8, 6), (2, 9), (1, 5)])
@pytest.mark.parametrize("grid", [1, 2, 3])
@pytest.mark.parametrize("form", ["contiguous", "channels last", "[H, W, C]"])
def test_pooling_against_numpy(size, grid, form):
    x = torch.randn(5, 3, *size, generator=generator(0))
    shape, channels = (3, *size), None
    expected = pooled_by_numpy(x, [min(grid, s) for s in size])
    if form == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif form == "[H, W, C]":
        x, shape, channels = x.movedim(1, -1).contiguous(), (*size, 3), -1
    head = PooledMeans(4, shape, grid=grid, channels=channels)
    got = head.features(x)
    assert got.dtype is torch.float32
    assert head.means.shape == (4, *got.shape[1:])
    assert_close(got, expected)


def test_pooling_tokens_and_vectors():
    x = torch.randn(5, 7, 3, generator=generator(0))
    assert_close(PooledMeans(4, (7, 3), grid=3).features(x), x.double().mean(1))
    assert_close(PooledMeans(4, (7, 3), channels=0).features(x), x.double().mean(2))
    assert PooledMeans(4, (7,)).features(x[:, :, 0]).data_ptr() == x.data_ptr()
    assert [PooledMeans(4, s).means.shape[1] for s in ((7, 3), (7,))] == [3, 7]
    assert PooledMeans(4, (7, 3), channels=0).means.shape == (4, 7)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 4, 5)])
@pytest.mark.parametrize("passes", [1, 2])
def test_pooled_means_are_class_means_of_pooled_features(shape, passes):
    x, labels = problem(shape=shape)
    head = fit(PooledMeans(6, shape, grid=2, passes=passes), *in_batches(x, labels, 40, 50))
    features = head.features(x)
    expected = fit(ClassMeans(6, features.shape[1:], passes=passes), (features, labels))
    assert_close(head.means, expected.means)
    assert_close(head.scale, expected.scale)
    assert_close(head(x), expected(features), 1e-5)


def test_an_answer_does_not_depend_on_the_batch():
    x, labels = problem(shape=(8, 16, 16))
    for last in (False, True):
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        for head in (ClassMeans(6, (8, 16, 16)), PooledMeans(6, (8, 16, 16)), PooledMeans(6, (8, 16, 16), grid=3)):
            together = fit(head, (x, labels))(x)
            assert all(same_bits(head(x[i : i + 1]), together[i : i + 1]) for i in range(0, 90, 7))


# ---- steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Margin(Rule):
    name = "margin"

    def certainty(self, log_probs):
        first, second = log_probs.exp().topk(2, dim=1).values.unbind(1)
        return first - second


RULES = [as_rule("confidence"), as_rule("entropy"), Margin()]


@pytest.mark.parametrize("number", range(4), ids=HEAD_REGISTRY)
@pytest.mark.parametrize("the_rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("last", [False, True])
def test_a_step_takes_out_the_samples_that_are_sure(number, the_rule, last):
    head = some_heads()[number]
    x, _ = problem(seed=2)
    x[[3, 50]] = NAN
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    ids = shuffled_ids(90, 120)
    certainty, prediction = head.score(x, the_rule)
    log_probs = head(x)
    assert certainty.dtype is torch.float32
    assert certainty[[3, 50]].isnan().all()
    assert prediction.dtype is torch.int64
    assert (prediction >= 0).all()
    sound = ~certainty.isnan()
    assert torch.equal(prediction[sound], log_probs[sound].argmax(1))
    ordered = certainty[sound].sort().values
    middle = ((ordered[43] + ordered[44]) / 2).item()
    for threshold in (-INF, middle, torch.tensor(middle), INF):
        out = sentinels(120, 6)
        survivors, kept = head.step(x, threshold, ids, out, rule=the_rule, exit=7)
        leaves = certainty > float(threshold)
        assert leaves.sum() in (0, 44, 88)
        expected = sentinels(120, 6)
        at = ids[leaves]
        expected.prediction[at], expected.exit[at] = prediction[leaves], 7
        expected.confidence[at] = log_probs[leaves].amax(1).exp()
        expected.log_probs[at] = log_probs[leaves]
        assert torch.equal(out.prediction, expected.prediction)
        assert torch.equal(out.exit, expected.exit)
        assert_close(out.confidence, expected.confidence)
        assert_close(out.log_probs, expected.log_probs, 1e-5)
        assert same_bits(survivors, x[~leaves])
        assert torch.equal(kept, ids[~leaves])
        if leaves.any() and not leaves.all():
            assert is_last(survivors) == last


def test_a_sample_that_is_not_a_number_stays_whatever_a_rule_says():
    class Careless(Rule):
        name = "careless"

        def certainty(self, log_probs):
            return torch.ones(len(log_probs))

    x, _ = problem(seed=2)
    x[[3, 50]] = NAN
    for head in some_heads():
        out = Decisions.empty(90)
        survivors, kept = head.step(x, 0.5, torch.arange(90), out, rule=Careless(), exit=1)
        assert kept.tolist() == [3, 50]
        assert same_bits(survivors, x[[3, 50]])
        assert (out.exit == 1).sum() == 88


@pytest.mark.parametrize("number", range(4), ids=HEAD_REGISTRY)
def test_confidences_are_judged_by_the_bits_that_a_step_goes_by(number):
    head = some_heads()[number]
    x, _ = problem(rows=1000, seed=2)
    certainty, prediction = head.score(x, CONFIDENCE)
    out = Decisions.empty(1000)
    head.step(x, -INF, torch.arange(1000), out, rule=CONFIDENCE, exit=0)
    assert same_bits(out.confidence, certainty)
    assert torch.equal(out.prediction, prediction)
    out = Decisions.empty(1000)
    head.step(x, certainty[500], torch.arange(1000), out, rule=CONFIDENCE, exit=0)
    assert torch.equal(out.exit == 0, certainty > certainty[500])


def test_no_samples_are_an_answer_too():
    for head in some_heads():
        x, ids = torch.rand(0, 3, 4, 5), torch.arange(0)
        assert head(x).shape == (0, 6)
        for the_rule in RULES:
            survivors, kept = head.step(x, 0.5, ids, Decisions.empty(0), rule=the_rule, exit=0)
            assert survivors.shape == (0, 3, 4, 5)
            assert kept.shape == (0,)
            assert head.score(x, the_rule)[0].shape == (0,)


# ---- costs -------------------------------------------------------------------------------------------------------


def test_flops_of_heads_by_hand():
    assert ClassMeans(10, (64, 8, 8)).flops() == 10 * (3 * 4096 - 1)
    assert PooledMeans(10, (64,)).flops() == 10 * (3 * 64 - 1)
    assert PooledMeans(10, (64, 8, 8)).flops() == 64 * 64 + 10 * (3 * 64 - 1)
    assert PooledMeans(10, (64, 8, 8), grid=2).flops() == 64 * 64 + 10 * (3 * 256 - 1)
    assert PooledMeans(10, (8, 8, 64), grid=2, channels=-1).flops() == 64 * 64 + 10 * (3 * 256 - 1)
    assert PooledMeans(10, (197, 192)).flops() == 197 * 192 + 10 * (3 * 192 - 1)
    assert PooledMeans(10, (5, 1, 1), grid=2).flops() == 5 + 10 * (3 * 5 - 1)
    assert PooledMeans(10, (5, 7, 3), grid=3).flops() == 5 * 7 * 3 + 10 * (3 * 45 - 1)  # cells do not overlap
    assert LinearHead(6, (3, 4, 5)).flops() == 2 * 60 * 6  # what the counter sees


# ---- making heads ------------------------------------------------------------------------------------------------


def test_maps_that_seem_to_hold_their_channels_last_are_spoken_of():
    with pytest.warns(UserWarning, match=r"\[14, 14, 96\] are taken for 14 channels of maps 14 x 96"):
        build("whitened_means", 3, [(16, 8, 8), (14, 14, 96), (7, 7, 192)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("whitened_means", 3, [(16, 16, 16), (64, 8, 8), (8, 8, 1), (3, 16, 32), (5, 7), (9,)])
        build(lambda k, shape: WhitenedMeans(k, shape), 3, [(14, 14, 96)])


def test_build_by_name_class_and_function():
    shapes = [(16, 8, 8), [32, 4, 4], (10,)]
    expected = [(16, 8, 8), (32, 4, 4), (10,)]
    for kind, cls in (("class_means", ClassMeans), ("pooled_means", PooledMeans), ("LinearHead", LinearHead)):
        for made in (build(kind, 5, shapes), build(cls, 5, shapes)):
            assert [type(head) for head in made] == [cls] * 3
            assert [head.feature_shape for head in made] == expected
            assert all(head.num_classes == 5 for head in made)
    made = build(functools.partial(PooledMeans, grid=2), 5, shapes)
    assert [head.means.shape[1] for head in made] == [64, 128, 10]
    assert build("class_means", 5, []) == []


def test_auto_pools_the_largest_until_all_fit():
    shapes = [(16, 32, 32), (32, 16, 16), (64, 8, 8), (64,)]  # 16384, 8192, 4096 and 64 features of 4 * 10 bytes

    def kinds(memory):
        return "".join(head.kind[0] for head in build("auto", 10, shapes, memory))

    whole = 40 * (16384 + 8192 + 4096 + 64)
    assert kinds(whole) == "cccc"
    assert kinds(whole - 1) == "pccc"
    assert kinds(40 * (16 + 8192 + 4096 + 64)) == "pccc"
    assert kinds(40 * (16 + 8192 + 4096 + 64) - 1) == "ppcc"
    assert kinds(40 * (16 + 32 + 4096 + 64)) == "ppcc"
    assert kinds(0) == "pppc"  # a vector cannot be pooled
    assert [head.kind for head in build("auto", 10, [(4, 2, 2, 2), (7, 3)], 0)] == ["class_means", "pooled_means"]
    # The first exit of a ResNet-50 at 224 x 224 and 1000 classes: 3.2 GB of means.
    assert build("auto", 1000, [(256, 56, 56)])[0].means.shape == (1000, 256)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("means", ValueError, "`head` is 'means'; known are 'class_means', 'pooled_means'.*'auto'"),
        (None, TypeError, "`head` is a NoneType"),
        (ClassMeans(5, (4,)), TypeError, "`head` is a ClassMeans; wanted a name, a Head class or a function"),
        (lambda k, s: nn.Linear(4, k), TypeError, "`head` has made a Linear; wanted a Head"),
        (
            lambda k, s: ClassMeans(k + 1, s),
            ValueError,
            r"made a head for 6 classes and features \[4\]; wanted 5 and \[4\]",
        ),
    ],
)
def test_kinds_of_heads_that_are_none(kind, error, message):
    with pytest.raises(error, match=message):
        build(kind, 5, [(4,)])


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"kind": 3},
        {"kind": "no such head", "num_classes": 2, "feature_shape": [3]},
        {"kind": "class_means", "num_classes": 2},
        {"kind": "class_means", "num_classes": 2, "feature_shape": [3], "color": "red"},
        {"kind": "class_means", "num_classes": 0, "feature_shape": [3]},
        {"kind": "class_means", "num_classes": 2, "feature_shape": [3.5]},
        {"kind": "class_means", "num_classes": 2, "feature_shape": []},
        {"kind": "class_means", "num_classes": 2, "feature_shape": [3], "passes": 3},
        {"kind": "pooled_means", "num_classes": 2, "feature_shape": [3], "grid": 0},
        {"kind": "pooled_means", "num_classes": 2, "feature_shape": [3, 4, 5], "channels": 1},
        {"kind": "pooled_means", "num_classes": 2, "feature_shape": [3, 4, 5, 6]},
    ],
)
def test_configs_that_are_none(config):
    with pytest.raises(ValueError, match=r"`config`|`num_classes`|`feature_shape`|`passes`|`grid`|`channels`"):
        from_config(config)


def test_a_head_says_what_it_is():
    assert repr(ClassMeans(5, (4, 2))) == (
        "ClassMeans(num_classes=5, feature_shape=[4, 2], passes=2, channels_last=False)"
    )


# ---- heads of one's own ------------------------------------------------------------------------------------------


class LinearHead(Head):
    """A linear classifier, whose weights are the class means, and its bias -|mean|^2 / 2."""

    def __init__(self, num_classes, feature_shape):
        super().__init__(num_classes, feature_shape)
        size = math.prod(self.feature_shape)
        self.register_buffer("weight", torch.zeros(num_classes, size))
        self.register_buffer("bias", torch.zeros(num_classes))
        self.sums = torch.zeros(num_classes, size)

    def update(self, x, labels, pass_index):
        super().update(x, labels, pass_index)
        self.sums.index_add_(0, labels, x.flatten(1))

    def finish(self, pass_index):
        super().finish(pass_index)
        self.weight.copy_(all_reduce_sum(self.sums) / self.counts[:, None])
        self.bias.copy_(-self.weight.square().sum(1) / 2)

    def forward(self, x):
        return F.linear(x.flatten(1), self.weight, self.bias).log_softmax(1)


def test_the_head_of_the_documentation_works():
    doc = Head.__doc__
    _, code = doc.split("Example:\n")
    names = {"__name__": "documentation"}
    exec(textwrap.dedent(code), names)
    images, labels = load_digits(return_X_y=True)
    x, labels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(labels)
    (head,) = build(names["LeastSquares"], 10, [(1, 8, 8)])
    fit(head, *in_batches(x[:1200], labels[:1200], 500, 700))
    assert head.fitted
    assert head.counts.sum() == 1200
    out = Decisions.empty(597, 10)
    survivors, _ = head.step(x[1200:], -INF, torch.arange(597), out, rule=CONFIDENCE, exit=3)
    assert len(survivors) == 0
    assert (out.prediction == labels[1200:]).float().mean() > 0.85
    assert head.flops() == 2 * 64 * 10
    again = from_config(head.config())
    again.load_state_dict(head.state_dict())
    assert_same_decisions(Decisions(again(x).argmax(1), *[None] * 3), Decisions(head(x).argmax(1), *[None] * 3))


def test_what_a_head_of_ones_own_lacks_is_named():
    class Empty(Head):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty needs a forward\(\)"):
        Empty(2, (3,))(torch.rand(1, 3))


def test_a_subclass_may_be_named_otherwise_and_take_more():
    class Sharper(ClassMeans, kind="sharper"):
        def __init__(self, num_classes, feature_shape, *, power=1.0, **others):
            super().__init__(num_classes, feature_shape, **others)
            self.power = power

        def config(self):
            return super().config() | {"power": self.power}

        def forward(self, x):
            return (super().forward(x) * self.power).log_softmax(1)

    x, labels = problem()
    head = fit(Sharper(6, (3, 4, 5), power=2.0), (x, labels))
    again = from_config(json.loads(json.dumps(head.config())))
    again.load_state_dict(head.state_dict())
    assert same_bits(again(x), head(x))
    assert again.power == 2
    assert build("sharper", 6, [(3,)])[0].kind == "sharper"
