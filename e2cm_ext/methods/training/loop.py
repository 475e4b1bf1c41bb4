"""The training loop of all methods.

All random numbers of an epoch follow from the seed and the number of the epoch. So the loader must draw its own (order,
augmentation) from torch's default generator, or derive them from what `set_epoch` tells it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ... import data
from ...data.loader import device_and_dtype
from .checkpoint import TrainingState
from .modules import Loss
from .seeding import mix_seeds, rank_and_world_size

__all__ = ["identity", "run", "step_decay"]

T = TypeVar("T")


def identity(inputs: T) -> T:
    """Return the argument: the `prepare` of `run` for a module that takes images."""
    return inputs


def step_decay(
    optimizer: torch.optim.Optimizer, epochs: int, milestones: Sequence[float], factor: float = 0.1
) -> torch.optim.lr_scheduler.LRScheduler:
    """Multiply the learning rate by `factor` after fractions of the training.

    Args:
        optimizer: Whose learning rates change.
        epochs: Epochs of the whole training.
        milestones: Fractions of the training, from 0 to 1. They are rounded to whole epochs, and to at least one.
        factor: Of the learning rate, at each milestone.

    Returns:
        A schedule, to be stepped after every epoch.

    Example:
        optimizer = torch.optim.Adam(ee.heads.parameters(), 1e-3)
        schedule = training.step_decay(optimizer, 100, (0.5, 0.75))  # 1e-3, from epoch 50 on 1e-4, from 75 on 1e-5
    """
    ends = [max(1, round(fraction * epochs)) for fraction in milestones]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, ends, factor)


def run(
    module: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    prepare: Callable[[Any], Any] = identity,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_interval: float = 60.0,
    precision: torch.dtype | None = None,
    num_classes: int | None = None,
    progress: bool = True,
) -> list[float]:
    """Train a module by gradient descent. It is left in eval mode.

    torch's random number generators are left as they were. For the same seed, loader and machine the trained weights
    are the same, bit for bit, also if the run was interrupted and continued from its checkpoint.

    Args:
        module: `ExitHeads` or `Joint`. Under torch.distributed it is wrapped in DistributedDataParallel.
        loader: Yields (inputs, labels). Its set_epoch(epoch), and that of its sampler and batch_sampler, is called
            before every epoch. Under torch.distributed: the share of this process.
        loss: Called with the module's outputs, the labels and the number of the epoch, from 0; returns a scalar.
        epochs: How many.
        optimizer: Of the module's parameters.
        schedule: Stepped after every epoch.
        prepare: The module is called with prepare(inputs). `Features` for `ExitHeads`.
        seed: Of all random numbers that are drawn from torch's default generators during training.
        checkpoint: A file to continue from, if it exists. It is written during the run and at its end.
        checkpoint_interval: Seconds between two writes. Under torch.distributed the file is written at the end of
            every epoch only.
        precision: Of the forward pass, by autocast. None: on GPUs torch.bfloat16 where they support it, else float32.
        num_classes: Check that labels are class numbers below it, before they get into the loss. None: do not check.
        progress: Show a progress bar.

    Returns:
        The mean loss of every epoch.

    Raises:
        ValueError: The loss became NaN or infinite, the loader yields no sample, labels are no class numbers, or the
            checkpoint belongs to another run.
        FileNotFoundError: The folder of the checkpoint does not exist.

    Example:
        def loss(outputs, labels, epoch):
            return sum(torch.nn.functional.cross_entropy(logits, labels) for logits in outputs[:-1])

        heads = training.ExitHeads(ee)
        optimizer = torch.optim.Adam(heads.parameters(), 1e-3)
        features = training.Features(ee)
        training.run(heads, loader, loss, epochs=2, optimizer=optimizer, prepare=features, progress=False)
        training.finish(ee)
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"`epochs` is {epochs!r}; wanted a whole number, 0 or more")
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"`checkpoint` is {str(checkpoint)!r}: there is no such folder to write it to")
    device, _ = device_and_dtype(module)
    gpus = [device] if device.type == "cuda" else []
    if precision is None and gpus and torch.cuda.is_bf16_supported():
        precision = torch.bfloat16
    rank, processes = rank_and_world_size()
    called: nn.Module = module
    if processes > 1:
        # A loss may ignore some outputs in some epochs.
        called = DistributedDataParallel(module, find_unused_parameters=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    state = TrainingState(module, optimizer, schedule, scaler, epochs, seed)

    def step(inputs: Any, labels: Any, epoch: int) -> Tensor:
        """Take one step of the optimizer, and return the loss."""
        optimizer.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision is not None):
            value = loss(called(prepare(inputs)), labels, epoch)
        scaler.scale(value).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        return value.detach()

    with torch.random.fork_rng(gpus):
        if path is not None and path.exists():
            state.load(path)
        module.train()
        try:
            for epoch in range(state.epoch, epochs):
                set_epoch(loader, epoch)
                torch.manual_seed(mix_seeds(seed, epoch, rank))
                saved_at = time.monotonic()
                with _progress_bar(loader, f"epoch {epoch + 1} of {epochs}", progress and rank == 0) as bar:
                    for number, (inputs, labels) in _remaining(bar, state, gpus):
                        if num_classes is not None:
                            count = len(inputs[0] if isinstance(inputs, list) else inputs)
                            labels = data.class_numbers(labels, f"batch {number}", count, num_classes)
                            if count == 0 and processes == 1:  # the mean loss of no samples is NaN
                                state.batch += 1
                                continue
                        inputs, labels = _to_device(inputs, device), _to_device(labels, device)
                        state.add(step(inputs, labels, epoch), len(labels))
                        due = processes == 1 and time.monotonic() - saved_at >= checkpoint_interval
                        if path is not None and due:
                            state.save(path, gpus)
                            saved_at = time.monotonic()
                state.end_epoch()
                if schedule is not None:
                    schedule.step()
                if path is not None and rank == 0:
                    state.save(path, gpus)
        finally:
            module.eval()
    return state.losses


def set_epoch(loader: Any, epoch: int) -> None:
    """Call set_epoch of a loader, of its sampler and of its batch_sampler, where they have it."""
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        method = getattr(part, "set_epoch", None)
        if method is not None:
            method(epoch)


def _remaining(batches: Iterable[T], state: TrainingState, gpus: list[torch.device]) -> Iterator[tuple[int, T]]:
    """The batches of an epoch with their numbers, without those that were done before the checkpoint was written."""
    done = state.batch
    for number, batch in enumerate(batches):
        if number >= done:
            yield number, batch
        elif number == done - 1:
            state.restore_rng(gpus)


def _progress_bar(loader: Iterable[T], description: str, progress: bool) -> Any:
    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:
        total = None
    return tqdm(loader, total=total, desc=description, unit="batch", disable=not progress, leave=False)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(_to_device(each, device) for each in value) if isinstance(value, list | tuple) else value
