"""FastExit: an early exit as a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.overlap import FittedImages
from ..heads import Head, Rule, build
from ..heads.base import positive_int
from ..heads.rules import as_rule
from ..heads.threshold_buffer import ThresholdModule
from ..ops import validation
from ..ops.types import Decisions
from ..runtime.cascade import Cascade
from .watcher import current_watcher

__all__ = ["FastExit", "State"]


class FastExit(ThresholdModule, buffer="threshold"):
    """A layer at which samples leave the network, to be called in a forward() of your own.

    Call all exits of a network in the order in which they are set up, each once, and pass the state of one to the next;
    the first gets none. What runs behind an exit must depend on x alone, since the batch has shrunk, perhaps to
    nothing; `if state.done: return state.result()` skips the remaining layers. state_dict() holds all that was learned.

    Args:
        num_features_or_shape: Of one sample's features: 144, or (8, 7, 7).
        num_classes: Number of classes.
        head: As in EarlyExit: "whitened_means", "class_means", "pooled_means", a Head class, or a function
            (num_classes, feature_shape) -> Head.
        rule: "confidence", "entropy", or a Rule.
        threshold: The exit fires above it. +inf (the start) never fires, and the head is not computed.

    Example:
        import torch
        from torch import nn
        from e2cm_ext import FastExit, fast_exit

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
                self.exit1 = FastExit((8, 7, 7), num_classes=2)
                self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten())
                self.exit2 = FastExit(144, num_classes=2)
                self.classifier = nn.Linear(144, 2)

            def forward(self, x):
                x, state = self.exit1(self.stem(x))          # x: the samples that stay
                x, state = self.exit2(self.body(x), state)
                return state.result(self.classifier(x))      # Decisions, in the order of the input

        torch.manual_seed(0)
        images = torch.randn(384, 1, 9, 9)
        labels = (images.mean((1, 2, 3)) > 0).long()
        loader = [(images[:128], labels[:128]), (images[128:256], labels[128:256])]
        held_out = [(images[256:], labels[256:])]

        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(20):                                  # in train mode all samples pass the exits
            loss = nn.functional.nll_loss(net(images).log_probs, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        net.eval()
        fast_exit.fit(net, loader)                           # class statistics at every exit
        record = fast_exit.record(net, held_out)             # predictions of every exit, on samples not fitted on
        print(fast_exit.calibrate(net, record, flops=0.9))   # sets the thresholds
        decisions = net(images)                              # .prediction .confidence .exit .log_probs
    """

    def __init__(
        self,
        num_features_or_shape: int | Sequence[int],
        num_classes: int,
        head: str | type[Head] | Callable[[int, tuple[int, ...]], Head] = "whitened_means",
        rule: str | Rule = "confidence",
        threshold: float = math.inf,
    ) -> None:
        super().__init__()
        self.head = build(head, positive_int("num_classes", num_classes), [_shape(num_features_or_shape)])[0]
        self.rule = as_rule(rule)
        self.register_buffer("threshold", torch.tensor(math.inf, dtype=torch.float32))
        self.threshold = threshold
        self._fitted_images: FittedImages | None = None  # those of the last fit; not in the state_dict

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Let samples leave.

        Args:
            x: Features [B, ...] of the samples that are still there.
            state: What the exit before has returned.

        Returns:
            The features of the samples that stay, and the state of the whole batch.
        """
        head = self.head
        if x.shape[1:] != head.feature_shape:
            wanted = ", ".join(map(str, ("batch", *head.feature_shape)))
            raise ValueError(f"`x` has shape {list(x.shape)}; this exit was set up for features [{wanted}]")
        if state is None:
            state = State(head.num_classes)
        watcher = current_watcher()
        if watcher is not None:
            watcher.see(self, x)
        threshold = math.inf if self.training or watcher is not None else self.threshold.item()
        if threshold < math.inf:
            self.check_fitted()
        return state.exit(x, head, self.rule, threshold), state

    def check_fitted(self, name: str = "this exit") -> None:
        """Refuse an exit whose head is not fitted."""
        if not self.head.fitted:
            raise RuntimeError(f"{name} knows no classes yet: call e2cm_ext.fast_exit.fit(model, loader) first")

    if TYPE_CHECKING:  # a buffer, in fact

        @property
        def threshold(self) -> Tensor:
            """[] float32; it can be set to a number."""

        @threshold.setter
        def threshold(self, value: Tensor | float) -> None: ...

    def check_thresholds(self, value: Any) -> Tensor:
        """Convert a number to [] float32."""
        return torch.tensor(validation.threshold_value(value), dtype=torch.float32, device="cpu")

    def extra_repr(self) -> str:
        return f"rule={self.rule.name!r}, threshold={self.threshold.item():.6g}, fitted={self.head.fitted}"


class State(Cascade):
    """One batch on its way through a network with FastExit layers."""

    __slots__ = ()

    def result(self, logits: Tensor | None = None) -> Decisions:
        """Return the decisions about the whole batch, in input order.

        Args:
            logits: The network's own answer [survivors, K] to the samples that are left. Not needed if none is left, or
                if an earlier call has given them.

        Returns:
            Decisions. Where no sample has left, as in train mode, log_probs carry a gradient.
        """
        if logits is not None and not self.done:
            self._refuse_misfits(logits)
            watcher = current_watcher()
            if watcher is not None:
                watcher.logits = logits
            self.finish(logits)
        return super().result()

    def _refuse_misfits(self, logits: Tensor) -> None:
        rows = self._survivors if self._survivors is not None else logits.shape[0]
        if logits.dim() != 2 or logits.shape[0] != rows or logits.shape[1] != self._num_classes:
            count = "survivors" if self._survivors is None else rows
            raise ValueError(f"`logits` has shape {list(logits.shape)}; wanted [{count}, {self._num_classes}]")


def _shape(given: Any) -> tuple[int, ...]:
    sizes = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    if not sizes:
        raise ValueError("`num_features_or_shape` is empty; wanted 144, or the shape of one sample, such as (8, 7, 7)")
    return tuple(positive_int("num_features_or_shape", size) for size in sizes)
