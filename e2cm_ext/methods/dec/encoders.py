"""The encoders of a network of DEC, their decoders, and the images that they are trained on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...clusters import Clustered
from ...early_exit import EarlyExit
from .network import CodeMeans, ScaledRows

__all__ = ["Encoders", "first_linear", "refuse_non_finite", "step"]

_ROWS = 2048  # that are encoded at a time without gradients


class Encoders(nn.Module):
    """All encoders of a network with their decoders. Encoder 0 is the large one; then come the exits', the last first.

    Args:
        ee: What `build` returned. Its scale is set to the root mean square of the images.
        images: All training images, float32.
        precision: Of matrix products in training, by autocast; None: float32.

    Raises:
        TypeError: `build` has not made the network.
    """

    def __init__(self, ee: EarlyExit, images: Tensor, precision: torch.dtype | None) -> None:
        super().__init__()
        first, *between, last = ee.stages
        if not (isinstance(first, nn.Sequential) and isinstance(first[0], ScaledRows) and isinstance(last, Clustered)):
            raise TypeError("`ee` is not what dec.build makes")
        scaled_rows, layer = first
        assert isinstance(scaled_rows, ScaledRows) and isinstance(last.network, nn.Sequential)
        rms = images.square().mean().sqrt()
        scaled_rows.rms.copy_(rms if rms > 0 else torch.ones_like(rms))
        self.precision = precision
        self.names = ["large", *reversed(ee.exit_names)]
        self.images, self.scaled_rows = images, scaled_rows
        self.rows = scaled_rows(images)
        self.layers = nn.ModuleList([layer, *between, *last.network])
        self.heads, self.centres = ee.heads, last.centres
        self.sizes = [self.rows.shape[1], *(first_linear(layer).out_features for layer in self.layers)]
        # The first decoder restores images, which may have any sign, the others the outputs of a ReLU.
        decoders = [_decoder(b, a, d > 0) for d, (a, b) in enumerate(pairwise(self.sizes))]
        self.large_decoders = nn.ModuleList(decoders).to(images.device)
        of_exits = (
            [*copy.deepcopy(decoders[: exit + 1]), _decoder(self.sizes[-1], self.sizes[exit + 1], True)]
            for exit in reversed(range(len(ee.heads)))
        )
        self.exit_decoders = nn.ModuleList(nn.ModuleList(each) for each in of_exits).to(images.device)

    def head(self, which: int) -> CodeMeans:
        """Return the head of an exit's encoder."""
        head = self.heads[len(self.heads) - which]
        assert isinstance(head, CodeMeans)
        return head

    def layers_of(self, which: int) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the frozen layers of an encoder, and those that are trained."""
        if which == 0:
            return [], list(self.layers)
        return list(self.layers[: len(self.heads) - which + 1]), [self.head(which).encoder]

    def decoders_of(self, which: int) -> list[nn.Module]:
        """Return the decoders of all layers of an encoder, that of the first layer first."""
        decoders: Any = self.large_decoders if which == 0 else self.exit_decoders[which - 1]
        return list(decoders)

    @torch.no_grad()
    def encode(self, layers: Sequence[nn.Module], rows: Tensor) -> Tensor:
        """Apply layers to all rows, in float32, as at inference."""
        module = nn.Sequential(*layers)
        return torch.cat([module(some) for some in torch.split(rows, _ROWS)]) if layers else rows

    def call(self, module: nn.Module, rows: Tensor) -> Tensor:
        """Apply a module to a batch, in the precision of training."""
        with torch.autocast(rows.device.type, self.precision, enabled=self.precision is not None):
            out: Tensor = module(rows)
        return out.float()

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the numbers of all rows once, in random order, batch by batch."""
        yield from torch.split(torch.randperm(len(self.rows)).to(self.rows.device), batch_size)


def first_linear(part: nn.Module) -> nn.Linear:
    """Return the first linear layer in a module."""
    return next(module for module in part.modules() if isinstance(module, nn.Linear))


def _decoder(size: int, out: int, rectified: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, out), *([nn.ReLU()] if rectified else []))


def step(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, loss: Tensor) -> None:
    """Take one step of an optimizer and of its schedule."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    schedule.step()


def refuse_non_finite(module: nn.Module, what: str) -> None:
    """Raise ValueError if a weight is NaN or infinite."""
    if not all(value.isfinite().all() for value in module.parameters()):
        raise ValueError(
            f"weights became NaN or infinite ({what}): a lower `lr` or `cluster_lr` in `schedule` may help"
        )
