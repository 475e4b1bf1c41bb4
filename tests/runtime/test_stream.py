"""Streams: the answers of `predict` for every batch, though samples of several batches run together."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.networks import Interrupted, Scripted, Watched, loader, net, pointwise
from support.tensors import INF, NAN, assert_same_decisions, generator, same_bits
from torch import nn

from e2cm_ext import Decisions, EarlyExit, Stages
from e2cm_ext.runtime.stream import Stream

g = generator(3)
PATTERNS = torch.randn(3, 3, 4, 5, generator=g)
SAMPLES = PATTERNS[torch.arange(90) % 3] + 0.8 * torch.randn(90, 3, 4, 5, generator=g)
SAMPLES[17, 0, 1, 1] = NAN
LABELS = torch.arange(90) % 3
LEVELS = [INF, -INF, 0.34, 0.4, 0.45, 0.5]


class End(Watched):
    """The last stage: the last three features are the logits. They go through a matrix product, as FLOPs are counted,
    and come out as they were."""

    def forward(self, x):
        assert not x.requires_grad  # who waits must not hold the way he came
        return super().forward(x).flatten(1)[:, -3:] @ torch.eye(3, dtype=x.dtype)


def exact(rule="confidence"):
    """A network whose answer to a sample is the same bits in any company; five exits."""
    ee = EarlyExit(Stages([*list(pointwise())[:-1], End()]).eval(), SAMPLES[:1], rule=rule)
    return ee.fit([(SAMPLES[30:], LABELS[30:])], progress=False)


EXACT = exact()
SOME = [0.45, 0.4, INF, 0.45, 0.4]  # samples leave at every exit but one, and at the end


def with_thresholds(thresholds):
    EXACT.thresholds = thresholds
    return EXACT


def scripted(adds, thresholds):
    """An EarlyExit that says what each of its stages was given: the first feature is the confidence, raised by `add`
    at each stage."""

    stages = Stages([*(Watched(add) for add in adds), End()]).eval()
    ee = EarlyExit(stages, rows(0.1), head=lambda classes, shape: Scripted(0, classes, shape))
    ee.thresholds = thresholds
    for stage in stages:
        stage.seen.clear()
    return ee


def rows(*first):
    return torch.tensor([[p, 0.0, 1.0, 3.0] for p in first])


def sizes(stage):
    return [len(x) for x in stage.seen]


# ---- the same decisions as predict -----------------------------------------------------------------

sizes_of_batches = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 8, 13]), min_size=1, max_size=8)
thresholds = st.one_of(st.lists(st.sampled_from(LEVELS), min_size=5, max_size=5), st.just(SOME))
batch_sizes = st.sampled_from([None, 1, 2, 3, 4, 8, 50])
waits = st.sampled_from([None, 0, 1, 2, 5])


@given(sizes_of_batches, thresholds, batch_sizes, waits)
def test_batches_are_answered_in_order(sizes, thresholds, batch_size, max_wait):
    ee = with_thresholds(thresholds)
    batches = SAMPLES[: sum(sizes)].split(sizes)
    stream = ee.predict_stream(batches, batch_size=batch_size, max_wait=max_wait)
    for got, images in zip(stream, batches, strict=True):
        assert_same_decisions(got, ee.predict(images))


@given(sizes_of_batches, thresholds, batch_sizes, waits)
def test_batches_are_answered_as_they_are_completed(sizes, thresholds, batch_size, max_wait):
    ee = with_thresholds(thresholds)
    count = sum(sizes)
    stream = ee.predict_stream(
        SAMPLES[:count].split(sizes), order="completed", batch_size=batch_size, max_wait=max_wait
    )
    pairs = [(torch.empty(0, dtype=torch.int64), Decisions.empty(0, 3)), *stream]
    numbers, answers = zip(*pairs, strict=True)
    assert all(len(n) for n in numbers[1:])
    numbers = torch.cat(numbers)
    order = numbers.argsort()
    assert torch.equal(numbers[order], torch.arange(count))
    together = Decisions(*(torch.cat(column)[order] for column in zip(*answers, strict=True)))
    assert_same_decisions(together, ee.predict(SAMPLES[:count]))


def test_answers_come_before_their_batch_is_complete():
    ee = scripted([0.0], [0.5])
    stream = ee.predict_stream([rows(0.1, 0.9, 0.9, 0.9), rows(0.9, 0.1, 0.1, 0.9)], order="completed")
    assert [numbers.tolist() for numbers, _ in stream] == [[1, 2, 3], [0, 4, 5, 6, 7]]


def test_answers_by_the_entropy_rule():
    ee = exact("entropy")
    ee.thresholds = ee.record([(SAMPLES[:30], LABELS[:30])], progress=False).confidence[:, :-1].nanquantile(0.7, dim=0)
    batches = SAMPLES.split(7)
    stream = ee.predict_stream(batches, batch_size=20)
    exits = []
    for got, images in zip(stream, batches, strict=True):
        assert_same_decisions(got, ee.predict(images))
        exits.append(got.exit)
    assert len(torch.cat(exits).unique()) > 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_real_convolutions(layout):
    """They round otherwise in batches of other sizes."""
    torch.set_num_threads(1)
    batches = [x.contiguous(memory_format=layout) for x, _ in loader(400, 16)]
    ee = EarlyExit(net(), batches[0], exits="all", head="class_means").fit(loader(200), progress=False)
    certainties = ee.record(loader(400, 400, seed=1), progress=False).confidence[:, :-1]
    ee.thresholds = certainties.quantile(0.7, dim=0)
    got = Decisions(*map(torch.cat, zip(*ee.predict_stream(batches, batch_size=64), strict=True)))
    expected = Decisions(*map(torch.cat, zip(*map(ee.predict, batches), strict=True)))
    same = got.exit == expected.exit
    assert same.float().mean() > 0.99  # a certainty within a rounding of its threshold
    assert torch.equal(got.prediction[same], expected.prediction[same])
    torch.testing.assert_close(got.log_probs[same], expected.log_probs[same], rtol=0, atol=1e-4)
    assert len(expected.exit.unique()) > 3


def test_without_active_exits_it_is_the_network_in_batches():
    model = net()
    batches = [x for x, _ in loader(40, 16)]
    ee = EarlyExit(model, batches[0])
    for got, images in zip(ee.predict_stream(batches), batches, strict=True):
        assert same_bits(got.log_probs, model(images).log_softmax(1))
        assert not got.log_probs.requires_grad
        assert got.exit.tolist() == [len(ee.exit_names)] * len(images)


@pytest.mark.parametrize(
    "item", [lambda x: x, lambda x: (x,), lambda x: (x, "any"), lambda x: x.double(), lambda x: (x.numpy(), None)]
)
def test_images_as_they_may_come(item):
    ee = with_thresholds(SOME)
    batches = SAMPLES.split(40)
    for got, images in zip(ee.predict_stream(map(item, batches)), batches, strict=True):
        assert_same_decisions(got, ee.predict(images))


def test_of_another_dtype_than_the_network():
    ee = exact().bfloat16()
    ee.thresholds = SOME
    (got,) = ee.predict_stream([SAMPLES])
    assert_same_decisions(got, ee.predict(SAMPLES.bfloat16()))


# ---- who waits for whom ----------------------------------------------------------------------------


def test_sizes_of_the_batches_of_each_stage_by_hand():
    """One of four stays at each exit; a stage runs from three samples on. At the end the first stages run first."""
    ee = scripted([0.0, 0.0], [0.6, 0.45])
    batches = [rows(0.9, 0.5 if k in (1, 5, 7, 8) else 0.4, 0.9, 0.9) for k in range(11)]
    exits = [got.exit.tolist() for got in ee.predict_stream(batches)]
    assert exits == [[0, 1 if k in (1, 5, 7, 8) else 2, 0, 0] for k in range(11)]
    first, second, last = ee.stages
    assert sizes(first) == [4] * 11
    assert sizes(second) == [3, 3, 3, 2]
    assert sizes(last) == [4, 3]


def test_stages_between_exits_that_are_off_are_one():
    """Nobody leaves there, so there is nothing to wait for."""
    ee = scripted([0.1, 0.1, 0.1], [INF, 0.5, INF])
    list(ee.predict_stream([rows(0.1, 0.9)] * 6, batch_size=4))
    first, second, third, last = ee.stages
    assert sizes(first) == sizes(second) == [4, 4, 4]
    assert sizes(third) == sizes(last) == [4, 2]
    assert [len(head.seen) for head in ee.heads] == [0, 3, 0]


def test_no_stage_runs_on_an_empty_batch():
    ee = scripted([0.0, 0.0], [0.5, 0.5])
    stream = ee.predict_stream([rows(0.9, 0.8), rows(0.9)[:0], rows(0.7)])
    assert [got.exit.tolist() for got in stream] == [[0, 0], [], [0]]
    assert [sizes(stage) for stage in ee.stages] == [[2, 1], [], []]


def test_a_large_batch_is_run_in_parts():
    ee = scripted([0.0], [0.5])
    (got,) = ee.predict_stream([rows(*[0.1, 0.9] * 5)], batch_size=4)
    assert got.exit.tolist() == [1, 0] * 5
    assert [sizes(stage) for stage in ee.stages] == [[4, 4, 2], [4, 1]]


def test_a_batch_is_given_out_as_soon_as_it_is_complete():
    """Of the five that have come to the second stage with the third batch, four are run: all but its last sample."""
    ee = scripted([0.0], [0.5])
    taken = 0

    def batches():
        nonlocal taken
        for batch in (rows(0.1, 0.9, 0.9), rows(0.1, 0.1), rows(0.1, 0.1), rows(0.9, 0.9, 0.9)):
            taken += 1
            yield batch

    assert [taken for _ in ee.predict_stream(batches(), batch_size=4)] == [3, 3, 4, 4]
    assert sizes(ee.stages[1]) == [4, 1]


@given(
    sizes_of_batches.filter(any),
    thresholds,
    st.sampled_from([1, 2, 3, 4, 8, 50]),
    waits,
    st.sampled_from([True, "completed"]),
)
def test_memory_is_bounded(sizes, thresholds, batch_size, max_wait, order):
    """Of what waits, of what a stage is given at once, and of answers."""
    seen = 0

    class Watching(Stream):
        def _run(self, j):
            nonlocal seen
            seen += 1
            for k, pool in enumerate(self._pools):
                assert pool.count == sum(len(x) for x, _ in pool._parts)
                assert pool.count <= batch_size // 2 + (max(sizes) if k == 0 else batch_size)
            before = self._pools[j].count
            super()._run(j)
            assert before - self._pools[j].count == min(before, batch_size)

        def _receive(self, images):
            super()._receive(images)
            assert all(pool.count <= batch_size // 2 for pool in self._pools)
            if max_wait is not None:
                assert len(self._out.exit) <= 2 * (max_wait + 1) * max(sizes)

    ee = with_thresholds(thresholds)
    stream = Watching(ee.stages, ee.heads, ee.rule, thresholds, 3, batch_size=batch_size, max_wait=max_wait)
    batches = iter(SAMPLES[: sum(sizes)].split(sizes))
    for _ in stream.in_order(batches) if order is True else stream.completed(batches):
        pass
    assert seen


def test_images_that_are_no_longer_needed_are_let_go():
    alive = weakref.WeakSet()

    def batches():
        for _ in range(12):
            batch = SAMPLES[:10].clone()
            alive.add(batch)
            yield batch
            del batch
            assert len(alive) <= 2  # the loader's own machinery may hold the last one

    assert len(list(with_thresholds(SOME).predict_stream(batches()))) == 12


@pytest.mark.parametrize("order", [True, "completed"])
def test_answers_do_not_hold_those_to_other_batches(order):
    for got in with_thresholds(SOME).predict_stream(SAMPLES.split(10), max_wait=0, order=order):
        answers = got if order is True else got[1]
        assert answers.log_probs.untyped_storage().nbytes() == 10 * 3 * 4


@pytest.mark.parametrize("order", [True, "completed"])
@pytest.mark.parametrize("max_wait", [0, 1, 3])
def test_no_sample_waits_longer_than_max_wait(max_wait, order):
    """One sample of three stays for ever, and never finds company."""
    ee = scripted([0.0, 0.0], [0.5, 0.5])
    taken = 0

    def batches():
        nonlocal taken
        for first in (0.1, *[0.9] * 9):
            taken += 1
            yield rows(first, 0.8, 0.7)

    stream = ee.predict_stream(batches(), batch_size=6, max_wait=max_wait, order=order)
    if order is True:
        lags = [taken - number - 1 for number, _ in enumerate(stream)]
    else:
        lags = [taken - number // 3 - 1 for numbers, _ in stream for number in numbers.tolist()]
    assert len(lags) == (10 if order is True else 30)
    assert max(lags) == max_wait
    assert sizes(ee.stages[2]) == [1]


def test_without_max_wait_answers_do_not_pile_up():
    ee = scripted([0.0], [0.5])
    taken = 0

    def batches():
        nonlocal taken
        for first in (0.1, *[0.9] * 150):
            taken += 1
            yield rows(first, 0.8)

    lags = [taken - number - 1 for number, _ in enumerate(ee.predict_stream(batches(), batch_size=4))]
    assert max(lags) == 64 * 4 // 2
    assert len(lags) == 151


# ---- what can go wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("worker")])
def test_a_loader_that_fails(error):
    """All that it had given is answered first."""
    ee = with_thresholds(SOME)
    batches = SAMPLES.split(10)
    got = []
    with pytest.raises(type(error), match=str(error)):
        for answers in ee.predict_stream(Interrupted(batches, 4, error), batch_size=30):
            got.append(answers)
    assert len(got) == 4
    for answers, images in zip(got, batches, strict=False):
        assert_same_decisions(answers, ee.predict(images))


def test_a_batch_that_does_not_fit():
    ee = with_thresholds(SOME)
    stream = ee.predict_stream([SAMPLES[:10], SAMPLES[:10, :2]], batch_size=30)
    assert_same_decisions(next(stream), ee.predict(SAMPLES[:10]))
    with pytest.raises(ValueError, match="batch 1 have shape"):
        next(stream)


def test_ctrl_c_is_raised_at_once():
    ee = scripted([0.0, 0.0], [0.5, 0.5])
    stream = ee.predict_stream(Interrupted([rows(0.1, 0.9)] * 9, 5), batch_size=20)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert [sizes(stage) for stage in ee.stages] == [[], [], []]
    assert list(stream) == []


def test_a_stage_that_fails():
    class Fails(End):
        def forward(self, x):
            if len(x) == 5:
                raise MemoryError("too many")
            return super().forward(x)

    ee = EarlyExit(Stages([nn.Identity(), Fails()]).eval(), SAMPLES[:1])
    stream = ee.predict_stream(SAMPLES[:15].split([4, 5, 6]), batch_size=6)
    next(stream)
    with pytest.raises(MemoryError, match="too many"):
        next(stream)
    assert list(stream) == []


def test_a_consumer_that_stops():
    closed = []

    def batches():
        try:
            yield from SAMPLES.split(10)
        finally:
            closed.append(True)

    stream = with_thresholds(SOME).predict_stream(batches())
    next(stream)
    assert not closed
    stream.close()
    assert closed
    assert list(stream) == []


def test_thresholds_are_those_of_the_call():
    ee = exact()
    ee.thresholds = SOME
    batches = SAMPLES.split(10)
    expected = [ee.predict(images) for images in batches]
    stream = ee.predict_stream(batches)
    got = []
    for level in [INF, -INF] * 5:
        ee.thresholds = level
        got.extend([answers] if (answers := next(stream, None)) else [])
    ee.fit([(SAMPLES[20:], LABELS[20:].flip(0))], progress=False)
    for answers, images in zip([*got, *stream], expected, strict=True):
        assert_same_decisions(answers, images)


def test_train_mode_in_the_middle():
    ee = EarlyExit(net(), loader()[0][0])
    stream = ee.predict_stream([x for x, _ in loader(50, 10)])
    next(stream)
    ee.stages.train()
    with pytest.raises(RuntimeError, match="train mode"):
        next(stream)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": "sorted"}, "`order` is 'sorted'; wanted True"),
        ({"order": 1}, "`order` is 1"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"batch_size": 2.0}, r"`batch_size` is 2\.0"),
        ({"max_wait": -1}, "`max_wait` is -1"),
        ({"max_wait": True}, "`max_wait` is True"),
    ],
)
def test_arguments_are_looked_at_in_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        EXACT.predict_stream([SAMPLES], **options)


def test_the_network_is_looked_at_in_the_call():
    ee = EarlyExit(net(), loader()[0][0])
    ee.register_buffer("thresholds", torch.full((4,), 0.5))
    with pytest.raises(RuntimeError, match="call fit"):
        ee.predict_stream([])
    with pytest.raises(RuntimeError, match="train mode"):
        ee.train().predict_stream([])


def test_a_stream_without_batches_is_refused():
    with pytest.raises(ValueError, match="gave no batch"):
        list(EXACT.predict_stream([]))


@pytest.mark.parametrize("order", [True, "completed"])
def test_inference_mode_that_comes_and_goes(order):
    ee = with_thresholds(SOME)
    batches = SAMPLES.split([40, 10, 10, 10, 10, 10])
    for first, others in ((True, False), (False, True)):
        with torch.inference_mode(first):
            stream = ee.predict_stream(batches, batch_size=25, order=order)
            got = [next(stream)]
        with torch.inference_mode(others):
            got.extend(stream)
        if order is True:
            for answers, images in zip(got, batches, strict=True):
                assert_same_decisions(answers, ee.predict(images))
        else:
            assert sum(len(numbers) for numbers, _ in got) == len(SAMPLES)


# ---- several at once -------------------------------------------------------------------------------


def test_streams_and_predict_from_several_threads():
    torch.set_num_threads(1)
    ee = with_thresholds(SOME)
    expected = ee.predict(SAMPLES)
    together = threading.Barrier(6)

    def caller(number):
        torch.set_num_threads(1)
        together.wait(timeout=60)
        for _ in range(4):
            if number % 3 == 0:
                got = ee.predict(SAMPLES)
            else:
                batches = SAMPLES.split(3 + number)
                got = Decisions(*map(torch.cat, zip(*ee.predict_stream(batches, batch_size=16), strict=True)))
            assert_same_decisions(got, expected)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(caller, range(6)))


def test_two_streams_of_one_network_interleaved():
    ee = with_thresholds(SOME)
    one, other = SAMPLES.split(10), SAMPLES.flip(0).split(10)
    streams = ee.predict_stream(one, batch_size=20), ee.predict_stream(other, batch_size=20)
    for a, b, x, y in zip(*streams, one, other, strict=True):
        assert_same_decisions(a, ee.predict(x))
        assert_same_decisions(b, ee.predict(y))
