"""Multi-exit curriculum learning (Bakhtiarnia, Zhang and Iosifidis, 2021): easy samples first.

    difficulty = curriculum.loss_of(model, loader)                     # one number for every sample
    sdn.train(ee, curriculum.paced(dataset, difficulty))               # or any other method's train

Batches are drawn from the easiest part of the data: 4% of it at first, 1.9 times as much after every so many batches,
until it is all. (The pacing and the two scores are Hacohen and Weinshall's, 2019, on whom the method rests.)

Controls: order="anti", the most difficult first, and order="random", as much as that, but any. Ours, where the source
is silent: an epoch is as many batches as would hold all the data once, also while they are drawn from a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.loader import Loader, refuse_train_mode
from .training import Cached, generator, rank

__all__ = ["Pacing", "loss_of", "paced", "size", "transfer_of"]

Order = Literal["curriculum", "anti", "random"]


# ---- difficulty -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def loss_of(model: nn.Module, loader: Iterable[Any], progress: bool = True) -> Tensor:
    """[N] float64: the loss of a trained network on every sample, in the order of the loader."""
    refuse_train_mode(model, "loss_of")
    found = []
    for images, labels in Loader(loader, model, num_classes=_MANY, progress=progress).run("difficulty"):
        found.append(F.cross_entropy(model(images).double(), labels, reduction="none").cpu())
    return _joined(found)


@torch.no_grad()
def transfer_of(model: nn.Module, loader: Iterable[Any], progress: bool = True) -> Tensor:
    """[N] float64: how little a linear support vector machine is sure of every sample, on what a trained network hands
    to its last linear layer: minus the margin between the true class and the best other one. Needs scikit-learn."""
    try:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise ImportError("transfer_of needs scikit-learn: pip install scikit-learn") from error
    refuse_train_mode(model, "transfer_of")
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"`model` is a {type(model).__name__} without a torch.nn.Linear; wanted one that ends in one")
    seen: list[Tensor] = []
    truth: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).cpu()))
    try:
        for images, labels in Loader(loader, model, num_classes=_MANY, progress=progress).run("features"):
            model(images)
            truth.append(labels.cpu())
    finally:
        hook.remove()
    features, labels = _joined(seen).double().numpy(), _joined(truth)
    machine = make_pipeline(StandardScaler(), LinearSVC(dual=False)).fit(features, labels.numpy())
    scores = torch.from_numpy(machine.decision_function(features))
    if scores.dim() == 1:  # two classes: of the second
        scores = torch.stack([-scores, scores], 1)
    column = torch.searchsorted(torch.from_numpy(machine.classes_), labels)
    own = scores.gather(1, column[:, None])
    others = scores.scatter(1, column[:, None], -math.inf)
    return others.amax(1) - own[:, 0]


_MANY = 1 << 31  # classes; how many there are does not matter here


def _joined(pieces: list[Tensor]) -> Tensor:
    if not pieces:
        raise ValueError("the loader gave no sample: all its batches are empty")
    return torch.cat(pieces)


# ---- pacing ---------------------------------------------------------------------------------------------------------


def size(batch: int, count: int, start: float = 0.04, growth: float = 1.9, every: int = 100) -> int:
    """From how many of `count` samples batch number `batch` (from 0, over all epochs) is drawn: at least one."""
    steps = batch // every
    if steps * math.log(growth) + math.log(start) >= 0:  # a power of it would be too large to hold, some day
        return count
    return max(1, min(count, round(start * growth**steps * count)))


class Pacing(Sampler[list[int]]):
    """Numbers of samples, batch by batch: a batch_sampler for a DataLoader. Each batch holds different samples."""

    def __init__(
        self,
        difficulty: Tensor,
        batch_size: int = 128,
        *,
        order: Order = "curriculum",
        start: float = 0.04,
        growth: float = 1.9,
        every: int = 100,
        seed: int = 0,
    ) -> None:
        if difficulty.dim() != 1 or not len(difficulty) or difficulty.isnan().any():
            raise ValueError(f"`difficulty` is {list(difficulty.shape)}; wanted one number, not NaN, for every sample")
        if not 0 < start <= 1 or not growth > 1 or every < 1:
            raise ValueError(
                f"start={start}, growth={growth}, every={every}; wanted a part of the data, from 0 to 1, that grows, "
                "such as 0.04, 1.9, 100"
            )
        if order not in ("curriculum", "anti", "random"):
            raise ValueError(f"`order` is {order!r}; wanted 'curriculum', 'anti' or 'random'")
        if order == "random":
            self.order = torch.randperm(len(difficulty), generator=generator(seed, _SHUFFLE))
        else:
            self.order = difficulty.cpu().argsort(stable=True, descending=order == "anti")
        self.batch_size, self._pace, self._seed, self._epoch = batch_size, (start, growth, every), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        draw = generator(self._seed, self._epoch)
        mine, processes = rank()
        for number in range(len(self)):
            among = size(self._epoch * len(self) + number, len(self.order), *self._pace)
            rows = torch.randperm(among, generator=draw)[: self.batch_size]
            yield self.order[rows][mine::processes].tolist()


_SHUFFLE = 1 << 20  # no epoch


class _PacedCache:
    def __init__(self, cached: Cached, pacing: Pacing) -> None:
        self.cached, self.pacing = cached, pacing

    def set_epoch(self, epoch: int) -> None:
        self.cached.set_epoch(epoch)
        self.pacing.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.pacing)

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        variants = self.cached.drawn()
        for rows in self.pacing:
            yield self.cached.batch(variants[rows])


def paced(data: Dataset[Any] | Cached, difficulty: Tensor, batch_size: int = 128, **options: Any) -> Any:
    """A loader of `data`, easy samples first, for the train of any method. options: those of Pacing, and for a data set
    (one of samples (image, label) by number) also those of a DataLoader, as a dict: loader={"num_workers": 4}."""
    loader = options.pop("loader", {})
    pacing = Pacing(difficulty, batch_size, **options)
    count = data.count if isinstance(data, Cached) else len(data)  # type: ignore[arg-type]
    if count != len(difficulty):
        raise ValueError(f"`difficulty` holds {len(difficulty)} numbers; the data {count} samples")
    if isinstance(data, Cached):
        return _PacedCache(data, pacing)
    return DataLoader(data, batch_sampler=pacing, **loader)
