"""FastExit: an early exit as a layer, for those who write the forward() of their network themselves.

    from e2cm_ext import FastExit, fast_exit

`fast_exit.fit`, `record`, `profile`, `calibrate` and `set_thresholds` do for all FastExit layers of a network what the
methods of EarlyExit do for the exits that it has found by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .calibration import profile as timing
from .calibration import recording
from .calibration.curves import Curve, Method, OperatingPoint
from .calibration.guarantee import Of
from .calibration.profile import Profile
from .calibration.record import Record, threshold_vector
from .calibration.target import Target
from .data.loader import Loader, placed, refuse_train_mode
from .data.overlap import FittedImages
from .heads import Head, build, fitting
from .heads.base import positive
from .heads.protocol import Visit
from .heads.rules import Rule
from .heads.rules import rule as rule_named
from .ops import validation
from .ops.types import Decisions
from .runtime.cascade import Cascade
from .stages.flops import Costs, counting, on_meta_device, one_sample

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FastExit", "State", "calibrate", "fit", "profile", "record", "set_thresholds"]


class FastExit(nn.Module):
    """A layer at which samples leave the network, to be called in a forward() of your own.

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
                x, state = self.exit1(self.stem(x))          # x: the survivors
                x, state = self.exit2(self.body(x), state)
                return state.result(self.classifier(x))      # Decisions, in the order of the input

        torch.manual_seed(0)
        images = torch.randn(384, 1, 9, 9)
        labels = (images.mean((1, 2, 3)) > 0).long()
        loader = [(images[:128], labels[:128]), (images[128:256], labels[128:256])]
        held_out = [(images[256:], labels[256:])]

        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(20):                                  # in train mode exits let everybody pass
            loss = nn.functional.nll_loss(net(images).log_probs, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        net.eval()
        fast_exit.fit(net, loader)                           # what the classes look like at every exit
        record = fast_exit.record(net, held_out)             # what every exit would say, of samples not fitted on
        print(fast_exit.calibrate(net, record, flops=0.9))   # sets the thresholds
        decisions = net(images)                              # .prediction .confidence .exit .log_probs

    num_features_or_shape: of one sample's features as they come in, 144 or (8, 7, 7). head: see EarlyExit; a name
    ("whitened_means", "class_means", "pooled_means"), a Head class, or a function (num_classes, feature_shape) -> Head.
    rule: "confidence" or "entropy", or a Rule. threshold: +inf, at the start, never fires, and nothing is computed
    then.

    Call all exits of a network in the order in which they are set up, each once, and hand the state of one to the next;
    the first gets none. Whatever else runs behind an exit must go by x alone, as the batch has shrunk, perhaps to
    nothing; `if state.done: return state.result()` saves the rest of the way. state_dict() holds all that was learned.
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
        self.head = build(head, positive("num_classes", num_classes), [_shape(num_features_or_shape)])[0]
        self.rule = rule_named(rule)
        self.register_buffer("threshold", torch.tensor(math.inf, dtype=torch.float32))
        self._set(threshold)
        self._seen: FittedImages | None = None  # when the head was fitted; not in the state_dict

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The samples that stay, and what is known about the whole batch."""
        head = self.head
        if x.shape[1:] != head.feature_shape:
            wanted = ", ".join(map(str, ("batch", *head.feature_shape)))
            raise ValueError(f"`x` has shape {list(x.shape)}; this exit was set up for features [{wanted}]")
        if state is None:
            state = State(head.num_classes)
        watcher = _watcher.get()
        if watcher is not None:
            watcher.see(self, x)
        threshold = math.inf if self.training or watcher is not None else self.threshold.item()
        if threshold < math.inf and not head.fitted:
            raise RuntimeError(_UNFITTED.format(where="this exit"))
        return state.exit(x, head, self.rule, threshold), state

    if TYPE_CHECKING:  # a buffer, in fact

        @property
        def threshold(self) -> Tensor:
            """[] float32; it can be set to a number."""

        @threshold.setter
        def threshold(self, value: Tensor | float) -> None: ...

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "threshold" and name in self._buffers:
            self._set(value)
        else:
            super().__setattr__(name, value)

    @torch.inference_mode(False)
    def _set(self, value: Any) -> None:
        limit = validation.threshold_value(value)
        self._buffers["threshold"] = torch.tensor(limit, dtype=torch.float32, device=self.threshold.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.threshold.dtype is not torch.float32:  # .half() is for features
            self._buffers["threshold"] = before.to(self.threshold.device)
        return self

    def extra_repr(self) -> str:
        return f"rule={self.rule.name!r}, threshold={self.threshold.item():.6g}, fitted={self.head.fitted}"


class State(Cascade):
    """One batch on its way through a network with FastExit layers."""

    __slots__ = ()

    def result(self, logits: Tensor | None = None) -> Decisions:
        """The answers to the whole batch, in the order of the input.

        logits [survivors, classes]: the network's own answer to those who are left. Not needed if nobody is, or if an
        earlier call has given them. Where nobody has left, as in train mode, log_probs carry a gradient.
        """
        if logits is not None and not self.done:
            self._refuse_misfits(logits)
            watcher = _watcher.get()
            if watcher is not None:
                watcher.logits = logits
            self.finish(logits)
        return super().result()

    def _refuse_misfits(self, logits: Tensor) -> None:
        rows = self._left if self._left is not None else logits.shape[0]
        if logits.dim() != 2 or logits.shape[0] != rows or logits.shape[1] != self._num_classes:
            count = "survivors" if self._left is None else rows
            raise ValueError(f"`logits` has shape {list(logits.shape)}; wanted [{count}, {self._num_classes}]")


def _shape(given: Any) -> tuple[int, ...]:
    sizes = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    if not sizes:
        raise ValueError("`num_features_or_shape` is empty; wanted 144, or the shape of one sample, such as (8, 7, 7)")
    return tuple(positive("num_features_or_shape", size) for size in sizes)


# ---- for all exits of a network -------------------------------------------------------------------------------------


def fit(model: nn.Module, loader: Iterable[Any], progress: bool = True) -> None:
    """Learns from scratch what the classes look like at every FastExit of `model`, from (images, labels).

    Forward passes only, in which nobody leaves: as many as the heads need (class means: two). Where an exit had been
    fitted before, its threshold goes back to +inf. After an error, or Ctrl-C, all is as it was before.
    """
    network = _Network(model, "fit")
    fitted, seen = fitting.fit(network.heads, network.walk, network.loader(loader, progress))
    for exit, head in zip(network.exits.values(), fitted, strict=True):
        if exit.head is not head:  # the copy of a fitted one
            exit.threshold = math.inf
            exit.head = head.eval()
        exit._seen = seen


def record(model: nn.Module, loader: Iterable[Any], progress: bool = True) -> Record:
    """What every FastExit of `model`, and the network itself, would say about every sample, nobody leaving.

    FLOPs are counted on the way, for the loader's first image. The names of the exits are those of the layers.
    """
    network = _Network(model, "record")
    network.refuse_unfitted()
    return recording.record(
        network.heads,
        network.rule,
        network.walk_and_count,
        network.loader(loader, progress),
        lambda: network.costs,
        next(iter(network.exits.values()))._seen,
    )


def calibrate(
    model: nn.Module,
    loader: Curve | Record | Iterable[Any],
    *,
    flops: float | None = None,
    accuracy_drop: float | None = None,
    latency: float | None = None,
    milliseconds: float | None = None,
    risk: tuple[float, float] | None = None,
    of: Of = "accuracy",
    batch_size: int = 128,
    profile: Profile | None = None,
    method: Method = "auto",
    progress: bool = True,
) -> OperatingPoint:
    """Sets the thresholds of all exits, from a loader or from a record or curve of it: see EarlyExit.calibrate."""
    target = Target(
        flops=flops,
        accuracy_drop=accuracy_drop,
        latency=latency,
        milliseconds=milliseconds,
        risk=risk,
        of=of,
        batch_size=batch_size,
        profile=profile,
        method=method,
    )
    names = tuple(_Network(model, "calibrate").exits)

    def refuse_foreign(found: Record | Curve) -> None:
        if found.names != names:
            raise ValueError(
                f"the {type(found).__name__.lower()} is of another network, with exits {', '.join(found.names)}; "
                f"wanted {', '.join(names)}"
            )

    point = target.point(
        loader,
        lambda batches: record(model, batches, progress),
        refuse_foreign,
        lambda images: _Network(model, "profile").profile(images, batch_size, progress=progress),
        progress,
    )
    set_thresholds(model, point)
    return point


def profile(
    model: nn.Module, images: Tensor, batch_size: int = 128, *, repeats: int = 10, progress: bool = True
) -> Profile:
    """How long every stage and every exit step takes here: see EarlyExit.profile."""
    return _Network(model, "profile").profile(images, batch_size, repeats, progress)


def set_thresholds(model: nn.Module, thresholds: OperatingPoint | Tensor | Sequence[float] | float) -> None:
    """Sets the thresholds of all exits, in their order: those of an operating point, a list, or one number for all."""
    exits = _exits(model)
    given = thresholds.thresholds if isinstance(thresholds, OperatingPoint) else thresholds
    vector = torch.as_tensor(given, dtype=torch.float32).detach().cpu()
    vector = threshold_vector(vector.expand(len(exits)) if vector.dim() == 0 else vector, len(exits))
    for (name, exit), limit in zip(exits.items(), vector.tolist(), strict=True):
        if limit < math.inf and not exit.head.fitted:
            raise RuntimeError(_UNFITTED.format(where=f"exit {name!r}"))
    for exit, limit in zip(exits.values(), vector.tolist(), strict=True):
        exit.threshold = limit


_UNFITTED = "{where} knows no classes yet: call e2cm_ext.fast_exit.fit(model, loader) first"


def _exits(model: nn.Module) -> dict[str, FastExit]:
    exits = {name: module for name, module in model.named_modules() if isinstance(module, FastExit)}
    if not exits:
        raise ValueError(f"`model` is a {type(model).__name__} without a FastExit in it")
    return exits


class _Network:
    """A network with FastExit layers, for passes.fit and passes.record."""

    def __init__(self, model: nn.Module, what: str) -> None:
        self.model, self.exits = model, _exits(model)
        refuse_train_mode(model, what)
        self.heads = [exit.head for exit in self.exits.values()]
        self._costs: Costs | None = None

    def loader(self, batches: Iterable[Any], progress: bool) -> Loader:
        return Loader(batches, self.model, self.heads[0].num_classes, progress=progress)

    def refuse_unfitted(self) -> None:
        for name, exit in self.exits.items():
            if not exit.head.fitted:
                raise RuntimeError(_UNFITTED.format(where=f"exit {name!r}"))

    @property
    def rule(self) -> Rule:
        rules = {exit.rule.name: exit.rule for exit in self.exits.values()}
        if len(rules) > 1:
            raise ValueError(f"the exits have different rules, {' and '.join(map(repr, rules))}: a record has one")
        (rule,) = rules.values()
        return rule

    def profile(self, images: Tensor, batch_size: int, repeats: int = 10, progress: bool = True) -> Profile:
        self.refuse_unfitted()
        return timing.measure(
            self.heads,
            self.rule,
            self.walk,
            placed(images, self.model),
            tuple(self.exits),
            batch_size=batch_size,
            repeats=repeats,
            progress=progress,
        )

    def walk(self, images: Tensor, visit: Visit, /, *, logits: bool) -> Tensor:
        with _watching(_Watcher(self.exits, visit)) as watcher:
            self.model(images)
        watcher.refuse_missing(logits)
        return images if watcher.logits is None else watcher.logits

    def walk_and_count(self, images: Tensor, visit: Visit, /, *, logits: bool) -> Tensor:
        if self._costs is None:
            self._costs = self._count(images)
        return self.walk(images, visit, logits=logits)

    @property
    def costs(self) -> Costs:
        assert self._costs is not None
        return self._costs

    def _count(self, images: Tensor) -> Costs:
        def run(model: nn.Module, sample: Tensor) -> list[int]:
            totals = [0]
            with counting() as spent:
                _Network(model, "record").walk(sample, lambda j, x: totals.append(spent()), logits=False)
                return [*totals, spent()]

        totals = on_meta_device(run, self.model, one_sample(images, "images"))
        stages = tuple(after - before for before, after in pairwise(totals))
        return Costs(stages, tuple(head.flops() for head in self.heads), tuple(self.exits))


class _Watcher:
    """Sees the features at every exit while one batch runs through a network, and its logits."""

    def __init__(self, exits: dict[str, FastExit], visit: Visit) -> None:
        self._names = list(exits)
        self._expected = list(exits.values())
        self._visit = visit
        self._seen = 0
        self.logits: Tensor | None = None

    def see(self, exit: FastExit, x: Tensor) -> None:
        j = self._seen
        if j == len(self._expected) or exit is not self._expected[j]:
            found = next(
                (name for name, one in zip(self._names, self._expected, strict=True) if one is exit), "another"
            )
            raise RuntimeError(
                f"exit {found!r} was called as number {j}; wanted every exit once, in the order in which they are set "
                f"up: {', '.join(self._names)}"
            )
        self._seen = j + 1
        self._visit(j, x)

    def refuse_missing(self, logits: bool) -> None:
        if self._seen < len(self._expected):
            raise RuntimeError(f"exit {self._names[self._seen]!r} was not called by the network's forward()")
        if logits and self.logits is None:
            raise RuntimeError("the network's forward() has not called state.result(logits)")


# Not in the modules: other threads may be using them.
_watcher: ContextVar[_Watcher | None] = ContextVar("e2cm_ext_watcher", default=None)


@contextmanager
def _watching(watcher: _Watcher) -> Iterator[_Watcher]:
    token = _watcher.set(watcher)
    try:
        yield watcher
    finally:
        _watcher.reset(token)
