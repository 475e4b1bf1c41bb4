"""How long and how fast DEC is trained."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast DEC is trained.

    The defaults of `corruption`, `k_means_starts`, `tolerance` and `batch_size` are the paper's, the others are ours.

    Args:
        layer_epochs: Of each layer in pretraining.
        epochs: Of the whole autoencoder.
        exit_epochs: Of the autoencoder of an exit, which shares most of its layers with the large one.
        lr: The learning rate of Adam in pretraining. It falls to 0 along half a cosine.
        corruption: The share of the numbers that are set to 0 in pretraining.
        k_means_starts: How many times k-means starts.
        cluster_lr: The learning rate of Adam in DEC. It falls in the same way, in the time of `max_targets` targets.
        target_interval: Batches between two targets.
        tolerance: DEC ends when fewer of the samples have changed their cluster between two targets.
        max_targets: DEC ends after so many targets in any case.
        batch_size: Samples per batch.
    """

    layer_epochs: int = 4
    epochs: int = 16
    exit_epochs: int = 4
    lr: float = 1e-3
    corruption: float = 0.2
    k_means_starts: int = 20
    cluster_lr: float = 2e-4
    target_interval: int = 80
    tolerance: float = 0.001
    max_targets: int = 25
    batch_size: int = 256
