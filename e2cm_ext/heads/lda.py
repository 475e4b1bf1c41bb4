"""Linear discriminant analysis in closed form: scatter matrix, shrinkage, and the weights of a linear classifier.

All of it in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.distributed import all_reduce_sum

__all__ = [
    "RIDGE",
    "ClassMoments",
    "LinearDiscriminant",
    "ScatterMatrix",
    "james_stein_shrinkage",
    "linear_discriminant",
    "oas",
]

RIDGE = 1e-5  # of a feature's overall variance, added to its variance within the classes
_MAX_MEAN_SHRINKAGE = 0.9  # class means should not become equal
_MAX_LOG_ODDS = 16  # nats; beyond them, a float32 confidence is 1
_ROUNDING = 1e-6  # of a feature's magnitude; a smaller standard deviation is rounding
_CHUNK_ROWS = 512  # samples whose products are summed at once
_BLOCK_COLUMNS = 128  # of the scatter matrix; a block starts at its diagonal, since the matrix is symmetric


class ClassMoments(NamedTuple):
    """First and second moments of features, by class."""

    counts: Tensor  # [K] samples
    means: Tensor  # [K, d]; of a class without samples: an arbitrary point
    covariance: Tensor  # [d, d] within the classes
    std: Tensor  # [d] of all samples together; 0 where it is only rounding


class ScatterMatrix:
    """Accumulates counts, sums and the scatter matrix of features, about an origin near them.

    An origin near the features avoids cancellation. Half of the symmetric matrix is stored, in blocks of columns.

    Args:
        classes: K, the number of classes.
        origin: [d] float64.
    """

    def __init__(self, classes: int, origin: Tensor) -> None:
        size = len(origin)
        self.origin = origin
        self.counts = origin.new_zeros(classes)
        self.sums = origin.new_zeros(classes, size)
        self._starts = range(0, size, _BLOCK_COLUMNS)
        self._blocks = [origin.new_zeros(min(_BLOCK_COLUMNS, size - i), size - i) for i in self._starts]
        self._pending: list[tuple[Tensor, Tensor]] = []  # batches that are too small to be worth a matrix product

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add features [B, d] and labels [B]; features must not be written to afterwards."""
        self._pending.append((features, labels.clone()))  # the caller may overwrite its labels
        if sum(len(labels) for _, labels in self._pending) >= _CHUNK_ROWS:
            self._accumulate_pending()

    def _accumulate_pending(self) -> None:
        if not self._pending:
            return
        features, labels = (torch.cat(column) for column in zip(*self._pending, strict=True))
        self._pending = []
        self.counts += labels.bincount(minlength=len(self.counts))
        # In float64: the inverse magnifies what float32 loses a thousand times, and several processes with parts of the
        # data would get another result than one with all of it. Products on a GPU are float32: on many GPUs they would
        # take 64 times as long in float64.
        chunks = zip(torch.split(features, _CHUNK_ROWS), torch.split(labels, _CHUNK_ROWS), strict=True)
        for chunk, chunk_labels in chunks:
            centered = chunk.double() - self.origin
            self.sums.index_add_(0, chunk_labels, centered)
            factors = centered if centered.is_cpu else centered.float()
            for start, block in zip(self._starts, self._blocks, strict=True):
                block += factors[:, start : start + _BLOCK_COLUMNS].T @ factors[:, start:]

    def move_origin(self, origin: Tensor) -> None:
        """Change the origin, as if it had been this one from the start."""
        self._accumulate_pending()
        shift = self.origin - origin
        total_shift, sums = shift * self.counts.sum(), self.sums.sum(0)
        for start, block in zip(self._starts, self._blocks, strict=True):
            columns = slice(start, start + _BLOCK_COLUMNS)
            block += torch.outer(sums[columns] + total_shift[columns], shift[start:]) + torch.outer(
                shift[columns], sums[start:]
            )
        self.sums += torch.outer(self.counts, shift)
        self.origin = origin

    def merge(self, other: ScatterMatrix) -> None:
        """Add what another one has accumulated, which moves the other's origin."""
        other.move_origin(self.origin.to(other.origin.device))
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine += theirs.to(mine.device)

    def all_reduce(self) -> None:
        """Sum over all processes."""
        self._accumulate_pending()
        samples = self.counts.sum()
        self.move_origin(all_reduce_sum(self.origin * samples) / all_reduce_sum(samples.clone()))
        for tensor in self._tensors():
            all_reduce_sum(tensor)

    def moments(self) -> ClassMoments:
        """Compute the moments. The blocks are freed: nothing can be added any more."""
        self._accumulate_pending()
        samples = self.counts.sum()
        means = self.sums / self.counts.clamp(min=1)[:, None]
        overall = self.sums.sum(0) / samples
        size = len(overall)
        covariance = overall.new_empty(size, size)
        for start, block in zip(self._starts, self._blocks, strict=True):
            covariance[start : start + _BLOCK_COLUMNS, start:] = block
            covariance[start:, start : start + _BLOCK_COLUMNS] = block.T
        self._blocks = []
        covariance /= samples
        std = (covariance.diagonal() - overall.square()).clamp(min=0).sqrt()
        covariance -= (means * (self.counts / samples)[:, None]).T @ means
        magnitude = (self.origin + overall).abs()
        return ClassMoments(self.counts, self.origin + means, covariance, std.where(std > _ROUNDING * magnitude, 0))

    def _tensors(self) -> list[Tensor]:
        return [self.counts, self.sums, *self._blocks]


class LinearDiscriminant(NamedTuple):
    """A linear classifier: scores are features @ weight.T + bias."""

    weight: Tensor  # [K, d] float64
    bias: Tensor  # [K] float64; of a class without samples: -inf
    gram: Tensor  # [K, K], inner products of the whitened class means
    counts: Tensor  # [K] samples

    def temperature(self) -> float:
        """Return what scores must be divided by for float32 to tell confidences apart; at least 1.

        With it, a sample that lies on its class mean has 16 nats of log-odds against the next class, on average over
        the classes.
        """
        nonempty = self.counts > 0
        gram = self.gram[nonempty][:, nonempty]
        if len(gram) < 2:
            return 1.0
        squared_norms = gram.diagonal()
        squared_distances = (squared_norms[:, None] + squared_norms - 2 * gram).fill_diagonal_(math.inf)
        return max(1.0, float(squared_distances.amin(1).mean()) / 2 / _MAX_LOG_ODDS)


def linear_discriminant(
    moments: ClassMoments, shrinkage: float | None, mean_shrinkage: float | None
) -> LinearDiscriminant:
    """Compute the weights of linear discriminant analysis.

    Args:
        moments: Of the features; the covariance is overwritten.
        shrinkage: Of the correlations within the classes towards the identity, 0 to 1; None: see `oas`.
        mean_shrinkage: Of the class means towards their average, 0 to 1; None: see `james_stein_shrinkage`.
    """
    counts, means, covariance, std = moments
    # Features are rounded to float32, so the correlations of one that hardly varies within the classes may be anything.
    # A ridge hides that, and makes sure that there is an inverse.
    covariance.diagonal().add_(RIDGE * std.square())
    scale = covariance.diagonal().sqrt().where(std > 0, math.inf)  # constant features get no weight
    correlations = covariance.div_(scale[:, None]).div_(scale)
    if shrinkage is None:
        shrinkage = oas(correlations, float(counts.sum()))
    correlations.mul_(1 - shrinkage).diagonal().fill_(1)
    nonempty = (counts > 0)[:, None]
    center = means[nonempty[:, 0]].mean(0)  # subtracted, since what all means share would only make weights larger
    standardized = ((means - center) / scale).where(nonempty, 0)
    whitened = torch.cholesky_solve(standardized.T, torch.linalg.cholesky(correlations)).T
    gram = whitened @ standardized.T
    if mean_shrinkage is None:
        mean_shrinkage = james_stein_shrinkage(gram.diagonal(), counts, int((std > 0).sum()))
    factor = 1 - mean_shrinkage
    weight, gram = factor * whitened / scale, factor**2 * gram
    bias = (counts / counts.sum()).log() - 0.5 * gram.diagonal() - weight @ center
    return LinearDiscriminant(weight, bias, gram, counts)


def oas(correlations: Tensor, samples: float) -> float:
    """Return the Oracle Approximating Shrinkage of Chen, Wiesel, Eldar and Hero (2010).

    Args:
        correlations: [d, d].
        samples: How many they were computed from.

    Returns:
        The shrinkage towards the identity, 0 to 1.
    """
    size = len(correlations)
    mean_square = float(correlations.square().mean())
    squared_mean = float(correlations.diagonal().mean()) ** 2
    excess = (samples + 1) * (mean_square - squared_mean / size)
    return 1.0 if excess <= 0 else min(1.0, (mean_square + squared_mean) / excess)


def james_stein_shrinkage(squared_norms: Tensor, counts: Tensor, size: int) -> float:
    """Return how far class means should be shrunk towards their average, as James and Stein do.

    The mean of n whitened samples of d features is off by sqrt(d / n). The shrinkage is the share of that sampling
    error in the squared norms of the means.

    Args:
        squared_norms: [K], of the whitened class means.
        counts: [K] samples.
        size: d, the number of features.

    Returns:
        The shrinkage, 0 to 0.9.
    """
    nonempty = counts > 0
    total = float(squared_norms[nonempty].sum())
    return min(_MAX_MEAN_SHRINKAGE, float((size / counts[nonempty]).sum()) / total) if total > 0 else 0.0
