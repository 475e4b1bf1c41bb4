"""Many callers at once: Python threads on one op, and worker processes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import clusters, generator, laid_out, same_bits
from torch.utils.data import DataLoader, Dataset

from e2cm_ext import Decisions, ops

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
