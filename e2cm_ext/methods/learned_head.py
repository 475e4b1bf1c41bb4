"""The base of heads that learn by gradient descent."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from ..heads.base import Head

__all__ = ["LearnedHead"]


class LearnedHead(Head):
    """What looks at the features in two steps: `squeeze`, in which nothing is learned, and `outputs`, in which all is.

        class Linear(LearnedHead):
            def __init__(self, num_classes, feature_shape):
                super().__init__(num_classes, feature_shape)
                self.linear = nn.Linear(feature_shape[0], num_classes)

            def squeeze(self, x):
                return x.mean((2, 3))

            def outputs(self, squeezed):
                return self.linear(squeezed)

    What is squeezed out of the features of a network that does not change can be kept, see training.cache. A head with
    more to say than logits returns a tuple that begins with them; how sure it is, where that is not the largest
    probability, it says in `gate`.
    """

    def squeeze(self, x: Tensor) -> Tensor:
        """[B, ...]: all that `outputs` needs to know of the features [B, *feature_shape]."""
        return x

    def outputs(self, squeezed: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits [B, K], or a tuple that begins with them."""
        raise NotImplementedError(f"{type(self).__name__} needs an outputs()")

    def logits(self, x: Tensor) -> Tensor:
        """[B, K], with their gradient."""
        found = self.outputs(self.squeeze(x))
        return found[0] if isinstance(found, tuple) else found

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).float().log_softmax(1)

    def update(self, x: Tensor, labels: Tensor, pass_index: int) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} learns by gradient descent: call train(ee, loader) of its method, not "
            "ee.fit(loader)"
        )
