"""Many callers at once: Python threads on one op, and worker processes."""

import functools
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch
from support.distributed import predict_in_worker
from support.networks import digits, trained
from support.tensors import assert_same_decisions, clusters, generator, laid_out, same_bits
from torch.utils.data import DataLoader, Dataset

from e2cm_ext import Decisions, EarlyExit, ops

CALLERS, ROUNDS = 8, 6
ROWS, CLASSES = 97, 13


def answers_of(op: str, seed: int) -> list[torch.Tensor]:
    x, means, scale = clusters(ROWS, (5, 9, 31), CLASSES, seed=seed)
    x = laid_out(x, "channels_last" if seed % 2 else "contiguous")
    ids, out = torch.randperm(ROWS, generator=generator(seed)), Decisions.empty(ROWS, CLASSES)
    if op == "class_distances":
        return [ops.class_distances(x, means)]
    if op == "class_scores":
        return [*ops.class_scores(x, means, scale, means.mean(0))]
    if op == "exit_step":
        return [*ops.exit_step(x, means, scale, 0.6, ids, out), *out]
    if op == "decide":
        logits = torch.randn(ROWS, CLASSES, generator=generator(seed)) * 3
        return [*ops.decide(x, logits, 1.0, ids, out, rule="entropy"), *out]
    return [*ops.compact(x, ids % 3 == 0)]


@pytest.mark.parametrize("op", ["class_distances", "class_scores", "exit_step", "decide", "compact"])
@pytest.mark.parametrize("threads_inside", [1, 2, 4])
def test_eight_threads_get_the_bits_of_one(op, threads_inside):
    torch.set_num_threads(threads_inside)
    expected = [answers_of(op, seed) for seed in range(CALLERS)]
    together = threading.Barrier(CALLERS)

    def caller(seed):
        torch.set_num_threads(threads_inside)
        together.wait(timeout=60)
        return [answers_of(op, seed) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(CALLERS) as pool:
        for seed, rounds in enumerate(pool.map(caller, range(CALLERS))):
            for got in rounds:
                assert len(got) == len(expected[seed])
                assert all(same_bits(a, b) for a, b in zip(got, expected[seed], strict=True))


def test_threads_may_write_into_one_out():
    """Each caller has its own rows of the same tensors."""
    x, means, scale = clusters(CALLERS * 50, 300, CLASSES)
    ids = torch.randperm(len(x), generator=generator(0))
    alone, shared = Decisions.empty(len(x), CLASSES), Decisions.empty(len(x), CLASSES)
    ops.exit_step(x, means, scale, 0.5, ids, alone)
    with ThreadPoolExecutor(CALLERS) as pool:
        parts = [slice(50 * i, 50 * (i + 1)) for i in range(CALLERS)]
        list(pool.map(lambda part: ops.exit_step(x[part], means, scale, 0.5, ids[part], shared), parts))
    assert all(same_bits(a, b) for a, b in zip(shared, alone, strict=True))


def test_a_call_lets_go_of_the_interpreter():
    """While one thread computes for a while, another one runs Python."""
    x, means, _ = clusters(1, 4000, 1)
    many = x.expand(400_000, 4000)
    torch.set_num_threads(1)
    beats, done = 0, threading.Event()

    def compute():
        ops.class_distances(many, means)
        done.set()

    thread = threading.Thread(target=compute)
    thread.start()
    while not done.wait(0.001):
        beats += 1
    thread.join()
    assert beats > 5


class Distances(Dataset):
    """Calls an op in a worker process: forked from a parent that has run one on several threads."""

    def __init__(self):
        self.x, self.means, _ = clusters(40, 2000, CLASSES)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        torch.set_num_threads(1)
        return ops.class_distances(self.x[row : row + 1], self.means)[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_workers_of_a_dataloader():
    data = Distances()
    torch.set_num_threads(2)
    expected = ops.class_distances(data.x.repeat(30, 1), data.means)[:40]  # enough work for both threads
    batches = list(DataLoader(data, batch_size=8, num_workers=2, timeout=60))
    assert same_bits(torch.cat(batches), expected)


# ---- one network, many callers --------------------------------------------------------------------------------------


@functools.cache
def wrapped() -> EarlyExit:
    fit_on, calibrate_on, _ = digits()
    ee = EarlyExit(trained(), fit_on[0][0][:1]).fit(fit_on[:4], progress=False)
    ee.calibrate(calibrate_on, flops=0.7, progress=False)
    return ee


def batches() -> list[torch.Tensor]:
    x = torch.cat([x for x, _ in digits()[2]])
    return [x[:1], x[1:9], x[9:70], x[70:100], x[100:300], x[3:4]]


@pytest.mark.parametrize("threads_inside", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_threads_on_one_network(threads_inside, compiled):
    """Each gets the bits that it would get alone, whatever sizes the others bring; streams do not mix."""
    torch.set_num_threads(threads_inside)
    torch._dynamo.reset()
    ee = wrapped()
    if compiled:
        ee = ee.at_exits(ee.exit_names)
        ee.thresholds = wrapped().thresholds
        ee.compile(backend="eager")
    expected = [ee.predict(x) for x in batches()]
    together = threading.Barrier(CALLERS)

    def caller(number):
        torch.set_num_threads(threads_inside)
        together.wait(timeout=60)
        order = [(number + i) % len(expected) for i in range(len(expected))]
        if number % 4 == 3:
            streamed = list(ee.predict_stream([batches()[i] for i in order], batch_size=32))
            assert [len(d.exit) for d in streamed] == [len(expected[i].exit) for i in order]
            return []
        return [(i, ee.predict(batches()[i])) for i in order]

    with ThreadPoolExecutor(CALLERS) as pool:
        for answers in pool.map(caller, range(CALLERS)):
            for i, decisions in answers:
                assert_same_decisions(decisions, expected[i])


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes(start):
    """Also forked from a parent that has computed on several threads."""
    torch.set_num_threads(1)
    ee = wrapped()
    expected = [ee.predict(x) for x in batches()]
    torch.set_num_threads(2)
    ee.predict(batches()[-2])
    context = multiprocessing.get_context(start)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        found = pool.map(predict_in_worker, [ee] * len(expected), batches(), timeout=120)
        for columns, decisions in zip(found, expected, strict=True):
            assert_same_decisions(Decisions(*columns), decisions)
