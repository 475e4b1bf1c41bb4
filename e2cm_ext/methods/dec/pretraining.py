"""The first step of DEC: encoders are pretrained as stacked denoising autoencoders."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .encoders import Encoders, first_linear, refuse_non_finite, step
from .schedule import Schedule

__all__ = ["fine_tune", "pretrain"]


def pretrain(encoders: Encoders, which: int, schedule: Schedule, progress: bool) -> None:
    """Train an encoder layer by layer: restore the layer's input from a corrupted copy."""
    frozen, layers = encoders.layers_of(which)
    decoders = encoders.decoders_of(which)
    for decoder, large in zip(decoders, encoders.large_decoders[: len(frozen)], strict=False):
        decoder.load_state_dict(large.state_dict())
    rows = encoders.encode(frozen, encoders.rows)
    for d, (layer, decoder) in enumerate(zip(layers, decoders[len(frozen) :], strict=True)):
        first_linear(layer).reset_parameters()
        first_linear(decoder).reset_parameters()
        # A code is not corrupted: its few numbers are not redundant.
        corruption = 0.0 if layer is layers[-1] else schedule.corruption
        denoiser = nn.Sequential(nn.Dropout(schedule.corruption), layer, nn.Dropout(corruption), decoder)
        what = f"{encoders.names[which]}: layer {len(frozen) + d + 1} of {len(frozen) + len(layers)}"
        _restore(encoders, denoiser, rows, rows, schedule, schedule.layer_epochs, what, progress)
        rows = encoders.encode([layer], rows)


def fine_tune(encoders: Encoders, which: int, schedule: Schedule, progress: bool) -> None:
    """Train the whole autoencoder to restore the images. Frozen layers stay as they are."""
    frozen, layers = encoders.layers_of(which)
    autoencoder = nn.Sequential(*layers, *reversed(encoders.decoders_of(which)))
    epochs = schedule.exit_epochs if which else schedule.epochs
    rows = encoders.encode(frozen, encoders.rows)
    what = f"{encoders.names[which]}: autoencoder"
    _restore(encoders, autoencoder, rows, encoders.rows, schedule, epochs, what, progress)


def _restore(
    encoders: Encoders,
    module: nn.Module,
    rows: Tensor,
    wanted: Tensor,
    schedule: Schedule,
    epochs: int,
    what: str,
    progress: bool,
) -> None:
    """Train a module to compute the wanted rows from the given ones."""
    optimizer = torch.optim.Adam(module.parameters(), schedule.lr, fused=True)
    batches = epochs * math.ceil(len(rows) / schedule.batch_size)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, batches))
    with tqdm(total=batches, desc=what, unit="batch", disable=not progress, leave=False) as bar:
        for _ in range(epochs):
            for batch in encoders.batches(schedule.batch_size):
                step(optimizer, decay, F.mse_loss(encoders.call(module, rows[batch]), wanted[batch]))
                bar.update(1)
    refuse_non_finite(module, what)
