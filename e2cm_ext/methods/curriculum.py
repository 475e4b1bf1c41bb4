"""Multi-exit curriculum learning (Bakhtiarnia, Zhang and Iosifidis, 2021): easy samples first.

From the papers: Every training sample has a difficulty. Batches are drawn from the easiest part of the data. The part
starts with 4% of the data and is multiplied by 1.9 after a fixed number of batches, until it is the whole. The two
scores of difficulty and the pacing are those of Hacohen and Weinshall (2019), on which the method rests. There are two
controls: order="anti", the most difficult samples first, and order="random", the same pacing without an order by
difficulty.

Ours, where the source leaves it open: An epoch has as many batches as would hold all the data once, also while batches
are drawn from a part of it.

`paced` returns a loader, so a curriculum works with the `train` of every method here.
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
from .training import Cached, concatenate, generator, rank_and_world_size

__all__ = ["Pacing", "loss_of", "paced", "subset_size", "transfer_of"]

Order = Literal["curriculum", "anti", "random"]

_ANY_CLASS_COUNT = 1 << 31  # labels are checked against a number of classes, which is not known here
_ORDER_SEED = 1 << 20  # in the place of an epoch: no epoch has this number


# ---- difficulty -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def loss_of(model: nn.Module, loader: Iterable[Any], progress: bool = True) -> Tensor:
    """Score difficulty by the loss of a trained network.

    Args:
        model: The network, in eval mode.
        loader: Yields (images, labels), in a fixed order.
        progress: Show a progress bar.

    Returns:
        [N] float64: the cross-entropy of every sample, in the order of the loader.

    Raises:
        RuntimeError: The network is in train mode.

    Example:
        difficulty = curriculum.loss_of(model, loader, progress=False)
    """
    refuse_train_mode(model, "loss_of")
    losses = []
    for images, labels in Loader(loader, model, num_classes=_ANY_CLASS_COUNT, progress=progress).run("difficulty"):
        losses.append(F.cross_entropy(model(images).double(), labels, reduction="none").cpu())
    return concatenate(losses)


@torch.no_grad()
def transfer_of(model: nn.Module, loader: Iterable[Any], progress: bool = True) -> Tensor:
    """Score difficulty by a linear support vector machine on the features of a trained network.

    The features are the inputs of the network's last linear layer. Needs scikit-learn.

    Args:
        model: A network with a torch.nn.Linear, in eval mode.
        loader: Yields (images, labels), in a fixed order.
        progress: Show a progress bar.

    Returns:
        [N] float64: for every sample, minus the margin between the true class and the best other one.

    Raises:
        ImportError: scikit-learn is not installed.
        RuntimeError: The network is in train mode.
        ValueError: The network has no linear layer, or the loader yields no sample.

    Example:
        difficulty = curriculum.transfer_of(model, loader, progress=False)
    """
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
    feature_batches: list[Tensor] = []
    label_batches: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, inputs: feature_batches.append(inputs[0].flatten(1).cpu()))
    try:
        for images, batch_labels in Loader(loader, model, num_classes=_ANY_CLASS_COUNT, progress=progress).run(
            "features"
        ):
            model(images)
            label_batches.append(batch_labels.cpu())
    finally:
        hook.remove()
    features, labels = concatenate(feature_batches).double().numpy(), concatenate(label_batches)
    machine = make_pipeline(StandardScaler(), LinearSVC(dual=False)).fit(features, labels.numpy())
    scores = torch.from_numpy(machine.decision_function(features))
    if scores.dim() == 1:  # with two classes there is one score, that of the second
        scores = torch.stack([-scores, scores], 1)
    column = torch.searchsorted(torch.from_numpy(machine.classes_), labels)
    true_score = scores.gather(1, column[:, None])
    others = scores.scatter(1, column[:, None], -math.inf)
    return others.amax(1) - true_score[:, 0]


# ---- pacing ---------------------------------------------------------------------------------------------------------


def subset_size(batch: int, count: int, start: float = 0.04, growth: float = 1.9, every: int = 100) -> int:
    """Compute the size of the part of the data that a batch is drawn from.

    Args:
        batch: The number of the batch, from 0, over all epochs.
        count: Samples in the data set.
        start: The part of the data at first, from 0 to 1.
        growth: The factor by which the part grows.
        every: After how many batches it grows.

    Returns:
        From 1 to `count`.

    Example:
        size = curriculum.subset_size(250, 50_000)  # 7220: 4% times 1.9 squared
    """
    steps = batch // every
    if steps * math.log(growth) + math.log(start) >= 0:  # its power could be too large for a float
        return count
    return max(1, min(count, round(start * growth**steps * count)))


class Pacing(Sampler[list[int]]):
    """A batch_sampler for a DataLoader: sample numbers, batch by batch. The samples of a batch are distinct.

    Under torch.distributed every process gets its share of every batch.

    Args:
        difficulty: One number per sample.
        batch_size: Samples per batch, of all processes together.
        order: "curriculum" (easy samples first), "anti" (difficult ones first) or "random" (neither).
        start: The part of the data that the first batches are drawn from.
        growth: The factor by which it grows.
        every: After how many batches it grows.
        seed: Of the draws.

    Raises:
        ValueError: An argument makes no sense, or a difficulty is NaN.

    Example:
        data = torch.utils.data.TensorDataset(images, labels)
        pacing = curriculum.Pacing(torch.rand(len(images)), batch_size=16, every=10)
        batches = torch.utils.data.DataLoader(data, batch_sampler=pacing)
    """

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
            self.order = torch.randperm(len(difficulty), generator=generator(seed, _ORDER_SEED))
        else:
            self.order = difficulty.cpu().argsort(stable=True, descending=order == "anti")
        self.batch_size, self._pace, self._seed, self._epoch = batch_size, (start, growth, every), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, on which the part of the data and the draws depend."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        of_epoch = generator(self._seed, self._epoch)
        rank, processes = rank_and_world_size()
        for number in range(len(self)):
            size = subset_size(self._epoch * len(self) + number, len(self.order), *self._pace)
            rows = torch.randperm(size, generator=of_epoch)[: self.batch_size]
            yield self.order[rows][rank::processes].tolist()


class _PacedCache:
    """The loader of `paced` for cached features."""

    def __init__(self, cached: Cached, pacing: Pacing) -> None:
        self.cached, self.pacing = cached, pacing

    def set_epoch(self, epoch: int) -> None:
        self.cached.set_epoch(epoch)
        self.pacing.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.pacing)

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        rows = self.cached.variant_rows()
        for samples in self.pacing:
            yield self.cached.batch(rows[samples])


def paced(data: Dataset[Any] | Cached, difficulty: Tensor, batch_size: int = 128, **options: Any) -> Any:
    """Make a loader that gives easy samples first, for the `train` of any method.

    Args:
        data: A data set of (image, label), indexed by number; or what `training.cache` returns.
        difficulty: One number per sample, see `loss_of` and `transfer_of`.
        batch_size: Samples per batch.
        **options: Those of `Pacing`; and for a data set `loader`, a dict of options of the DataLoader, such as
            loader={"num_workers": 4}.

    Returns:
        A loader of (images, labels), or of (features, labels).

    Raises:
        ValueError: There are not as many difficulties as samples, or an option makes no sense.

    Example:
        data = torch.utils.data.TensorDataset(images, labels)
        easy_first = curriculum.paced(data, torch.rand(len(images)), batch_size=50, every=10)
        sdn.train(sdn.build(model, images[:1], exits=2), easy_first, epochs=2, progress=False)
    """
    loader_options = options.pop("loader", {})
    pacing = Pacing(difficulty, batch_size, **options)
    count = data.count if isinstance(data, Cached) else len(data)  # type: ignore[arg-type]
    if count != len(difficulty):
        raise ValueError(f"`difficulty` holds {len(difficulty)} numbers; the data {count} samples")
    if isinstance(data, Cached):
        return _PacedCache(data, pacing)
    return DataLoader(data, batch_sampler=pacing, **loader_options)
