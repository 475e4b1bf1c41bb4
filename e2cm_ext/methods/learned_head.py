"""The base class of heads that are trained by gradient descent."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from ..heads.base import Head

__all__ = ["LearnedHead"]


class LearnedHead(Head):
    """Base class of heads that are trained by gradient descent.

    A head has two steps: `squeeze`, which has no parameters, and `outputs`, which has all of them. If the network is
    frozen, what `squeeze` returns can be kept for all epochs: see `training.cache`.

    A head that computes more than logits returns a tuple from `outputs` that begins with the logits. If its certainty
    is not the largest probability, it overrides `gate`, too.

    Example:
        class Linear(LearnedHead):
            def __init__(self, num_classes, feature_shape):
                super().__init__(num_classes, feature_shape)
                self.linear = nn.Linear(feature_shape[0], num_classes)

            def squeeze(self, x):
                return x.mean((2, 3))

            def outputs(self, squeezed):
                return self.linear(squeezed)
    """

    def squeeze(self, x: Tensor) -> Tensor:
        """Reduce features [B, *feature_shape] to what `outputs` needs of them [B, ...]. It has no parameters."""
        return x

    def outputs(self, squeezed: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute logits [B, K], or a tuple that begins with them, from what `squeeze` returned."""
        raise NotImplementedError(f"{type(self).__name__} needs an outputs()")

    def logits(self, x: Tensor) -> Tensor:
        """Compute logits [B, K] from features, with gradients."""
        outputs = self.outputs(self.squeeze(x))
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def forward(self, x: Tensor) -> Tensor:
        """Compute log-probabilities [B, K] float32 from features."""
        return self.logits(x).float().log_softmax(1)

    def update(self, x: Tensor, labels: Tensor, pass_index: int) -> NoReturn:
        """Raise TypeError: this head is not fitted by `EarlyExit.fit`."""
        raise TypeError(
            f"{type(self).__name__} learns by gradient descent: call train(ee, loader) of its method, not "
            "ee.fit(loader)"
        )
