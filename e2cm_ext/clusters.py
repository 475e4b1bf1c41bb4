"""Clusters, where there are no labels: found by k-means, given the same numbers everywhere, and judged.

scikit-learn finds and judges them, scipy matches their numbers: `pip install 'e2cm_ext[clusters]'`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .data.loader import Loader, check_reiterable, device_and_dtype
from .heads.base import keep_dtype, positive_int, refuse_non_finite
from .stages import Stages
from .utils import distributed

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Centres",
    "Clustered",
    "Scores",
    "centres_of",
    "clustered_stages",
    "k_means",
    "matching",
    "sample",
    "scores",
    "with_centres",
    "without_centres",
]

_STARTS = 10  # of k-means; the best of them is taken


# ---- the answer of a network whose classes are clusters -------------------------------------------------------------


class Centres(nn.Module):
    """Features [B, D] -> log-probabilities [B, K] of the clusters, by their distances to the clusters' centres.

    A probability is proportional to 1 / (1 + distance^2 / spread), which is Student's t with one degree of freedom: the
    likeliest cluster is the one with the nearest centre. A row of NaN belongs to none, and comes out as NaN.
    """

    means: Tensor  # [K, D] float32, whatever the network's dtype
    spread: Tensor  # a number, float32

    def __init__(self, means: Tensor, spread: Tensor | float = 1.0) -> None:
        super().__init__()
        if means.dim() != 2:
            raise ValueError(f"`means` has shape {list(means.shape)}; wanted [clusters, features]")
        self.register_buffer("means", means.detach().float().contiguous())
        self.register_buffer("spread", torch.as_tensor(spread, dtype=torch.float32, device=means.device))

    def forward(self, x: Tensor) -> Tensor:
        distances = ops.class_distances(x, self.means, self.means.mean(0))
        return (-(distances.square() / self.spread).log1p()).log_softmax(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(keep_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self


class Clustered(nn.Module):
    """The last stage of a network, and the centres that its output is compared with."""

    def __init__(self, network: nn.Module, centres: Centres) -> None:
        super().__init__()
        self.network, self.centres = network, centres
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        log_probs: Tensor = self.centres(self.network(x))
        return log_probs


def with_centres(stages: Stages, centres: Centres | None) -> Stages:
    """The same network, answering with clusters."""
    if centres is None:
        return stages
    *early, last = stages
    return Stages([*early, Clustered(last, centres)], stages.names)


def without_centres(stages: Stages) -> tuple[Stages, Centres | None]:
    """The network as it was, and the centres that it was given, if any."""
    *early, last = stages
    if not isinstance(last, Clustered):
        return stages, None
    return Stages([*early, last.network], stages.names), last.centres


# ---- finding them ---------------------------------------------------------------------------------------------------


def clustered_stages(stages: Stages, loader: Loader, clusters: int) -> Stages:
    """The same network, answering with clusters of what it answers for the loader's images. Of all processes."""
    check_reiterable(loader, 2)
    with distributed.synchronize_errors("fit"):
        mine = sample(stages(images) for images in loader.images("clusters") if len(images))
    rows = distributed.all_gather_objects(mine)
    centres = distributed.broadcast_from_rank0(lambda: centres_of(torch.cat(rows), clusters))
    device, _ = device_and_dtype(stages)
    return with_centres(stages, centres.to(device))


def sample(batches: Iterable[Tensor], most: int = 20_000, seed: int = 0) -> Tensor:
    """So many of all rows of the batches [B, D], drawn at random: float32 on the CPU, and never more are held."""
    generator = torch.Generator().manual_seed(seed)
    rows, keys = None, torch.empty(0)
    for batch in batches:
        refuse_non_finite(batch)
        new = batch.detach().float().cpu()
        rows = new if rows is None else torch.cat([rows, new])
        keys = torch.cat([keys, torch.rand(len(new), generator=generator)])
        if len(rows) > most:
            keys, kept = keys.topk(most, largest=False)
            rows = rows[kept]
    return torch.empty(0) if rows is None else rows  # another process may have some


def k_means(rows: Tensor, clusters: int, seed: int = 0, starts: int = _STARTS) -> tuple[Tensor, Tensor]:
    """Centres [K, D] of rows [N, D], and which of them is the nearest to each row: the best of several starts."""
    positive_int("clusters", clusters)
    if not len(rows):
        raise ValueError("the loader gave no sample: all its batches are empty")
    if len(torch.unique(rows, dim=0)) < clusters:
        raise ValueError(f"`clusters` is {clusters}; there are only {len(torch.unique(rows, dim=0))} different samples")
    found = _library("sklearn.cluster").KMeans(clusters, n_init=starts, random_state=seed).fit(rows.cpu().numpy())
    means = torch.as_tensor(found.cluster_centers_, dtype=torch.float32, device=rows.device)
    return means, torch.as_tensor(found.labels_, dtype=torch.int64, device=rows.device)


def centres_of(rows: Tensor, clusters: int, seed: int = 0) -> Centres:
    """By k-means; the spread is the mean squared distance to a sample's own centre."""
    means, nearest = k_means(rows, clusters, seed)
    spread = (rows - means[nearest]).square().sum(1).mean()
    return Centres(means, spread if spread > 0 else 1.0)


# ---- the same numbers, and how good they are ------------------------------------------------------------------------


def matching(clusters: Tensor, others: Tensor, count: int) -> Tensor:
    """For every cluster, the number of the other that it is: one to one, with as many samples as can be in both.

    [count] int64, such that matching[clusters] agrees with `others` as often as any renumbering can: the Hungarian
    algorithm on the contingency table of the two.
    """
    table = _contingency(clusters, others, count)
    _, numbers = _library("scipy.optimize").linear_sum_assignment(table.numpy(), maximize=True)
    return torch.as_tensor(numbers, dtype=torch.int64, device=clusters.device)


class Scores(NamedTuple):
    """How well clusters agree with the truth, whatever their numbers."""

    accuracy: float  # share of samples whose cluster is that of their class, under the best one-to-one matching
    nmi: float  # normalised mutual information, by the arithmetic mean of the entropies
    ari: float  # adjusted Rand index


def scores(clusters: Tensor, truth: Tensor) -> Scores:
    """Clustering accuracy, NMI and ARI of cluster numbers [N] against the true classes [N], which nothing else needs.

    With more clusters than classes, or fewer, those that are left over count as errors.
    """
    if clusters.shape != truth.shape or clusters.dim() != 1:
        raise ValueError(
            f"`clusters` has shape {list(clusters.shape)}, `truth` {list(truth.shape)}; wanted [samples] both"
        )
    if not len(truth):
        return Scores(math.nan, math.nan, math.nan)
    count = 1 + int(torch.maximum(clusters.max(), truth.max()))
    agreeing = matching(clusters, truth, count)[clusters] == truth
    metrics = _library("sklearn.metrics")
    pair = truth.cpu().numpy(), clusters.cpu().numpy()
    return Scores(
        float(agreeing.double().mean()),
        float(metrics.normalized_mutual_info_score(*pair)),
        float(metrics.adjusted_rand_score(*pair)),
    )


def _contingency(clusters: Tensor, others: Tensor, count: int) -> Tensor:
    """[count, count]: how many samples are in this cluster of the first and that of the second."""
    for name, numbers in (("clusters", clusters), ("others", others)):
        if len(numbers) and not (int(numbers.min()) >= 0 and int(numbers.max()) < count):
            raise ValueError(f"`{name}` go from {int(numbers.min())} to {int(numbers.max())}; wanted 0 to {count - 1}")
    return (clusters.long() * count + others.long()).bincount(minlength=count * count).reshape(count, count).cpu()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"clusters need {name.partition('.')[0]}, which is not installed: pip install 'e2cm_ext[clusters]'"
        ) from error
