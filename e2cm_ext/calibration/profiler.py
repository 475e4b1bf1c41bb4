"""Measures a profile: the time of every stage and every exit step on this device.

FLOPs say little about time: half a batch takes more than half of the time, and an exit step takes time of its own. So
every stage and every exit step is timed at batch sizes 1, 2, 4, ... All of them are timed once per round, over many
rounds, so that other load on the machine affects all alike; the medians count.

An exit step is timed at the threshold above which half of the samples leave: their decisions are written, the others
are moved. Moving all samples is timed by itself, too: the compaction policy of the runtime uses it. Devices that run
asynchronously (CUDA, ...) are synchronized before every reading of the clock. In a cascade they are synchronized at
every active exit as well, since the number of survivors must be known; at exits that are off they are not, so times
there are slightly too long.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import ops
from ..heads.protocol import ExitNetwork
from ..ops.types import Decisions
from .profile import Profile, check_batch_size

__all__ = ["measure", "median_thresholds"]


@torch.no_grad()
def measure(
    network: ExitNetwork,
    images: Tensor,
    *,
    batch_size: int = 128,
    repeats: int = 10,
    progress: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Measure a profile: medians over `repeats` rounds, after a round that does not count.

    Args:
        network: The network with its exits, all heads fitted.
        images: A batch to run, on the network's device and in its dtype; a smaller one is repeated.
        batch_size: The largest batch size.
        repeats: Number of rounds.
        progress: Show a progress bar.
        clock: Seconds.

    Raises:
        ValueError: `batch_size` or `repeats` is below 1, or there are no images.
    """
    check_batch_size(batch_size)
    if repeats < 1:
        raise ValueError(f"`repeats` is {repeats}; wanted a whole number from 1 on")
    if len(images) == 0:
        raise ValueError(f"`images` has shape {list(images.shape)}; wanted at least one to measure with")
    images = torch.cat([images] * math.ceil(batch_size / len(images)))[:batch_size]
    sizes = (*itertools.takewhile(lambda size: size < batch_size, (1 << k for k in itertools.count())), batch_size)
    batches = [images[:size] for size in sizes]
    limits = [median_thresholds(network, batch) for batch in batches]
    rounds = []
    for _ in tqdm(range(repeats + 1), desc="profile", disable=not progress, leave=False):
        rounds.append([_time_once(network, *pair, clock) for pair in zip(batches, limits, strict=True)])
    seconds = torch.tensor(rounds[1:], dtype=torch.float64, device="cpu").quantile(0.5, dim=0)
    exits = len(network.exit_names)
    first_step, first_move = exits + 1, 2 * exits + 1
    stages, steps, moves = seconds[:, :first_step], seconds[:, first_step:first_move], seconds[:, first_move:]
    return Profile(stages, steps, sizes, network.exit_names, _device_name(images.device), moves)


def median_thresholds(network: ExitNetwork, images: Tensor) -> list[float]:
    """The threshold of every exit above which half of these samples leave."""
    heads, rule = network.head_list(), network.rule
    limits: list[float] = []
    network.walk(images, lambda j, x: limits.append(float(heads[j].score(x, rule)[0].nanmedian())), logits=False)
    return [math.inf if math.isnan(limit) else limit for limit in limits]


def _time_once(
    network: ExitNetwork, images: Tensor, limits: Sequence[float], clock: Callable[[], float]
) -> list[float]:
    """Seconds of M+1 stages, then of M exit steps, then of moving all samples at M exits."""
    heads, rule = network.head_list(), network.rule
    rows, device = len(images), images.device
    stages: list[float] = []
    steps: list[float] = []
    moves: list[float] = []
    all_rows = torch.ones(rows, dtype=torch.bool, device=device)

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return clock()

    start = now()

    def visit(j: int, x: Tensor) -> None:
        nonlocal start
        stages.append(now() - start)
        out, ids = Decisions.empty(rows, heads[j].num_classes, device), torch.arange(rows, device=device)
        start = now()
        heads[j].step(x, limits[j], ids, out, rule=rule, exit=j)
        steps.append(now() - start)
        start = now()
        ops.compact(x, all_rows)
        moves.append(now() - start)
        start = now()

    start = now()
    network.walk(images, visit, logits=True)
    stages.append(now() - start)
    return [*stages, *steps, *moves]


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
