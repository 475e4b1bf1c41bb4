"""EarlyExit: a trained image classifier, wrapped so that every sample leaves it as soon as it is recognised."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from .calibration import curves, recording, selection
from .calibration import profile as timing
from .calibration.curves import Curve, Method, OperatingPoint
from .calibration.guarantee import Of
from .calibration.profile import Profile, TimedPoint, check_batch_size
from .calibration.record import Record, threshold_vector
from .calibration.selection import Selection
from .calibration.target import Target
from .clusters import Centres, centres_of, sample, with_centres, without_centres
from .data.loader import Loader, no_labels, place_of, placed, refuse_train_mode, refuse_used_up
from .data.overlap import FittedImages
from .deploy.exporter import Format, export
from .heads import Head, build, ensemble, fitting, from_config
from .heads.base import positive
from .heads.ensemble import Combination
from .heads.protocol import Visit
from .heads.rules import Rule
from .heads.rules import rule as rule_named
from .ops.types import Decisions
from .runtime import cascade
from .runtime.compaction_policy import Compaction
from .runtime.stream import Stream
from .stages import Stages, at_exits, cut, stage_flops
from .stages.compiled import Compiled
from .stages.flops import Costs
from .utils import distributed, serialization

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EarlyExit", "Evaluation"]

_KIND = "EarlyExit"


class EarlyExit(nn.Module):
    """A trained classifier in which every sample leaves as soon as it looks like its class.

        import torch
        from torch import nn
        import e2cm_ext as e2cm

        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
        ).eval()                                              # yours, trained
        images = torch.randn(384, 1, 9, 9)
        labels = (images.mean((1, 2, 3)) > 0).long()
        loader = [(images[:128], labels[:128]), (images[128:256], labels[128:256])]   # or any DataLoader
        held_out = [(images[256:], labels[256:])]

        ee = e2cm.EarlyExit(model, images[:1])                # cut into stages, an exit behind each block
        ee.fit(loader)                                        # learns what the classes look like there: no gradients
        point = ee.calibrate(held_out, flops=0.9)             # sets ee.thresholds, from samples not fitted on
        print(point)
        print(ee.evaluate(loader))                            # accuracy, mean FLOPs, who leaves where
        log_probs = ee(images)                                # [B, K], wherever model(images) was used
        decisions = ee.predict(images)                        # .prediction .confidence .exit .log_probs

    model: any traceable torch.nn.Module in eval mode that maps a batch of tensors to logits [B, K]; or Stages, cut by
    hand. It is not modified; but the stages hold its modules, so .to(), .half() and training of one of the two do it
    to the other. example_input: a batch as the model takes it; one sample is enough, and only its shape and dtype
    matter. num_classes: for a check; the model's logits tell. exits: "blocks", "all", a number, module names or FLOPs
    fractions, see `e2cm_ext.stages.cut`. head: "whitened_means" (ours; class means at exits whose features it does not
    suit, see `e2cm_ext.heads.build`), "class_means" (the paper's), "pooled_means", "auto" (class means wherever all of
    them fit into `memory` bytes, else pooled means), a Head class, or a function (num_classes, feature_shape) -> Head.
    rule: "confidence" or "entropy", or a Rule.

    Exits fire when thresholds say so: `thresholds` is a buffer [M], +inf at the start, which never fires, and a head at
    such an exit is not even computed. With all of them at +inf, ee(x) is log_softmax(model(x)), bit for bit and with
    its gradient. A sample with a NaN in its features does not leave early.

    Inference changes nothing: any number of threads may call one EarlyExit. state_dict(), deepcopy and pickle include
    the model; `save` does not.
    """

    stages: Stages
    heads: nn.ModuleList
    rule: Rule
    costs: Costs  # FLOPs per sample of stages and heads; .fractions: what leaving at each exit costs
    num_classes: int  # or clusters
    labelled: bool = True  # False, after fit(labels=None): whatever wants labels takes the network's own answers
    # What exits answer where earlier ones are not forgotten; see heads/ensemble.py. Exits that are off take no part, so
    # a record, in which all are on, tells what happens as long as all thresholds are finite: `calibrate` sees to it.
    combination: Combination | None = None
    selection: Selection | None = None  # what `select` found, in the network that it made; not saved
    compaction: Compaction  # when inference moves survivors together: by FLOPs, or by the last profile; not saved
    _compiled: Compiled | None = None  # what `compile` made of the stages; not saved, not copied

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        num_classes: int | None = None,
        exits: str | int | Sequence[str] | Sequence[float] = "blocks",
        head: str | type[Head] | Callable[[int, tuple[int, ...]], Head] = "whitened_means",
        rule: str | Rule = "confidence",
        memory: int = 256 << 20,
    ) -> None:
        super().__init__()
        decide = rule_named(rule)
        if isinstance(model, EarlyExit):
            raise TypeError(
                "`model` is an EarlyExit, which has its exits; wanted the network itself, or for fewer of these exits "
                "`select` or `at_exits`"
            )
        stages = cut(model, example_input, exits)
        if isinstance(head, str) and place_of(stages)[1] is torch.float64:
            raise TypeError("`model` is torch.float64; exits take float32, bfloat16 or float16: call model.float()")
        shapes, found = _shapes(stages, example_input[:1])
        if num_classes not in (None, found):
            raise ValueError(f"`num_classes` is {num_classes!r}; the model answers with {found} logits")
        heads = build(head, found, shapes, memory)
        costs = Costs(stage_flops(stages, example_input), tuple(head.flops() for head in heads), stages.names)
        self._assemble(stages, heads, decide, costs, tuple(example_input.shape[1:]), example_input.dtype)

    @torch.inference_mode(False)  # as of heads
    def _assemble(
        self,
        stages: Stages,
        heads: Sequence[Head],
        rule: Rule,
        costs: Costs,
        image_shape: tuple[int, ...],
        image_dtype: torch.dtype,
    ) -> None:
        device, _ = place_of(stages)
        self.stages = stages
        self.heads = nn.ModuleList(heads).to(device)
        self.rule, self.costs, self.num_classes = rule, costs, heads[0].num_classes
        self.register_buffer("thresholds", torch.full((len(heads),), math.inf, dtype=torch.float32, device=device))
        self._image_shape, self._image_dtype = image_shape, image_dtype
        self._seen: FittedImages | None = None  # when the heads were fitted; not saved
        self.compaction = Compaction.by_flops(
            costs.stages, [image_dtype.itemsize * math.prod(head.feature_shape) for head in heads]
        )
        # Asked before every batch whether the model has been put into train mode behind our back.
        self._leaves = tuple(m for m in stages.modules() if type(m) is not nn.Module and not any(m.children()))
        self.eval()

    # ---- learning ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        loader: Iterable[Any],
        progress: bool = True,
        *,
        labels: Literal["loader"] | None = "loader",
        clusters: int | None = None,
    ) -> Self:
        """Learns from scratch what the classes look like at every exit, from (images, labels); returns self.

        Forward passes only, as many as the heads need (whitened means: one, class means: two), and nothing is held but
        their statistics and one batch. All thresholds go back to +inf, since old ones mean nothing to new heads:
        calibrate, or set them. After an error, or Ctrl-C, all is as it was before.

        labels=None: there are none, or nobody looks at them, and the network's own answers take their place; here, and
        from then on in `record`, `curve`, `calibrate`, `select` and `evaluate`, whose accuracy then means agreement
        with the whole network. Loaders may yield images alone.

        clusters=10: the network's own answer becomes one of so many clusters: k-means of what it answers with, which is
        its logits, or features if its classifier was taken off (model.fc = nn.Identity(), and model.eval()).
        Log-probabilities are those of clusters then, and a cluster has the same number at every exit, since exits learn
        from the same clusters. That takes a further pass; at most 20,000 rows of what the network answers with are held
        for it.
        """
        self._refuse_train_mode("fit")
        if labels not in ("loader", None):
            raise ValueError(f"`labels` is {labels!r}; wanted 'loader', for those that it yields, or None")
        if labels is not None and clusters is not None:
            raise TypeError("`clusters` are found where there are no labels: give labels=None with it")
        if clusters is not None:
            positive("clusters", clusters)
        stages, heads = self._answering(loader, clusters, progress)
        own = None if labels is not None else lambda images: stages(images).argmax(1)
        ready = self._loader(loader, progress, own)._replace(num_classes=heads[0].num_classes)
        fitted, self._seen = fitting.fit(heads, self._walk, ready)
        if stages is not self.stages:
            self._compiled = None  # of a network that answers otherwise: `compile` again
        self.stages, self.labelled, self.num_classes = stages, labels is not None, heads[0].num_classes
        self.costs = replace(self.costs, heads=tuple(head.flops() for head in fitted))
        self.thresholds = math.inf
        self.heads = nn.ModuleList(fitted).eval()
        return self

    @torch.no_grad()
    def _answering(self, loader: Iterable[Any], clusters: int | None, progress: bool) -> tuple[Stages, list[Head]]:
        """The network answering with so many clusters of the loader's images, or as it came; and heads for that."""
        stages, before = without_centres(self.stages)
        heads = self._heads()
        if clusters is not None:
            ready = self._loader(loader, progress)
            refuse_used_up(ready, 2)
            with distributed.synchronize_errors("fit"):
                mine = sample(stages(images) for images in ready.images("clusters") if len(images))
            rows = distributed.all_gather_objects(mine)
            centres = distributed.broadcast_from_rank0(lambda: centres_of(torch.cat(rows), clusters))
            device, _ = place_of(stages)
            stages = with_centres(stages, centres.to(device))
        if clusters is not None or before is not None:
            example = torch.zeros(1, *self._image_shape, dtype=self._image_dtype)
            _, count = _shapes(stages, placed(example, stages))
            heads = [from_config(head.config() | {"num_classes": count}).to(self.thresholds.device) for head in heads]
        return stages, heads

    def record(self, loader: Iterable[Any], progress: bool = True) -> Record:
        """What every exit, and the network itself, would say about every sample: no threshold matters here.

        A warning says so if the exits were fitted on the same images, unless they have been loaded from a file since.
        """
        self._refuse_train_mode("record")
        self._refuse_unfitted([-math.inf] * len(self.heads))
        ready = self._loader(loader, progress, None if self.labelled else no_labels)
        found = recording.record(
            self._heads(), self.rule, self._walk, ready, lambda: self.costs, self._seen, self.combination
        )
        return found if self.labelled else replace(found, label=found.prediction[:, -1].long())

    def curve(
        self,
        loader: Record | Iterable[Any],
        progress: bool = True,
        *,
        method: Method = "auto",
    ) -> Curve:
        """Accuracy over FLOPs, by the threshold search of `calibration` on a loader's samples, or on a record of them.

        method: "paper"; "coordinate", which is ours: more accurate for the same FLOPs, but it wants many samples; or
        "auto", which is "coordinate" from 30 samples per exit on and else "paper".
        """
        record = loader if isinstance(loader, Record) else self.record(loader, progress)
        self._refuse_foreign(record)
        return curves.curve(record, method=method, progress=progress)

    def calibrate(
        self,
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
        """Sets the thresholds, from a loader or from a record or curve of it; returns the operating point it has set.

        One of these says what is wanted:

        - flops=0.5: the most accurate thresholds whose mean FLOPs per sample are at most half the network's own.
        - accuracy_drop=0.01: the cheapest whose accuracy is at most 0.01 below the network's own.
        - latency=0.5: the most accurate whose expected time per batch of `batch_size` is at most half the network's own
          on this device; milliseconds=12.0: at most 12 ms per batch. Times are those of `profile`, or are measured, on
          the loader's first images. A TimedPoint is returned.
        - risk=(0.01, 0.05): the cheapest that can be shown to lose no more accuracy than 0.01 on new samples, with an
          error of probability 0.05; with of="agreement", to answer otherwise than the network in no more than 0.01 of
          them. A GuaranteedPoint is returned; if nothing can be shown, all exits are off, and a warning says so.

        All but `risk` are said of the samples of the loader, and all are wrong if the heads were fitted on these: take
        others. For a time or a risk a curve does not do, and a record has no images to measure a time with. method: of
        the threshold search, see `curve`; a curve has been searched already. After Ctrl-C all is as it was before.
        """
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
        point = target.point(
            loader,
            lambda batches: self.record(batches, progress),
            self._refuse_foreign,
            lambda images: self.profile(images, batch_size, progress=progress),
            progress,
        )
        if self.combination is None:
            self.thresholds = point.thresholds
        else:  # exits that never fire stay on
            self.thresholds = point.thresholds.clamp(max=torch.finfo(torch.float32).max)
        return point

    def profile(self, images: Tensor, batch_size: int = 128, *, repeats: int = 10, progress: bool = True) -> Profile:
        """How long every stage and every exit step takes here, at batch sizes 1, 2, 4, ... up to `batch_size`.

        images: a batch to run; a smaller one is repeated. Medians of `repeats` rounds; see
        `e2cm_ext.calibration.profile`.
        Inference goes by it from then on where it has to choose between moving survivors together and carrying on with
        those who have left; that changes no answer.
        """
        batch = placed(images, self.stages)
        self._limits(batch)
        self._refuse_unfitted([-math.inf] * len(self.heads))
        found = timing.measure(
            self._heads(),
            self.rule,
            self._walk,
            batch,
            self.exit_names,
            batch_size=batch_size,
            repeats=repeats,
            progress=progress,
        )
        self.compaction = Compaction.by_time(found)
        return found

    def plan(self, record: Record, profile: Profile, batch_size: int = 128) -> TimedPoint:
        """Switches off the exits that cost more time than they save at this batch size; returns what it has set.

        That changes answers: who would have left at such an exit leaves at a later one. So it is never done unasked;
        accuracy and FLOPs of the point returned are those of the record without these exits.
        """
        self._refuse_foreign(record)
        point = timing.drop_unprofitable_exits(record, profile, self.thresholds, batch_size)
        self.thresholds = point.thresholds
        return point

    def evaluate(self, loader: Iterable[Any], progress: bool = True) -> Evaluation:
        """Runs the network with its exits: accuracy, mean FLOPs per sample, and how many samples left where."""
        # The last number: of right answers.
        tally = torch.zeros(len(self.stages) + 1, dtype=torch.int64, device=self.thresholds.device)
        own = None if self.labelled else lambda images: self.stages(images).argmax(1)
        with distributed.synchronize_errors("evaluate"):
            for images, labels in self._loader(loader, progress, own).run("evaluate"):
                decisions = self.predict(images)
                tally[-1] += (decisions.prediction == labels).sum()
                tally[:-1] += decisions.exit.bincount(minlength=len(self.stages))
        *exits, correct = distributed.all_reduce_sum(tally).tolist()
        leavers, count = torch.tensor(exits, device="cpu"), sum(exits)
        if not count:
            raise ValueError("the loader gave no sample: all its batches are empty")
        fractions = _with_heads_on(self.costs, self.thresholds.tolist()).fractions
        return Evaluation(correct / count, float(leavers.double() @ fractions) / count, leavers, self.exit_names)

    # ---- fewer exits ------------------------------------------------------------------------------------------------

    def select(
        self,
        loader: Record | Iterable[Any],
        count: int | None = None,
        progress: bool = True,
        *,
        flops: tuple[float, float] = (0.0, 1.0),
    ) -> Self:
        """A new network with only those exits that are worth it, found on a loader's samples or on a record of them.

        count: how many; without it, as few as come within 0.001 of the best. flops: the budgets that matter. See
        `e2cm_ext.calibration.selection`; what was found is in `selection` of the new network, to be printed. As
        with `at_exits`, this one stays as it is. Take samples that the heads were not fitted on.
        """
        if self.combination is not None:
            raise ValueError(
                f"the exits of this network answer together ({self.combination.name}), and what fewer of them would "
                "answer no record says: name the exits to at_exits() and calibrate what it returns"
            )
        record = loader if isinstance(loader, Record) else self.record(loader, progress)
        self._refuse_foreign(record)
        found = selection.select(record, count, flops=flops, progress=progress)
        chosen = self.at_exits(found.names)
        chosen.selection = found
        return chosen

    def at_exits(self, exits: Iterable[str | int]) -> Self:
        """A new network with only these exits, given by name or number, around the same model.

        Its heads are copies of those here, stages between its exits are joined, and its thresholds are +inf: calibrate
        it, since thresholds of one set of exits mean little to another.
        """
        numbers = self.costs.numbers(exits)
        if not numbers:
            raise ValueError("`exits` is empty; wanted at least one exit: without any it is the model itself")
        chosen = type(self).__new__(type(self))
        nn.Module.__init__(chosen)
        with torch.inference_mode(False):
            heads = [copy.deepcopy(self._heads()[j]) for j in numbers]
        costs = self.costs.at_exits(numbers)
        plain, centres = without_centres(self.stages)
        stages = with_centres(at_exits(plain, numbers), centres)
        chosen._assemble(stages, heads, self.rule, costs, self._image_shape, self._image_dtype)
        chosen.combination = self.combination and self.combination.at_exits(numbers)
        chosen.labelled = self.labelled
        return chosen

    # ---- compiled ---------------------------------------------------------------------------------------------------

    def compile(  # type: ignore[override]
        self, *, fold: bool = False, channels_last: bool = False, **options: Any
    ) -> Self:
        """Everything that runs the network runs its stages through torch.compile from now on; returns self.

        Each stage is compiled when it is first run: for a single image, and once or twice (torch takes other kernels
        for few) for batches of any size. options: of torch.compile (mode, backend, options, ...). As with
        nn.Module.compile, copies are not compiled, and neither is what `load` makes. Answers differ from those of the
        model by rounding; calibrate after compiling.

        fold: every convolution does the work of the batch normalisation behind it. channels_last: weights and images in
        that memory order. Both are done to copies of the stages: the model stays as it is, and what is done to its
        weights later is not seen until `compile` is called again; .to() and the like are.
        """
        self._refuse_train_mode("compile")
        self._compiled = Compiled(self.stages, fold=fold, channels_last=channels_last, options=options)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_compiled", None)
        return state

    # ---- answering --------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities [B, K], in the dtype of the logits: in place of the model's logits, for argmax, softmax,
        top-k or cross-entropy. They carry a gradient if no exit is active."""
        limits = self._limits(images)
        if limits is None:
            log_probs: Tensor = (self._compiled or self.stages)(images).log_softmax(1)
            return log_probs
        with torch.no_grad():
            log_probs = self._through(images, limits).log_probs()
        return log_probs

    @torch.no_grad()
    def predict(self, images: Tensor) -> Decisions:
        """Prediction, confidence, exit and log-probabilities of every image, in input order.

        The exit of who never leaves early is M, the number of exits: the network itself. Confidence is the largest
        probability, whatever the rule.
        """
        return self._through(images, self._limits(images) or [math.inf] * len(self.heads)).result()

    def _through(self, images: Tensor, limits: Sequence[float]) -> cascade.Cascade:
        return cascade.run_cascade(
            self._compiled or self.stages,
            self._heads(),
            self.rule,
            limits,
            images,
            self.num_classes,
            compaction=self.compaction,
            combination=self.combination,
        )

    @overload
    def predict_stream(
        self,
        loader: Iterable[Any],
        *,
        order: Literal[True] = True,
        batch_size: int | None = None,
        max_wait: int | None = None,
        progress: bool = False,
    ) -> Generator[Decisions, None, None]: ...

    @overload
    def predict_stream(
        self,
        loader: Iterable[Any],
        *,
        order: Literal["completed"],
        batch_size: int | None = None,
        max_wait: int | None = None,
        progress: bool = False,
    ) -> Generator[tuple[Tensor, Decisions], None, None]: ...

    def predict_stream(
        self,
        loader: Iterable[Any],
        *,
        order: Literal[True, "completed"] = True,
        batch_size: int | None = None,
        max_wait: int | None = None,
        progress: bool = False,
    ) -> Generator[Decisions, None, None] | Generator[tuple[Tensor, Decisions], None, None]:
        """`predict` for all batches of a loader, faster: survivors of many batches go on together.

        loader: yields images or (images, labels), whose labels are ignored. What it has given it must not change.

        order=True: gives the Decisions of every batch, one after the other, as zip(loader, ...) expects them.
        order="completed": gives pairs (numbers, Decisions) as soon as there are answers: those to the samples with
        these numbers, int64, counted from 0 over all samples of the loader.

        batch_size: the most samples that a stage runs at once; it runs when more than half of that wait for it. By
        default the size of the loader's first batch: for a loader of small batches give a larger one. max_wait: when
        so many further batches have been taken in, a sample's stage runs without more company; with 0 every batch is
        answered before the next one is taken in. By default so many as hold 64 x `batch_size` samples.

        Held at most, beside the loader's batch: before the first stage and behind every exit that is on, the features
        of half of `batch_size` samples, of one and a half while a stage runs; and the answers to max_wait + 1 batches,
        in room for twice that.

        Thresholds and heads are those at the time of the call, whatever happens to them later. If the loader fails, all
        samples that it had given are answered before the error is raised; Ctrl-C is raised at once.
        """
        if order is not True and order != "completed":
            raise ValueError(f"`order` is {order!r}; wanted True, for the order of the input, or 'completed'")
        if batch_size is not None:
            check_batch_size(batch_size)
        if self.combination is not None:
            raise ValueError(
                f"the exits of this network answer together ({self.combination.name}), which streams cannot do: use "
                "predict"
            )
        self._refuse_train_mode("predict_stream")
        limits: list[float] = self.thresholds.tolist()
        self._refuse_unfitted(limits)
        stream = Stream(
            self._compiled or self.stages,
            self._heads(),
            self.rule,
            limits,
            self.num_classes,
            batch_size=batch_size,
            max_wait=max_wait,
            ready=self._refuse_late_train_mode,
        )
        images = self._loader(loader, progress).images("predict")
        return stream.in_order(images) if order is True else stream.completed(images)

    def _limits(self, images: Tensor) -> list[float] | None:
        """The thresholds, after a look at everything that could be wrong; None if no exit is active."""
        if not isinstance(images, Tensor):
            raise TypeError(f"`images` is a {type(images).__name__}; wanted a tensor {self._wanted()}")
        if images.shape[1:] != self._image_shape:
            hint = ": is it one image without a batch? .unsqueeze(0)" if images.shape == self._image_shape else ""
            raise ValueError(
                f"`images` has shape {list(images.shape)}; wanted {self._wanted()}, as `example_input` had{hint}"
            )
        self._refuse_late_train_mode()
        limits: list[float] = self.thresholds.tolist()
        if min(limits) == math.inf:
            return None
        self._refuse_unfitted(limits)
        return limits

    def _wanted(self) -> str:
        return f"[{', '.join(map(str, ('batch', *self._image_shape)))}]"

    # ---- thresholds -------------------------------------------------------------------------------------------------

    if TYPE_CHECKING:  # a buffer, in fact

        @property
        def thresholds(self) -> Tensor:
            """[M] float32; they can be set to a list, a tensor, or one number for all."""

        @thresholds.setter
        def thresholds(self, value: Tensor | Sequence[float] | float) -> None: ...

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "thresholds" and name in self._buffers:
            value = self._checked_thresholds(value)
        super().__setattr__(name, value)

    @torch.inference_mode(False)
    def _checked_thresholds(self, value: Any) -> Tensor:
        exits = len(self.heads)
        try:
            vector = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"`thresholds` is {value!r}; wanted {exits} numbers, or one for all exits") from error
        vector = threshold_vector(vector.expand(exits) if vector.dim() == 0 else vector, exits)
        self._refuse_unfitted(vector.tolist())
        return vector.clone().to(self.thresholds.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.thresholds
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._compiled is not None and self._compiled.own is not None:
            self._compiled.own._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.thresholds.dtype is not torch.float32:  # .half() is for features; a rounded threshold decides otherwise
            self._buffers["thresholds"] = before.to(self.thresholds.device)
        return self

    # ---- what can be wrong ------------------------------------------------------------------------------------------

    def _refuse_train_mode(self, what: str) -> None:
        refuse_train_mode(self, what)

    def _refuse_late_train_mode(self) -> None:
        if self.training or any(leaf.training for leaf in self._leaves):
            self._refuse_train_mode("inference")

    def _refuse_unfitted(self, thresholds: Sequence[float]) -> None:
        for j, (head, threshold) in enumerate(zip(self.heads, thresholds, strict=True)):
            if not head.fitted and threshold < math.inf:
                raise RuntimeError(f"exit {self.exit_names[j]!r} knows no classes yet: call fit(loader) first")

    def _refuse_foreign(self, found: Record | Curve) -> None:
        if (found.names, found.rule) != (self.exit_names, self.rule.name):
            raise ValueError(
                f"the {type(found).__name__.lower()} is of another network, with the rule {found.rule!r} and exits "
                f"{', '.join(found.names)}; wanted {self.rule.name!r} and {', '.join(self.exit_names)}"
            )

    # ---- saving -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Heads, thresholds and all settings, without the model's weights, as a safetensors file.

        What was at `path` stays as it is until the new file is complete.
        """
        tensors = {"thresholds": self.thresholds}
        for j, head in enumerate(self.heads):
            for name, value in head.state_dict().items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"{name!r} of {type(head).__name__} is a {type(value).__name__}; wanted a tensor")
                tensors[f"heads.{j}.{name}"] = value
        _, dtype = place_of(self.stages)
        _, centres = without_centres(self.stages)
        if centres is not None:
            tensors |= {"centres.means": centres.means, "centres.spread": centres.spread}
        info = {
            "exits": self.exit_names,
            "heads": [head.config() for head in self._heads()],
            "rule": self.rule.name,
            "combination": self.combination and self.combination.config(),
            "labelled": self.labelled,
            "costs": {"stages": self.costs.stages, "heads": self.costs.heads},
            "image_shape": self._image_shape,
            "image_dtype": str(dtype if self._image_dtype.is_floating_point else self._image_dtype),
            "network": weights_sha256(self.stages),
        }
        serialization.write(path, _KIND, tensors, info)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, rule: Rule | None = None) -> Self:
        """What `save` wrote, around the model that it was made for (or Stages of it), on that model's device.

        A ValueError says what does not fit: the file (not ours, of another version, truncated, damaged) or the model.
        rule: needed if it was one of your own. Heads of your own: the module that defines them must be imported.
        """
        if not isinstance(model, nn.Module) or isinstance(model, EarlyExit):
            raise TypeError(f"`model` is a {type(model).__name__}; wanted the torch.nn.Module that {path} was made for")
        refuse_train_mode(model, "load")
        tensors, info = serialization.read(path, _KIND)
        decide = _saved_rule(path, info["rule"], rule)
        device, own = place_of(model)
        saved = getattr(torch, info["image_dtype"].removeprefix("torch."))
        dtype = own if saved.is_floating_point else saved
        stages = _cut_again(
            path, model, torch.zeros(1, *info["image_shape"], dtype=dtype, device=device), info["exits"]
        )
        if "centres.means" in tensors:
            plain, _ = without_centres(stages)
            centres = Centres(tensors["centres.means"], tensors["centres.spread"]).to(device)
            stages = with_centres(plain, centres)
        if weights_sha256(stages) != info["network"]:
            raise ValueError(
                f"{path} belongs to another network: the modules of this `model` have the same names, but not the "
                "same weights (or dtypes)"
            )
        heads = [from_config(config) for config in info["heads"]]
        for j, head in enumerate(heads):
            prefix = f"heads.{j}."
            state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            head.load_state_dict(state)
        costs = Costs(tuple(info["costs"]["stages"]), tuple(info["costs"]["heads"]), tuple(info["exits"]))
        loaded = cls.__new__(cls)
        nn.Module.__init__(loaded)
        loaded._assemble(stages, heads, decide, costs, tuple(info["image_shape"]), dtype)
        loaded.thresholds = tensors["thresholds"]
        if info.get("combination") is not None:
            loaded.combination = ensemble.from_config(info["combination"])
        loaded.labelled = info.get("labelled", True)
        return loaded

    def export(self, path: str | os.PathLike[str], format: Format = "onnx", *, progress: bool = True) -> dict[str, Any]:
        """The network with its exits as they are set now, in one file for another runtime; returns its manifest.

        format="onnx": for ONNX Runtime; `e2cm_ext.runner.OnnxCascade` runs it, a file that needs no torch.
        format="torch": programs of torch.export, and "aoti": the same, compiled by AOTInductor for this machine (that
        needs a C++ compiler and some time); `e2cm_ext.deploy.TorchCascade` runs both, without the network's own code.

        There is a program per stage, for any batch size, with the head of the exit behind it; samples that leave are
        not computed any further. Exits that are off are left out. Thresholds can be set anew in the runner.
        """
        return export(self, path, format, progress=progress)

    # ---- small parts ------------------------------------------------------------------------------------------------

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Of the M exits: the modules of the model that they stand behind."""
        return self.stages.names

    def _heads(self) -> list[Head]:
        return list(self.heads)  # type: ignore[arg-type]

    def _loader(
        self, batches: Iterable[Any], progress: bool, answers: Callable[[Tensor], Tensor] | None = None
    ) -> Loader:
        return Loader(batches, self.stages, self.num_classes, self._image_shape, progress, answers)

    def _walk(self, images: Tensor, visit: Visit, *, logits: bool) -> Tensor:
        x = images
        stages: Iterable[cascade.Stage] = self._compiled or self.stages
        *early, last = stages
        for j, stage in enumerate(early):
            x = stage(x)
            visit(j, x)
        return last(x) if logits else x

    def __repr__(self) -> str:
        fitted = [head.fitted for head in self._heads()]
        state = "fitted" if all(fitted) else "not fitted yet" if not any(fitted) else "fitted in part"
        lines = [
            f"EarlyExit({len(self.heads)} exits, {self.num_classes} classes, rule {self.rule.name!r}, {state})",
            f"  images {self._wanted()}; an exit fires above its threshold; FLOPs: of a sample that leaves there",
        ]
        rows = zip(
            self.exit_names, self._heads(), self.thresholds.tolist(), self.costs.fractions.tolist(), strict=False
        )
        width = max(map(len, self.exit_names))
        for name, head, threshold, fraction in rows:
            features = "x".join(map(str, head.feature_shape))
            lines.append(
                f"  {name:{width}}  {head.kind} of {features:12} threshold {threshold:<9.6g} FLOPs {fraction:.4f}"
            )
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network with early exits did on a data set."""

    accuracy: float
    flops: float  # mean per sample, heads that were on included, over the base network's
    exits: Tensor  # [M+1] int64: how many samples left at each exit; last: the network itself
    names: tuple[str, ...]  # of the M exits

    def __str__(self) -> str:
        count, most = int(self.exits.sum()), int(self.exits.max())
        lines = [f"accuracy {self.accuracy:.4f} at FLOPs {self.flops:.4f} on {count} samples, which left at"]
        width = max(len(name) for name in (*self.names, "(end)"))
        for name, leavers in zip((*self.names, "(end)"), self.exits.tolist(), strict=True):
            bar = "#" * math.ceil(30 * leavers / max(1, most))
            lines.append(f"  {name:{width}} {leavers:8d} {leavers / max(1, count):7.2%} {bar}".rstrip())
        return "\n".join(lines)


def weights_sha256(stages: Stages) -> str:
    """SHA-256 over names, dtypes, shapes and values of all the weights of a network, whatever their memory order."""
    found = [(name, j, value) for j, stage in enumerate(stages) for name, value in stage.state_dict().items()]
    digest = hashlib.sha256()
    for name, _, value in sorted(found, key=lambda item: item[:2]):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
            digest.update(serialization.bytes_of(value))
    return digest.hexdigest()


def _with_heads_on(costs: Costs, thresholds: Sequence[float]) -> Costs:
    """Heads at exits that are off are not computed."""
    heads = (head if limit < math.inf else 0 for head, limit in zip(costs.heads, thresholds, strict=True))
    return replace(costs, heads=tuple(heads))


@torch.no_grad()
def _shapes(stages: Stages, x: Tensor) -> tuple[list[tuple[int, ...]], int]:
    """Of the features at every exit, and the number of logits."""
    shapes = []
    for stage in stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    if x.dim() != 2:
        raise ValueError(f"the model answers with shape {list(x.shape)}; wanted logits [batch, classes]")
    return shapes[:-1], x.shape[1]


def _saved_rule(path: str | os.PathLike[str], name: str, given: Rule | None) -> Rule:
    if given is not None:
        if given.name != name:
            raise ValueError(f"`rule` is {given.name!r}; {path} was saved with the rule {name!r}")
        return given
    try:
        return rule_named(name)
    except ValueError:
        raise ValueError(f"{path} was saved with the rule {name!r}, which is not one of ours: give rule=...") from None


def _cut_again(path: str | os.PathLike[str], model: nn.Module, example: Tensor, exits: Sequence[str]) -> Stages:
    try:
        return cut(model, example, list(exits))
    except Exception as error:  # whatever a network says to images that are not for it
        why, _, _ = str(error).partition("\n")
        raise ValueError(f"{path} belongs to another network: this `model` cannot be cut as that was: {why}") from error
