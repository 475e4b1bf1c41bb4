"""A network with exits as an nn.Module that runs: stages, heads, a rule and thresholds.

What EarlyExit adds is learning and choosing: fit, calibrate, select, files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from ..data.loader import Loader, device_and_dtype, refuse_train_mode
from ..heads import Head, Rule
from ..heads.ensemble import Combination
from ..heads.protocol import Visit
from ..heads.threshold_buffer import ThresholdModule
from ..heads.thresholds import threshold_vector
from ..ops.types import Decisions
from ..stages import Costs, Stages
from ..stages.compiled import Compiled
from . import cascade
from .compaction_policy import CompactionPolicy
from .stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ExitModule"]


class ExitModule(ThresholdModule, buffer="thresholds"):
    """Stages of a network with a head behind each but the last, and thresholds that say which samples leave there.

    Args:
        stages: The network in M+1 stages.
        heads: One head for each of the M exits.
        rule: Turns scores into a certainty, which is compared with the threshold.
        costs: FLOPs per sample of stages and heads.
        image_shape: Shape of one sample, as the first stage takes it.
        image_dtype: Its dtype.
        combination: How exits answer together; None if each answers for itself.
        labelled: False if the network's own predictions take the place of labels.
    """

    stages: Stages
    heads: nn.ModuleList
    rule: Rule
    costs: Costs
    num_classes: int  # or clusters
    image_shape: tuple[int, ...]
    image_dtype: torch.dtype
    labelled: bool
    # Exits that are off take no part in a combination, so a record, in which all exits are on, predicts what happens as
    # long as all thresholds are finite: `calibrate` sees to it.
    combination: Combination | None
    compaction: CompactionPolicy  # when survivors are moved together: by FLOPs, or by the last profile; not saved
    _compiled: Compiled | None = None  # what `compile` made of the stages; not saved, not copied

    @torch.inference_mode(False)  # buffers made in inference mode could not be written to outside of it
    def __init__(
        self,
        stages: Stages,
        heads: Sequence[Head],
        rule: Rule,
        costs: Costs,
        image_shape: tuple[int, ...],
        image_dtype: torch.dtype,
        *,
        combination: Combination | None = None,
        labelled: bool = True,
    ) -> None:
        super().__init__()
        device, _ = device_and_dtype(stages)
        self.stages = stages
        self.heads = nn.ModuleList(heads).to(device)
        self.rule, self.costs, self.num_classes = rule, costs, heads[0].num_classes
        self.image_shape, self.image_dtype = image_shape, image_dtype
        self.combination, self.labelled = combination, labelled
        self.register_buffer("thresholds", torch.full((len(heads),), math.inf, dtype=torch.float32, device=device))
        self.compaction = CompactionPolicy.from_flops(
            costs.stages, [image_dtype.itemsize * math.prod(head.feature_shape) for head in heads]
        )
        # Looked at before every batch: has a user put the model, which shares these modules, into train mode?
        self._leaves = tuple(m for m in stages.modules() if type(m) is not nn.Module and not any(m.children()))
        self.eval()

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Names of the M exits: the modules of the model that they stand behind."""
        return self.stages.names

    # ---- running ----------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Compute log-probabilities, in place of the model's logits.

        Args:
            images: A batch [B, ...] as the model takes it.

        Returns:
            [B, K] in the dtype of the logits: valid logits for argmax, softmax, top-k or cross-entropy. They carry a
            gradient if no exit is active.
        """
        limits = self.check_images(images)
        if limits is None:
            log_probs: Tensor = (self._compiled or self.stages)(images).log_softmax(1)
            return log_probs
        with torch.no_grad():
            log_probs = self._run(images, limits).log_probs()
        return log_probs

    @torch.no_grad()
    def predict(self, images: Tensor) -> Decisions:
        """Predict classes, and say at which exit each sample left.

        Args:
            images: A batch [B, ...] as the model takes it.

        Returns:
            Decisions in input order. `confidence` is the largest probability, whatever the rule; `exit` is M, the
            number of exits, for samples that went through the whole network.
        """
        return self._run(images, self.check_images(images) or [math.inf] * len(self.heads)).result()

    def _run(self, images: Tensor, limits: Sequence[float]) -> cascade.Cascade:
        return cascade.run_cascade(
            self._compiled or self.stages,
            self.head_list(),
            self.rule,
            limits,
            images,
            self.num_classes,
            compaction=self.compaction,
            combination=self.combination,
        )

    @overload
    def predict_stream(
        self, loader: Iterable[Any], *, order: Literal[True] = True, batch_size: int | None = None,
        max_wait: int | None = None, progress: bool = False,
    ) -> Generator[Decisions, None, None]: ...  # fmt: skip

    @overload
    def predict_stream(
        self, loader: Iterable[Any], *, order: Literal["completed"], batch_size: int | None = None,
        max_wait: int | None = None, progress: bool = False,
    ) -> Generator[tuple[Tensor, Decisions], None, None]: ...  # fmt: skip

    def predict_stream(
        self,
        loader: Iterable[Any],
        *,
        order: Literal[True, "completed"] = True,
        batch_size: int | None = None,
        max_wait: int | None = None,
        progress: bool = False,
    ) -> Generator[Decisions, None, None] | Generator[tuple[Tensor, Decisions], None, None]:
        """Predict all batches of a loader, faster than `predict` one by one: survivors of many batches are pooled.

        Thresholds and heads are those at the time of the call. At most, the features of one and a half times
        `batch_size` samples are held per active exit, and the decisions of `max_wait` + 1 batches. If the loader fails,
        the samples that it had given are answered before its error is raised; Ctrl-C is raised at once.

        Args:
            loader: Yields images or (images, labels); labels are ignored. It must not write into a batch it has given.
            order: True: in the order of the input. "completed": as soon as there are decisions.
            batch_size: The most samples that a stage runs at once; it runs when more than half of that many wait for
                it. None: the size of the loader's first batch. For a loader of small batches give a larger one.
            max_wait: After so many further batches, a sample's stage runs without more company; with 0 every batch is
                answered before the next one is taken. None: as many as hold 64 x `batch_size` samples.
            progress: Show a progress bar.

        Yields:
            order=True: the Decisions of every batch, as zip(loader, ...) expects them. order="completed": pairs
            (numbers, Decisions), where numbers (int64) count the samples of the loader from 0.

        Example:
            >>> for (images, labels), decisions in zip(loader, ee.predict_stream(loader)):
            ...     correct += (decisions.prediction == labels).sum()
        """
        if order is not True and order != "completed":
            raise ValueError(f"`order` is {order!r}; wanted True, for the order of the input, or 'completed'")
        if self.combination is not None:
            raise ValueError(
                f"the exits of this network answer together ({self.combination.name}), which streams cannot do: use "
                "predict"
            )
        refuse_train_mode(self, "predict_stream")
        limits: list[float] = self.thresholds.tolist()
        self.check_fitted(limits)
        stream = Stream(
            self._compiled or self.stages,
            self.head_list(),
            self.rule,
            limits,
            self.num_classes,
            batch_size=batch_size,
            max_wait=max_wait,
            before_run=self._check_eval_mode,
        )
        images = self.batches(loader, progress).images("predict")
        return stream.in_order(images) if order is True else stream.completed(images)

    def walk(self, images: Tensor, visit: Visit, /, *, logits: bool) -> Tensor:
        """Run the whole network on a batch and show the features at each exit. No sample leaves.

        Args:
            images: A batch, on the network's device and in its dtype.
            visit: Called as visit(j, features) at exit j, before the next stage runs, which may overwrite the features.
            logits: Whether the last stage is run.

        Returns:
            The logits [B, K], or the last features if `logits` is false.
        """
        x = images
        stages: Iterable[cascade.Stage] = self._compiled or self.stages
        *early, last = stages
        for j, stage in enumerate(early):
            x = stage(x)
            visit(j, x)
        return last(x) if logits else x

    def compile(  # type: ignore[override]
        self, *, fold: bool = False, channels_last: bool = False, **options: Any
    ) -> Self:
        """Run the stages through torch.compile from now on.

        Each stage is compiled when it is first run: for a single image, and once or twice (torch takes other kernels
        for few samples) for batches of any size. As with nn.Module.compile, copies are not compiled, and neither is
        what `load` makes. Answers differ from those of the model by rounding: calibrate after compiling.

        Args:
            fold: Fold batch normalisation into the convolution before it.
            channels_last: Keep weights and images in that memory format.
            **options: Of torch.compile (mode, backend, options, ...).

        `fold` and `channels_last` work on copies of the stages: the model stays as it is, and what is done to its
        weights later is not seen until `compile` is called again; .to() and the like are.

        Returns:
            The network itself.
        """
        refuse_train_mode(self, "compile")
        self._compiled = Compiled(self.stages, fold=fold, channels_last=channels_last, options=options)
        return self

    # ---- thresholds -------------------------------------------------------------------------------------------------

    if TYPE_CHECKING:  # a buffer, in fact

        @property
        def thresholds(self) -> Tensor:
            """[M] float32; can be set to a list, a tensor, or one number for all. +inf: that exit never fires."""

        @thresholds.setter
        def thresholds(self, value: Tensor | Sequence[float] | float) -> None: ...

    def check_thresholds(self, value: Any) -> Tensor:
        """Convert one threshold for all exits, or one per exit, to [M] float32; refuse those of unfitted heads."""
        exits = len(self.heads)
        try:
            vector = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"`thresholds` is {value!r}; wanted {exits} numbers, or one for all exits") from error
        vector = threshold_vector(vector.expand(exits) if vector.dim() == 0 else vector, exits)
        self.check_fitted(vector.tolist())
        return vector

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._compiled is not None and self._compiled.own is not None:
            self._compiled.own._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    # ---- checks -----------------------------------------------------------------------------------------------------

    def check_images(self, images: Tensor) -> list[float] | None:
        """Refuse what this network cannot run, before it runs.

        Returns:
            The thresholds; None if no exit is active.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"`images` is a {type(images).__name__}; wanted a tensor {self._batch_shape()}")
        if images.shape[1:] != self.image_shape:
            hint = ": is it one image without a batch? .unsqueeze(0)" if images.shape == self.image_shape else ""
            raise ValueError(
                f"`images` has shape {list(images.shape)}; wanted {self._batch_shape()}, as `example_input` had{hint}"
            )
        self._check_eval_mode()
        limits: list[float] = self.thresholds.tolist()
        if min(limits) == math.inf:
            return None
        self.check_fitted(limits)
        return limits

    def check_fitted(self, thresholds: Sequence[float] | None = None) -> None:
        """Refuse exits that fire and have an unfitted head. None: all exits fire."""
        limits = [-math.inf] * len(self.heads) if thresholds is None else thresholds
        for j, (head, threshold) in enumerate(zip(self.heads, limits, strict=True)):
            if not head.fitted and threshold < math.inf:
                raise RuntimeError(f"exit {self.exit_names[j]!r} knows no classes yet: call fit(loader) first")

    def _check_eval_mode(self) -> None:
        if self.training or any(leaf.training for leaf in self._leaves):
            refuse_train_mode(self, "inference")

    def _batch_shape(self) -> str:
        return f"[{', '.join(map(str, ('batch', *self.image_shape)))}]"

    # ---- small parts ------------------------------------------------------------------------------------------------

    def head_list(self) -> list[Head]:
        """`heads` as a typed list: an nn.ModuleList does not know what it holds."""
        return list(self.heads)  # type: ignore[arg-type]

    def batches(
        self, loader: Iterable[Any], progress: bool, answers: Callable[[Tensor], Tensor] | None = None
    ) -> Loader:
        """A user's loader as this network wants its batches. answers: labels for images, in place of the loader's."""
        return Loader(loader, self.stages, self.num_classes, self.image_shape, progress, answers)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_compiled", None)
        return state

    def __repr__(self) -> str:
        fitted = [head.fitted for head in self.head_list()]
        state = "fitted" if all(fitted) else "not fitted yet" if not any(fitted) else "fitted in part"
        lines = [
            f"{type(self).__name__}({len(self.heads)} exits, {self.num_classes} classes, rule {self.rule.name!r}, "
            f"{state})",
            f"  images {self._batch_shape()}; an exit fires above its threshold; FLOPs: of a sample that leaves there",
        ]
        rows = zip(
            self.exit_names, self.head_list(), self.thresholds.tolist(), self.costs.fractions.tolist(), strict=False
        )
        width = max(map(len, self.exit_names))
        for name, head, threshold, fraction in rows:
            features = "x".join(map(str, head.feature_shape))
            lines.append(
                f"  {name:{width}}  {head.kind} of {features:12} threshold {threshold:<9.6g} FLOPs {fraction:.4f}"
            )
        return "\n".join(lines)
