"""The ops in plain torch, to be read beside the equations: the oracle of every test.

They also run on devices without kernels. Arguments and results are those of functional.py. Everything is computed in
the dtype of its inputs (16-bit ones in float32): float64 inputs give a float64 oracle. `center` changes no result here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .types import Decisions, Statistics


def statistics(x: Tensor, wanted: Statistics) -> Tensor:
    """[B, size]: per channel the mean, the root mean square and the maximum of each cell of their grids; and for
    offsets o the root of the mean product of channels c and c + o, with its sign.

    A cell with a NaN or an infinity in it has NaN for a maximum, which would hide -inf.
    """
    x = _at_least_float32(x)
    maps = x.movedim(-1, 1) if wanted.channels == -1 else x
    maps = maps.reshape(x.shape[0], *wanted.map_of(x.shape[1:]))
    return torch.cat(
        [
            _cells(maps, wanted.mean, lambda cell: cell.mean(-1)),
            _cells(maps, wanted.rms, lambda cell: cell.square().mean(-1).sqrt()),
            _cells(maps, wanted.max, lambda cell: cell.amax(-1).where(cell.isfinite().all(-1), torch.nan)),
            *(_signed_root((maps * maps.roll(-o, 1)).mean((2, 3))) for o in range(wanted.pairs)),
        ],
        dim=1,
    )


def _signed_root(x: Tensor) -> Tensor:
    return x.abs().sqrt().copysign(x)


def _cells(maps: Tensor, grid: tuple[int, int], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, C * rows * columns]: reduce([B, C, numbers of a cell]) of every cell."""
    (rows, columns), (height, width) = grid, maps.shape[2:]
    cells = [
        reduce(
            maps[
                :,
                :,
                i * height // rows : (i + 1) * height // rows,
                j * width // columns : (j + 1) * width // columns,
            ].flatten(2)
        )
        for i in range(rows)
        for j in range(columns)
    ]
    return torch.stack(cells, dim=2).flatten(1) if cells else maps.new_empty((maps.shape[0], 0))


def class_distances(x: Tensor, means: Tensor, center: Tensor | None = None) -> Tensor:
    """d[b, k] = || x[b] - means[k] ||, the Euclidean distance of the flattened features."""
    rows, means = _at_least_float32(x).flatten(1), _at_least_float32(means).flatten(1)
    return torch.stack([(rows - mean).square().sum(1).sqrt() for mean in means], dim=1)


def log_probabilities(distances: Tensor, scale: Tensor) -> Tensor:
    """log softmax over k of -d[b, k] / scale[k].

    A class whose scale is not a positive finite number has no mean: its probability is 0.
    """
    has_mean = (scale > 0) & scale.isfinite()
    return log_softmax(torch.where(has_mean, -distances / scale, -torch.inf))


def log_softmax(logits: Tensor) -> Tensor:
    """log softmax; a row with a NaN or +inf, or with nothing above -inf, is NaN throughout."""
    logits = _at_least_float32(logits)
    spoiled = (logits.isnan() | (logits == torch.inf)).any(1) | (logits == -torch.inf).all(1)
    return torch.where(spoiled[:, None], torch.nan, logits.log_softmax(1))


def best(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence (the largest probability) and prediction: the lowest of the likeliest classes, 0 for a NaN row."""
    confidence = log_probs.amax(1).exp()
    likeliest = log_probs == log_probs.amax(1, keepdim=True)
    return confidence, likeliest.to(torch.uint8).argmax(1)


def leaves(log_probs: Tensor, threshold: float | Tensor, rule: str = "confidence") -> Tensor:
    """Which rows leave: max p > threshold, or entropy -sum p log p < threshold. A NaN row never does."""
    if rule == "confidence":
        return best(log_probs)[0] > threshold
    probabilities = log_probs.exp()
    return -torch.where(probabilities > 0, probabilities * log_probs, probabilities).sum(1) < threshold


def class_scores(
    x: Tensor, means: Tensor, scale: Tensor, center: Tensor | None = None, statistics: Statistics | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence [B], prediction [B] and log-probabilities [B, K] of the nearest-class-mean head."""
    log_probs = log_probabilities(class_distances(_read_by_head(x, statistics), means), scale)
    return *best(log_probs), log_probs


def linear_scores(
    x: Tensor, weight: Tensor, bias: Tensor, statistics: Statistics | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """class_scores of a linear head: logits x . weight[k] + bias[k]. A bias of -inf: that class is never predicted."""
    log_probs = log_softmax(_logits(_read_by_head(x, statistics), weight, bias))
    return *best(log_probs), log_probs


def exit_step(
    x: Tensor,
    means: Tensor,
    scale: Tensor,
    threshold: float | Tensor,
    ids: Tensor,
    out: Decisions,
    center: Tensor | None = None,
    statistics: Statistics | None = None,
    *,
    rule: str = "confidence",
    exit: int = 0,
) -> tuple[Tensor, Tensor]:
    """The answers of the rows that leave go into `out` at their ids; the other rows are returned, with their ids."""
    log_probs = class_scores(x, means, scale, center, statistics)[2]
    return _depart(x, log_probs, threshold, ids, out, rule, exit)


def linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    threshold: float | Tensor,
    ids: Tensor,
    out: Decisions,
    statistics: Statistics | None = None,
    *,
    rule: str = "confidence",
    exit: int = 0,
) -> tuple[Tensor, Tensor]:
    """exit_step of a linear head."""
    return _depart(x, linear_scores(x, weight, bias, statistics)[2], threshold, ids, out, rule, exit)


def decide(
    x: Tensor,
    scores: Tensor,
    threshold: float | Tensor,
    ids: Tensor,
    out: Decisions,
    *,
    scale: Tensor | None = None,
    rule: str = "confidence",
    exit: int = 0,
) -> tuple[Tensor, Tensor]:
    """exit_step for the scores of any head: logits, or distances when `scale` says what to divide them by."""
    log_probs = log_softmax(scores) if scale is None else log_probabilities(_at_least_float32(scores), scale)
    return _depart(x, log_probs, threshold, ids, out, rule, exit)


def decide_masked(
    scores: Tensor,
    threshold: float,
    pending: Tensor,
    ids: Tensor,
    out: Decisions,
    *,
    scale: Tensor | None = None,
    rule: str = "confidence",
    exit: int = 0,
) -> None:
    """decide for the rows that are `pending`, without compaction: the host does not wait for the device."""
    log_probs = log_softmax(scores) if scale is None else log_probabilities(_at_least_float32(scores), scale)
    leaving = leaves(log_probs, threshold, rule) & pending
    confidence, prediction = best(log_probs)
    number = torch.full_like(prediction, exit)
    for column, values in zip(out, (prediction, confidence, number, log_probs), strict=True):
        if column is not None:
            chosen = leaving if values.dim() == 1 else leaving[:, None]
            column[ids] = torch.where(chosen, values.to(column.dtype), column[ids])
    pending &= ~leaving


def compact(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x where keep is true, in their old order, and their numbers."""
    index = keep.nonzero().flatten()
    return x[index], index


def _read_by_head(x: Tensor, wanted: Statistics | None) -> Tensor:
    return x if wanted is None else statistics(x, wanted)


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """-inf, whatever the features, only where the bias is; a NaN or an infinity among the features spoils the row."""
    rows, weight = _at_least_float32(x).flatten(1), _at_least_float32(weight).flatten(1)
    logits = torch.stack([(rows * vector).sum(1) for vector in weight], dim=1) + bias
    return torch.where(rows.isfinite().all(1, keepdim=True), logits, torch.nan)


def _depart(
    x: Tensor, log_probs: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, rule: str, exit: int
) -> tuple[Tensor, Tensor]:
    leaving = leaves(log_probs, threshold, rule)
    confidence, prediction = best(log_probs)
    at = ids[leaving]
    out.prediction[at] = prediction[leaving]
    out.confidence[at] = confidence[leaving].to(out.confidence.dtype)
    out.exit[at] = exit
    if out.log_probs is not None:
        out.log_probs[at] = log_probs[leaving].to(out.log_probs.dtype)
    survivors, index = compact(x, ~leaving)
    return survivors, ids[index]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
