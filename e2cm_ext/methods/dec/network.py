"""The network of DEC: stages, and heads with encoders of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...clusters import Centres, Clustered
from ...early_exit import EarlyExit
from ...heads.base import Head
from ...heads.class_means import ClassMeans
from ...heads.rules import Rule
from ...ops.types import Decisions
from ...stages import Stages
from .. import training

__all__ = ["CodeMeans", "ScaledRows", "build", "shifted"]


class CodeMeans(ClassMeans, kind="code_means"):
    """Class means of a code, which a linear layer computes from the features at an exit.

    The exit's own encoder consists of the layers before the exit and this linear layer.

    Args:
        num_classes: K.
        feature_shape: Of the features at the exit.
        code: Numbers in a code.
        passes: Of `fit`, see ClassMeans.
        channels_last: Of no meaning here: a code is a vector.
    """

    def __init__(
        self,
        num_classes: int,
        feature_shape: Sequence[int],
        *,
        code: int = 10,
        passes: int = 2,
        channels_last: bool = False,
    ) -> None:
        self.code = code
        super().__init__(num_classes, feature_shape, passes=passes)
        self.encoder = nn.Linear(math.prod(self.feature_shape), code)

    def _mean_shape(self) -> tuple[int, ...]:
        return (self.code,)

    def features(self, x: Tensor) -> Tensor:
        """Compute codes [B, code] from features."""
        code: Tensor = self.encoder(x.flatten(1).float())
        return code

    def set_centres(self, centres: Tensor, codes: Tensor) -> None:
        """Take cluster centres as class means.

        Args:
            centres: [K, code].
            codes: [N, code], of all training samples. Their mean distances are the scale.
        """
        self.reset()
        self.means.copy_(centres)
        self.center.copy_(self.means.mean(0))
        distances = ops.class_distances(codes, self.means, self.center)
        self.scale.copy_(distances.double().mean(0))
        self.counts.copy_(distances.argmin(1).bincount(minlength=len(centres)))
        self.fitted = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.features(x))

    def score(self, x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        return super().score(self.features(x), rule)

    def step(
        self, x: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, *, rule: Rule, exit: int
    ) -> tuple[Tensor, Tensor]:
        # Not ClassMeans.step: the samples that stay need their features, not their codes.
        return Head.step(self, x, threshold, ids, out, rule=rule, exit=exit)

    def flops(self) -> int:
        """Count the linear layer, and K (3 D - 1) for a code of D numbers."""
        return 2 * self.encoder.weight.numel() + super().flops()

    def config(self) -> dict[str, Any]:
        return super().config() | {"code": self.code}


class ScaledRows(nn.Module):
    """Images [B, ...] -> rows [B, D], divided by the root mean square of the training images."""

    rms: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rms", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / self.rms


def build(
    example_input: Tensor,
    clusters: int = 10,
    *,
    widths: Sequence[int] = (500, 500, 2000),
    code: int = 10,
    seed: int = 0,
) -> EarlyExit:
    """Build a DEC encoder with an exit behind every layer but the last two. It is not trained yet.

    By default it is the paper's: the large encoder is 500-500-2000-10, the exits' own are 500-10 ("small") and
    500-500-10 ("middle").

    Args:
        example_input: A batch of images of any shape. They are flattened.
        clusters: How many clusters.
        widths: Of the layers before the code; at least two.
        code: Numbers in a code.
        seed: Of the initial weights.

    Returns:
        The network. `train` it.

    Raises:
        ValueError: There are fewer than two widths.

    Example:
        ee = dec.build(images[:1], clusters=10, widths=(50, 50, 100))
    """
    if len(widths) < 2:
        raise ValueError(
            f"`widths` is {tuple(widths)}; wanted at least 2 layers before the code: an exit is between two"
        )
    with training.seeded(seed):
        sizes = [math.prod(example_input.shape[1:]), *widths]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip(sizes, widths, strict=False)]
        last = Clustered(nn.Sequential(layers[-1], nn.Linear(widths[-1], code)), Centres(torch.zeros(clusters, code)))
        parts = [nn.Sequential(ScaledRows(), layers[0]), *layers[1:-1], last]
        names = ["small", "middle"] if len(widths) == 3 else [f"layer {j + 1}" for j in range(len(widths) - 1)]
        stages = Stages(parts, names).eval()
        ee = EarlyExit(stages, example_input, head=lambda k, shape: CodeMeans(k, shape, code=code))
    ee.labelled = False
    return ee


def shifted(images: Tensor, pixels: float = 2, degrees: float = 10) -> Tensor:
    """Shift and rotate images at random, as `distort` of `train`.

    Args:
        images: [B, C, H, W], 0 at their edges.
        pixels: The largest shift.
        degrees: The largest angle.

    Returns:
        Images of the same shape.

    Example:
        altered = dec.shifted(torch.rand(4, 1, 8, 8), pixels=1)
    """
    count, _, height, width = images.shape
    angle, right, down = (2 * torch.rand(3, count, device=images.device) - 1).unbind()
    angle = angle * math.radians(degrees)
    right, down = 2 * pixels / width * right, 2 * pixels / height * down
    theta = torch.stack([angle.cos(), -angle.sin(), right, angle.sin(), angle.cos(), down], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
