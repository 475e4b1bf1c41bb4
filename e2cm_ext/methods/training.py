"""The training of exits by gradient descent: one loop, for all methods.

What is trained is one of two modules: Learners, the heads alone, from features of a network that does not change, or
Joint, heads and network together, from images. Both return, for every exit, what its head says (LearnedHead.outputs),
and at last the network's own logits; a loss makes one number of that list and the labels.

The network of Learners stays in eval mode, so its batch normalisation keeps its statistics; no gradient is computed in
it; and what heads need of its features can be kept, in memory or on disk: `cache`. An epoch then costs what the heads
cost.

A run that is killed goes on from its checkpoint, and ends with the bits that it would have had: the same weights, for
the same loader, on the same machine. All random numbers of an epoch follow from the seed and the epoch's number, so the
loader must draw its own (order, augmentation) from torch's default generator, or from what `set_epoch` tells it.

Under torchrun every process calls `run` on its share of the data: DistributedDataParallel averages the gradients.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from .. import data
from ..checkpoint import weights_sha256
from ..data.loader import place_of, placed, refuse_train_mode
from ..early_exit import EarlyExit
from ..utils import serialization
from .learned_head import LearnedHead

__all__ = [
    "Cached",
    "Features",
    "Joint",
    "Learners",
    "Loss",
    "Outputs",
    "cache",
    "falling",
    "finish",
    "generator",
    "rank",
    "run",
    "same",
    "seeded",
]

Outputs = list[Any]  # M outputs of heads (logits, or tuples that begin with them), and the network's logits
Loss = Callable[[Outputs, Tensor, int], Tensor]  # outputs, labels, number of the epoch (from 0) -> a scalar
T = TypeVar("T")


# ---- what is trained ------------------------------------------------------------------------------------------------


class Features:
    """Images -> for every exit, what its head needs of the features, and the network's logits: no gradient.

    What is already that, from `cache`, is handed through.
    """

    def __init__(self, ee: EarlyExit) -> None:
        self.stages, self.heads = ee.stages, _learned(ee)

    @torch.no_grad()
    def __call__(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        if isinstance(images, list):
            return images
        x = placed(images, self.stages)
        found = []
        *early, last = self.stages
        for stage, head in zip(early, self.heads, strict=True):
            x = stage(x)
            squeezed = head.squeeze(x)
            # The next stage may overwrite x.
            shared = squeezed.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            found.append(squeezed.clone() if shared else squeezed)
        return [*found, last(x)]


class Learners(nn.Module):
    """The heads of a network with early exits, to be trained on its Features."""

    def __init__(self, ee: EarlyExit) -> None:
        super().__init__()
        _learned(ee)
        self.heads = ee.heads

    def forward(self, features: Sequence[Tensor]) -> Outputs:
        *squeezed, logits = features
        return [*(head.outputs(x) for head, x in zip(self.heads, squeezed, strict=True)), logits]  # type: ignore[operator]


class Joint(nn.Module):
    """A network with early exits, to be trained as a whole, on images: the model's own weights change.

    In train mode its modules are, too (dropout, batch normalisation); but what forward() of the model decided by
    `self.training` itself stays as in eval mode, in which it was cut.
    """

    def __init__(self, ee: EarlyExit) -> None:
        super().__init__()
        _learned(ee)
        self.stages, self.heads = ee.stages, ee.heads
        self._overwritten = _overwritten(ee)

    def forward(self, images: Tensor) -> Outputs:
        x = placed(images, self.stages)
        outputs: Outputs = []
        *early, last = self.stages
        for stage, head, overwritten in zip(early, self.heads, self._overwritten, strict=True):
            x = stage(x)
            kept = x.clone() if overwritten and self.training else x
            outputs.append(head.outputs(head.squeeze(kept)))  # type: ignore[operator]
        return [*outputs, last(x)]


def finish(ee: EarlyExit) -> EarlyExit:
    """After training: eval mode, heads that may be used, thresholds at +inf."""
    for head in ee.heads:
        head.fitted = True  # type: ignore[assignment]
    ee.thresholds = math.inf
    return ee.eval()


def _learned(ee: EarlyExit) -> list[LearnedHead]:
    if not isinstance(ee, EarlyExit):
        raise TypeError(f"`ee` is a {type(ee).__name__}; wanted an EarlyExit")
    for head, name in zip(ee.heads, ee.exit_names, strict=True):
        if not isinstance(head, LearnedHead):
            raise TypeError(f"the head at {name!r} is a {type(head).__name__}; wanted one that learns by gradients")
    return list(ee.heads)  # type: ignore[arg-type]


@torch.no_grad()
def _overwritten(ee: EarlyExit) -> list[bool]:
    """By the next stage: the features at every exit."""
    device, _ = place_of(ee.stages)
    x = placed(torch.zeros(1, *ee.image_shape, dtype=ee.image_dtype, device=device), ee.stages)
    found = []
    x = ee.stages[0](x)
    for stage in list(ee.stages)[1:]:
        before = x._version
        y = stage(x)
        found.append(x._version != before)
        x = y
    return found


# ---- features that are kept -----------------------------------------------------------------------------------------


class Cached:
    """Features of a whole data set: batches (features, labels), in an order that follows from seed and epoch.

    variants: so many times the data set is there, one after the other; an epoch takes every sample once, in a variant
    that is drawn. Under torch.distributed every process gets its share of every batch.
    """

    def __init__(
        self, features: list[Tensor], labels: Tensor, batch_size: int = 128, seed: int = 0, variants: int = 1
    ) -> None:
        self.features, self.labels, self.batch_size, self.seed = features, labels, batch_size, seed
        self._variants, self.count = variants, len(labels) // variants
        if not torch.equal(labels, labels[: self.count].repeat(variants)):
            raise ValueError(f"`variants` is {variants}; the labels are not so many times the same")
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        order = torch.randperm(self.count, generator=generator(self.seed, self._epoch, 0))
        order = self.drawn()[order]
        own, processes = rank()
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            # Of a last batch with fewer samples than processes some go to several, since none can do without.
            yield self.batch(rows[own % len(rows) :: processes])

    def drawn(self) -> Tensor:
        """[samples]: in which row each sample's variant of this epoch stands."""
        which = torch.randint(self._variants, (self.count,), generator=generator(self.seed, self._epoch, 1))
        return torch.arange(self.count) + self.count * which

    def batch(self, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        return [column[rows].float() for column in self.features], self.labels[rows]


def cache(
    ee: EarlyExit,
    loader: Iterable[Any],
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 128,
    seed: int = 0,
    variants: int = 1,
    progress: bool = True,
) -> Cached:
    """One pass over (images, labels), and what the heads need of them is there for all epochs.

    folder: kept there, for this and later runs, and read from there as needed; what is found there is used if it is of
    the same network and heads, else a ValueError says so. Without it, kept in memory. dtype: torch.float16 takes half
    the room, and rounds. variants: the loader gives the data set so many times, in the same order, each time augmented
    in another way.
    """
    if folder is None:
        columns, labels = _gathered(ee, loader, dtype, progress)
        return Cached(columns, labels, batch_size, seed, variants)
    folder = Path(folder)
    if not (folder / _ABOUT).exists():
        _write_cache(ee, loader, folder, dtype, progress)
    return Cached(*_read_cache(ee, folder), batch_size, seed, variants)


_ABOUT = "about.json"
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.float64: np.float64}


def _batches_of_features(ee: EarlyExit, loader: Iterable[Any], progress: bool) -> Iterator[tuple[list[Tensor], Tensor]]:
    features = Features(ee)
    checked = ee.batches(loader, progress)
    refuse_train_mode(ee, "cache")
    for images, labels in checked.run("features", finite=True):
        yield features(images), labels


def _gathered(ee: EarlyExit, loader: Iterable[Any], dtype: torch.dtype, progress: bool) -> tuple[list[Tensor], Tensor]:
    columns: list[list[Tensor]] = [[] for _ in range(len(ee.heads) + 1)]
    labels = []
    for features, truth in _batches_of_features(ee, loader, progress):
        for column, x in zip(columns, features, strict=True):
            column.append(x.to(dtype))
        labels.append(truth)
    if not labels:
        raise ValueError("the loader gave no sample: all its batches are empty")
    return [torch.cat(column) for column in columns], torch.cat(labels)


def _write_cache(ee: EarlyExit, loader: Iterable[Any], folder: Path, dtype: torch.dtype, progress: bool) -> None:
    """Under another name, until it is complete."""
    if dtype not in _NUMPY:
        raise ValueError(f"`dtype` is {dtype}; wanted one of {', '.join(map(str, _NUMPY))}")
    if folder.exists():
        raise ValueError(f"{folder} is there, but holds no features (no {_ABOUT}): give another folder")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        shapes: list[list[int]] = []
        labels = []
        with contextlib.ExitStack() as stack:
            columns = [stack.enter_context(open(partial / f"{j}.bin", "wb")) for j in range(len(ee.heads) + 1)]
            for features, truth in _batches_of_features(ee, loader, progress):
                shapes = [list(x.shape[1:]) for x in features]
                for column, x in zip(columns, features, strict=True):
                    column.write(serialization.bytes_of(x.to(dtype)))
                labels.append(truth.cpu())
        if not labels:
            raise ValueError("the loader gave no sample: all its batches are empty")
        np.save(partial / "labels.npy", torch.cat(labels).numpy())
        about = {"of": _about(ee), "dtype": str(dtype).removeprefix("torch."), "shapes": shapes}
        (partial / _ABOUT).write_text(json.dumps(about))
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _read_cache(ee: EarlyExit, folder: Path) -> tuple[list[Tensor], Tensor]:
    about = json.loads((folder / _ABOUT).read_text())
    if about["of"] != _about(ee):
        raise ValueError(f"{folder} holds features of another network or for other heads: give another folder")
    labels = torch.from_numpy(np.load(folder / "labels.npy"))
    kind = _NUMPY[getattr(torch, about["dtype"])]
    columns = [
        # Mode "c": torch wants to be able to write; what is written would stay in memory.
        torch.from_numpy(np.memmap(folder / f"{j}.bin", kind, "c", shape=(len(labels), *shape)))
        for j, shape in enumerate(about["shapes"])
    ]
    return columns, labels


def _about(ee: EarlyExit) -> dict[str, Any]:
    return {
        "network": weights_sha256(ee.stages),
        "exits": list(ee.exit_names),
        "heads": [head.config() for head in ee.head_list()],
    }


# ---- small things that methods need ---------------------------------------------------------------------------------


def same(inputs: T) -> T:
    return inputs


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """New weights are drawn as this seed says; torch's generators are left as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def falling(
    optimizer: torch.optim.Optimizer, epochs: int, parts: Sequence[float], factor: float = 0.1
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate, times `factor` after each of these parts of the training, rounded to whole epochs: not before
    the first has ended."""
    ends = [max(1, round(part * epochs)) for part in parts]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, ends, factor)


# ---- the loop -------------------------------------------------------------------------------------------------------


def run(
    module: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    prepare: Callable[[Any], Any] = same,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    every: float = 60.0,
    precision: torch.dtype | None = None,
    num_classes: int | None = None,
    progress: bool = True,
) -> list[float]:
    """Trains `module`; returns the mean loss of every epoch. It is left in eval mode.

    loader: yields (inputs, labels); the module is called with prepare(inputs). Its set_epoch(epoch), or that of its
    sampler or batch_sampler, is called before every epoch. optimizer: of the module's parameters; schedule: stepped
    after every epoch. checkpoint: a file to go on from if it is there, written every so many seconds (under
    torch.distributed at the end of epochs only) and at the end. precision: of the forward pass, by autocast; None: on
    GPUs torch.bfloat16 where they have it, else float32. num_classes: labels are classes, and looked at before they get
    into the loss. torch's generators are left as they were.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"`epochs` is {epochs!r}; wanted a whole number, 0 or more")
    if checkpoint is not None and not Path(checkpoint).absolute().parent.is_dir():
        raise FileNotFoundError(f"`checkpoint` is {str(checkpoint)!r}: there is no such folder to write it to")
    device, _ = place_of(module)
    kind = device.type
    if precision is None and kind == "cuda" and torch.cuda.is_bf16_supported():
        precision = torch.bfloat16
    own, processes = rank()
    called: nn.Module = module
    if processes > 1:  # a loss need not look at everything in every epoch
        called = DistributedDataParallel(module, find_unused_parameters=True)
    scaler = torch.amp.GradScaler(kind, enabled=precision is torch.float16)
    state = _State(module, optimizer, schedule, scaler, epochs, seed)
    devices = [device] if kind == "cuda" else []
    with torch.random.fork_rng(devices):
        if checkpoint is not None and Path(checkpoint).exists():
            state.load(Path(checkpoint), device)
        module.train()
        try:
            for epoch in range(state.epoch, epochs):
                _announce(loader, epoch)
                torch.manual_seed(_mixed(seed, epoch, own))
                written = time.monotonic()
                with _bar(loader, f"epoch {epoch + 1} of {epochs}", progress and own == 0) as batches:
                    for number, (inputs, labels) in enumerate(batches):
                        if number < state.batch:  # this run goes on from a checkpoint
                            if number == state.batch - 1:
                                state.restore_random_numbers(devices)
                            continue
                        if num_classes is not None:
                            count = len(inputs[0] if isinstance(inputs, list) else inputs)
                            labels = data.class_numbers(labels, f"batch {number}", count, num_classes)
                            if count == 0 and processes == 1:  # the mean of no losses is NaN
                                state.batch += 1
                                continue
                        inputs, labels = _to(inputs, device), _to(labels, device)
                        optimizer.zero_grad()
                        with torch.autocast(kind, precision, enabled=precision is not None):
                            value = loss(called(prepare(inputs)), labels, epoch)
                        scaler.scale(value).backward()  # type: ignore[no-untyped-call]
                        scaler.step(optimizer)
                        scaler.update()
                        state.count(value.detach(), len(labels))
                        if checkpoint is not None and processes == 1 and time.monotonic() - written >= every:
                            state.save(Path(checkpoint), devices)
                            written = time.monotonic()
                state.close_epoch()
                if schedule is not None:
                    schedule.step()
                if checkpoint is not None and own == 0:
                    state.save(Path(checkpoint), devices)
        finally:
            module.eval()
    return state.losses


class _State:
    """Where a run is, and all that it needs to go on from there."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
        scaler: torch.amp.GradScaler,
        epochs: int,
        seed: int,
    ) -> None:
        self.parts: dict[str, Any] = {"module": module, "optimizer": optimizer, "scaler": scaler}
        if schedule is not None:
            self.parts["schedule"] = schedule
        shapes = {name: list(value.shape) for name, value in module.state_dict().items()}
        self.about = json.dumps([type(optimizer).__name__, epochs, seed, shapes])
        self.losses: list[float] = []
        self.epoch = self.batch = 0  # that come next
        self.sum, self.samples = torch.zeros((), dtype=torch.float64), 0
        self._random: list[Tensor] = []

    def count(self, value: Tensor, samples: int) -> None:
        self.batch += 1
        self.samples += samples
        self.sum = self.sum.to(value.device) + value.double() * samples

    def close_epoch(self) -> None:
        self.check()
        if not self.samples:
            raise ValueError("the loader gave no sample; it may be used up: give one that can be run through again")
        self.losses.append(float(self.sum) / self.samples)
        self.epoch += 1
        self.batch, self.sum, self.samples = 0, torch.zeros((), dtype=torch.float64), 0

    def check(self) -> None:
        if not self.sum.isfinite():
            raise ValueError(
                f"the loss became {float(self.sum)} in epoch {self.epoch + 1}, at batch {self.batch} or before: a "
                "lower learning rate may help"
            )

    def save(self, path: Path, devices: list[torch.device]) -> None:
        self.check()
        state = {
            **{name: part.state_dict() for name, part in self.parts.items()},
            "about": self.about,
            "position": [self.epoch, self.batch, self.samples],
            "sum": self.sum,
            "losses": self.losses,
            "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)],
        }
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with open(partial, "xb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def load(self, path: Path, device: torch.device) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            about = state["about"]
        except Exception as error:
            raise ValueError(f"{path} is no checkpoint, or damaged: delete it to start anew ({error})") from error
        if about != self.about:
            raise ValueError(f"{path} is of another training (module, optimizer, epochs or seed): give another file")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.epoch, self.batch, self.samples = state["position"]
        self.sum, self.losses, self._random = state["sum"], state["losses"], state["random"]

    def restore_random_numbers(self, devices: list[torch.device]) -> None:
        """As they were when the checkpoint was written, before the loader makes the next batch."""
        cpu, *gpus = self._random
        torch.set_rng_state(cpu)
        for device, random in zip(devices, gpus, strict=True):
            torch.cuda.set_rng_state(random, device)


# ---- small parts ----------------------------------------------------------------------------------------------------


def rank() -> tuple[int, int]:
    """Which process this is, of how many."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int) -> torch.Generator:
    """Whose numbers follow from these."""
    return torch.Generator().manual_seed(_mixed(*numbers))


def _announce(loader: Any, epoch: int) -> None:
    for listener in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        announce = getattr(listener, "set_epoch", None)
        if announce is not None:
            announce(epoch)


def _bar(loader: Iterable[T], what: str, progress: bool) -> Any:
    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:
        total = None
    return tqdm(loader, total=total, desc=what, unit="batch", disable=not progress, leave=False)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(_to(each, device) for each in value) if isinstance(value, list | tuple) else value
