"""The second and third step of DEC: k-means, and the training of encoders and centres."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ... import ops
from ...clusters import k_means, matching
from .encoders import Encoders, refuse_non_finite, step
from .formulas import divergence, soft_assignment, target
from .schedule import Schedule

__all__ = ["Clusters", "cluster", "store_clusters"]

Distort = Callable[[Tensor], Tensor]  # images -> altered images


class Clusters(NamedTuple):
    """Clusters of one encoder."""

    centres: Tensor  # [K, code]
    start: Tensor  # [N] int64, the cluster of every training sample by k-means
    changed: list[float]  # shares of the samples that changed their cluster between two targets


def cluster(
    encoders: Encoders, which: int, schedule: Schedule, seed: int, distort: Distort | None, progress: bool
) -> Clusters:
    """Find centres by k-means, then train an encoder and its centres by DEC."""
    frozen, layers = encoders.layers_of(which)
    encoder = nn.Sequential(*layers)
    rows = encoders.encode(frozen, encoders.rows)
    inputs = _training_inputs(encoders, frozen, rows, distort)
    means, start = k_means(encoders.encode(layers, rows), len(encoders.centres.means), seed, schedule.k_means_starts)
    centres = nn.Parameter(means)
    optimizer = torch.optim.Adam([*encoder.parameters(), centres], schedule.cluster_lr, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, max(1, schedule.max_targets * schedule.target_interval)
    )
    before, changed = start, []
    batches = _endless_batches(encoders, schedule.batch_size)
    with tqdm(desc=f"{encoders.names[which]}: clusters", unit="target", disable=not progress, leave=False) as bar:
        for _ in range(schedule.max_targets):
            with torch.no_grad():
                q = soft_assignment(encoders.encode(layers, rows), centres)
            now = q.argmax(1)
            changed.append(float((now != before).double().mean()))
            bar.set_postfix(changed=f"{changed[-1]:.2%}")
            if len(changed) > 1 and changed[-1] < schedule.tolerance:
                break
            before, p = now, target(q)
            for batch in islice(batches, schedule.target_interval):
                q = soft_assignment(encoders.call(encoder, inputs(batch)), centres)
                step(optimizer, decay, divergence(p[batch], q))
            bar.update(1)
    refuse_non_finite(encoder, "DEC")
    return Clusters(centres.detach(), start, changed)


def store_clusters(
    encoders: Encoders, which: int, clusters: Clusters, reference: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Store the centres of an encoder in the network.

    Args:
        encoders: The encoders.
        which: The encoder.
        clusters: What `cluster` returned.
        reference: [N] int64, the clusters of the large encoder, by which those of an exit are numbered; None for the
            large encoder itself.

    Returns:
        The cluster of every training sample [N] int64, and that by k-means [N] int64.
    """
    frozen, layers = encoders.layers_of(which)
    centres, start, _ = clusters
    codes = encoders.encode([*frozen, *layers], encoders.rows)
    assignment = ops.class_distances(codes, centres, centres.mean(0)).argmin(1)
    if reference is None:
        encoders.centres.means.copy_(centres)
        return assignment, start
    numbers = matching(assignment, reference, len(centres))
    encoders.head(which).set_centres(centres[numbers.argsort()], codes)
    return numbers[assignment], numbers[start]


def _training_inputs(
    encoders: Encoders, frozen: Sequence[nn.Module], rows: Tensor, distort: Distort | None
) -> Callable[[Tensor], Tensor]:
    """A function: sample numbers -> the outputs of the frozen layers for these images, which `distort` has altered."""
    if distort is None:
        return rows.__getitem__

    @torch.no_grad()
    def distorted(batch: Tensor) -> Tensor:
        return encoders.call(nn.Sequential(*frozen), encoders.scaled_rows(distort(encoders.images[batch])))

    return distorted


def _endless_batches(encoders: Encoders, batch_size: int) -> Iterator[Tensor]:
    while True:
        yield from encoders.batches(batch_size)
