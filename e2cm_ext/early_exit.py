"""EarlyExit: a trained image classifier in which samples leave as soon as they are recognised."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import checkpoint
from .calibration import (
    Curve,
    OperatingPoint,
    Profile,
    Record,
    Selection,
    TimedPoint,
    curves,
    evaluation,
    latency,
    profiler,
    recording,
    selection,
)
from .calibration.curves import Method
from .calibration.evaluation import Evaluation
from .calibration.guarantee import RiskKind
from .calibration.target import Target, refuse_foreign
from .clusters import clustered_stages, with_centres, without_centres
from .data.loader import device_and_dtype, dummy_labels, refuse_train_mode, to_network
from .data.overlap import FittedImages
from .deploy.exporter import ExportSpec, Format, export
from .heads import Head, Rule, build, fitting, from_config
from .heads.base import positive_int
from .heads.ensemble import Combination
from .heads.rules import as_rule
from .runtime.compaction_policy import CompactionPolicy
from .runtime.exit_module import ExitModule
from .stages import Costs, Stages, at_exits, cut, feature_shapes, stage_flops

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EarlyExit", "Evaluation"]


class EarlyExit(ExitModule):
    """A trained classifier with early exits: a sample leaves at the first exit that recognises it.

    The model is not modified; but the stages hold its modules, so .to(), .half() and training of one of the two do it
    to the other. An exit fires where the certainty of its head is above its threshold. `thresholds` is a buffer [M],
    +inf at the start: an exit with +inf never fires, and its head is not computed. With all thresholds at +inf, ee(x)
    is log_softmax(model(x)), bit for bit and with its gradient. A sample with a NaN in its features never leaves early.

    Inference changes no state: any number of threads may call one EarlyExit. state_dict(), deepcopy and pickle include
    the model; `save` does not.

    Args:
        model: Any traceable torch.nn.Module in eval mode that maps a batch of tensors to logits [B, K]; or Stages, cut
            by hand.
        example_input: A batch as the model takes it; only its shape and dtype matter.
        num_classes: Checked against the model's logits, if given.
        exits: "blocks", "all", a number of exits, module names or FLOPs fractions: see `e2cm_ext.stages.cut`.
        head: "whitened_means" (the default; not the paper's), "class_means" (the paper's), "pooled_means", "auto"
            (class means wherever all of them fit into `memory`, else pooled means), a Head class, or a function
            (num_classes, feature_shape) -> Head. See `e2cm_ext.heads.build`.
        rule: "confidence", "entropy", or a Rule.
        memory: Bytes that head="auto" may take.

    Raises:
        CutError: The model cannot be traced, or has no place for an exit.
        ValueError: An argument does not fit the model.

    Example:
        import torch
        from torch import nn
        import e2cm_ext as e2cm

        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
        ).eval()                                              # your trained model
        images = torch.randn(384, 1, 9, 9)
        labels = (images.mean((1, 2, 3)) > 0).long()
        loader = [(images[:128], labels[:128]), (images[128:256], labels[128:256])]   # or any DataLoader
        held_out = [(images[256:], labels[256:])]

        ee = e2cm.EarlyExit(model, images[:1])                # cut into stages, an exit behind each block
        ee.fit(loader)                                        # class statistics at each exit; forward passes only
        print(ee.calibrate(held_out, flops=0.9))              # sets ee.thresholds, from samples not fitted on
        print(ee.evaluate(loader))                            # accuracy, mean FLOPs, samples per exit
        log_probs = ee(images)                                # [B, K], wherever model(images) was used
        decisions = ee.predict(images)                        # .prediction .confidence .exit .log_probs
    """

    selection: Selection | None = None  # what `select` found, in the network that it returned; not saved

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
        decide = as_rule(rule)
        if isinstance(model, EarlyExit):
            raise TypeError(
                "`model` is an EarlyExit, which has its exits; wanted the network itself, or for fewer of these exits "
                "`select` or `at_exits`"
            )
        stages = cut(model, example_input, exits)
        if isinstance(head, str) and device_and_dtype(stages)[1] is torch.float64:
            raise TypeError("`model` is torch.float64; exits take float32, bfloat16 or float16: call model.float()")
        shapes, found = feature_shapes(stages, example_input[:1])
        if num_classes not in (None, found):
            raise ValueError(f"`num_classes` is {num_classes!r}; the model answers with {found} logits")
        heads = build(head, found, shapes, memory)
        costs = Costs(stage_flops(stages, example_input), tuple(head.flops() for head in heads), stages.names)
        super().__init__(stages, heads, decide, costs, tuple(example_input.shape[1:]), example_input.dtype)
        self._fitted_images: FittedImages | None = None  # those of the last fit; not saved

    @classmethod
    def from_parts(
        cls,
        stages: Stages,
        heads: Sequence[Head],
        rule: Rule,
        costs: Costs,
        image_shape: tuple[int, ...],
        image_dtype: torch.dtype,
        *,
        combination: Combination | None = None,
        labelled: bool = True,
    ) -> Self:
        """Put a network together from parts that exist already: see `e2cm_ext.runtime.exit_module.ExitModule`."""
        made = cls.__new__(cls)
        ExitModule.__init__(
            made, stages, heads, rule, costs, image_shape, image_dtype, combination=combination, labelled=labelled
        )
        made._fitted_images = None
        return made

    # ---- learning ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        loader: Iterable[Any],
        progress: bool = True,
        *,
        labels: Literal["loader"] | None = "loader",
        clusters: int | None = None,
    ) -> Self:
        """Fit the heads of all exits from scratch, with forward passes only.

        Heads need one pass over the data (class means: two). They hold statistics and one batch, nothing that grows
        with the data. All thresholds go back to +inf, since old ones mean nothing to new heads. After an error, or
        Ctrl-C, the network is as it was before.

        Args:
            loader: Yields (images, labels); with labels=None also images alone.
            progress: Show a progress bar.
            labels: None: the network's own predictions take the place of labels; here, and from then on in `record`,
                `curve`, `calibrate`, `select` and `evaluate`, whose accuracy then means agreement with the network.
            clusters: With labels=None: replace the network's answer by one of so many clusters, found by k-means on its
                outputs (its logits; or features, if the classifier was taken off by model.fc = nn.Identity()). All
                exits learn the same clusters. That takes a further pass and holds at most 20,000 rows of outputs.

        Returns:
            The network itself.
        """
        refuse_train_mode(self, "fit")
        if labels not in ("loader", None):
            raise ValueError(f"`labels` is {labels!r}; wanted 'loader', for those that it yields, or None")
        if labels is not None and clusters is not None:
            raise TypeError("`clusters` are found where there are no labels: give labels=None with it")
        if clusters is not None:
            positive_int("clusters", clusters)
        stages, heads = self._answering(loader, clusters, progress)
        own = None if labels is not None else lambda images: stages(images).argmax(1)
        ready = self.batches(loader, progress, own)._replace(num_classes=heads[0].num_classes)
        fitted, self._fitted_images = fitting.fit(heads, self.walk, ready)
        if stages is not self.stages:
            self._compiled = None  # of a network that answers otherwise: `compile` again
        self.stages, self.labelled, self.num_classes = stages, labels is not None, heads[0].num_classes
        self.costs = replace(self.costs, heads=tuple(head.flops() for head in fitted))
        self.thresholds = math.inf
        self.heads = nn.ModuleList(fitted).eval()
        return self

    @torch.no_grad()
    def _answering(self, loader: Iterable[Any], clusters: int | None, progress: bool) -> tuple[Stages, list[Head]]:
        """The stages, answering with so many clusters of the loader's images or as they came; and heads for that."""
        stages, before = without_centres(self.stages)
        if clusters is not None:
            stages = clustered_stages(stages, self.batches(loader, progress), clusters)
        if clusters is None and before is None:
            return stages, self.head_list()
        example = torch.zeros(1, *self.image_shape, dtype=self.image_dtype)
        _, count = feature_shapes(stages, to_network(example, stages))
        device = self.thresholds.device
        return stages, [from_config(h.config() | {"num_classes": count}).to(device) for h in self.head_list()]

    def record(self, loader: Iterable[Any], progress: bool = True) -> Record:
        """Record what every exit, and the network itself, says about every sample. Thresholds do not matter here.

        Args:
            loader: Yields (images, labels). A warning says so if the heads were fitted on the same images, unless the
                network has been loaded from a file since.
            progress: Show a progress bar.

        Returns:
            The Record, from which curves and thresholds are found without the network.
        """
        refuse_train_mode(self, "record")
        self.check_fitted()
        ready = self.batches(loader, progress, None if self.labelled else dummy_labels)
        found = recording.record(self, ready, self._fitted_images)
        return found if self.labelled else replace(found, label=found.prediction[:, -1].long())

    def curve(self, loader: Record | Iterable[Any], progress: bool = True, *, method: Method = "auto") -> Curve:
        """Find accuracy over FLOPs, by the threshold search that `calibrate` uses.

        Args:
            loader: Yields (images, labels); or a record of them.
            progress: Show a progress bar.
            method: "paper"; "coordinate" (not the paper's: more accurate for the same FLOPs, needs many samples); or
                "auto": "coordinate" from 30 samples per exit on, else "paper".

        Returns:
            The Curve. `curve.at(flops)` gives its operating points.
        """
        record = loader if isinstance(loader, Record) else self.record(loader, progress)
        refuse_foreign(record, self)
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
        of: RiskKind = "accuracy",
        batch_size: int = 128,
        profile: Profile | None = None,
        method: Method = "auto",
        progress: bool = True,
    ) -> OperatingPoint:
        """Set the thresholds for one target. Give exactly one of the first five.

        All targets but `risk` are met on the samples of the loader. Take samples that the heads were not fitted on.
        After Ctrl-C the network is as it was before.

        Args:
            loader: Yields (images, labels); or a record or curve of them.
            flops: The most accurate thresholds whose mean FLOPs are at most this fraction of the network's own.
            accuracy_drop: The cheapest thresholds whose accuracy is at most this much below the network's own.
            latency: The most accurate thresholds whose expected time per batch of `batch_size` is at most this fraction
                of the network's own, on this device.
            milliseconds: The same, with at most so many milliseconds per batch.
            risk: (epsilon, delta): the cheapest thresholds that are shown to lose no more than epsilon of accuracy on
                new samples, with probability 1 - delta. If none can be shown to, all exits are off, and a warning says
                so.
            of: "accuracy", or "agreement": `risk` bounds the share of samples whose prediction differs from the
                network's.
            batch_size: For `latency` and `milliseconds`.
            profile: Times to go by; None: measured on the loader's first images.
            method: Of the threshold search, see `curve`.
            progress: Show progress bars.

        Returns:
            The operating point that was set: a TimedPoint for times, a GuaranteedPoint for `risk`.
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
        point = target.point(self, loader, progress)
        if self.combination is None:
            self.thresholds = point.thresholds
        else:  # exits that never fire stay on: they take part in the combination
            self.thresholds = point.thresholds.clamp(max=torch.finfo(torch.float32).max)
        return point

    def profile(self, images: Tensor, batch_size: int = 128, *, repeats: int = 10, progress: bool = True) -> Profile:
        """Measure the time of every stage and every exit step here, at batch sizes 1, 2, 4, ... up to `batch_size`.

        From then on, inference decides by these times whether to move survivors together or to carry exited rows on.
        That changes no prediction.

        Args:
            images: A batch to run; a smaller one is repeated.
            batch_size: The largest size to measure.
            repeats: Rounds; the median counts.
            progress: Show a progress bar.
        """
        batch = to_network(images, self.stages)
        self.check_images(batch)
        self.check_fitted()
        found = profiler.measure(self, batch, batch_size=batch_size, repeats=repeats, progress=progress)
        self.compaction = CompactionPolicy.from_profile(found)
        return found

    def plan(self, record: Record, profile: Profile, batch_size: int = 128) -> TimedPoint:
        """Switch off the exits that cost more time than they save at this batch size.

        That changes predictions: samples that would have left at such an exit leave at a later one.

        Returns:
            The thresholds that were set, with accuracy and FLOPs on the record.
        """
        refuse_foreign(record, self)
        point = latency.drop_unprofitable_exits(record, profile, self.thresholds, batch_size)
        self.thresholds = point.thresholds
        return point

    def evaluate(self, loader: Iterable[Any], progress: bool = True) -> Evaluation:
        """Run the network with its exits: accuracy, mean FLOPs per sample, and how many samples left at each exit."""
        own = None if self.labelled else lambda images: self.stages(images).argmax(1)
        batches = self.batches(loader, progress, own).run("evaluate")
        return evaluation.evaluate(self.predict, batches, self.costs, self.thresholds)

    # ---- fewer exits ------------------------------------------------------------------------------------------------

    def select(
        self,
        loader: Record | Iterable[Any],
        count: int | None = None,
        progress: bool = True,
        *,
        flops: tuple[float, float] = (0.0, 1.0),
    ) -> Self:
        """Choose the exits worth keeping, and return a new network with only these. This one stays as it is.

        Args:
            loader: Yields (images, labels) that the heads were not fitted on; or a record of them.
            count: How many exits; None: as few as come within 0.001 of the best.
            progress: Show a progress bar.
            flops: The range of FLOPs budgets that matter.

        Returns:
            The new network. Its `selection` says what was found, and can be printed. Calibrate it.
        """
        if self.combination is not None:
            raise ValueError(
                f"the exits of this network answer together ({self.combination.name}), and what fewer of them would "
                "answer no record says: name the exits to at_exits() and calibrate what it returns"
            )
        record = loader if isinstance(loader, Record) else self.record(loader, progress)
        refuse_foreign(record, self)
        found = selection.select(record, count, flops=flops, progress=progress)
        chosen = self.at_exits(found.names)
        chosen.selection = found
        return chosen

    def at_exits(self, exits: Iterable[str | int]) -> Self:
        """Return a new network around the same model with only these exits, given by name or number.

        Its heads are copies, stages between its exits are joined, and its thresholds are +inf: calibrate it.
        """
        numbers = self.costs.numbers(exits)
        if not numbers:
            raise ValueError("`exits` is empty; wanted at least one exit: without any it is the model itself")
        plain, centres = without_centres(self.stages)
        heads = self.head_list()
        with torch.inference_mode(False):
            copies = [copy.deepcopy(heads[j]) for j in numbers]
        return self.from_parts(
            with_centres(at_exits(plain, numbers), centres),
            copies,
            self.rule,
            self.costs.at_exits(numbers),
            self.image_shape,
            self.image_dtype,
            combination=self.combination and self.combination.at_exits(numbers),
            labelled=self.labelled,
        )

    # ---- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write heads, thresholds and settings, without the model's weights, as a safetensors file.

        What was at `path` stays as it is until the new file is complete.
        """
        checkpoint.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, rule: Rule | None = None) -> Self:
        """Read what `save` wrote, around the model that it was made for, on that model's device.

        Args:
            path: The file.
            model: The model, in eval mode, or Stages of it.
            rule: Needed if it was a rule of your own. Heads of your own: import the module that defines them first.

        Raises:
            ValueError: The file is not ours, of another version, truncated or damaged; or the model is another one.
        """
        if not isinstance(model, nn.Module) or isinstance(model, EarlyExit):
            raise TypeError(f"`model` is a {type(model).__name__}; wanted the torch.nn.Module that {path} was made for")
        refuse_train_mode(model, "load")
        return checkpoint.load(path, model, rule, cls.from_parts)

    def export(self, path: str | os.PathLike[str], format: Format = "onnx", *, progress: bool = True) -> dict[str, Any]:
        """Write the network with its exits as they are set now, in one file for another runtime.

        The file holds a program per stage, for any batch size, with the head of the exit behind it. Exits that are off
        are left out. Thresholds can be set anew in the runner.

        Args:
            path: Where to write the package.
            format: "onnx": for ONNX Runtime; `e2cm_ext.runner.OnnxCascade` runs it, in a file that needs no torch.
                "torch": programs of torch.export; "aoti": the same, compiled by AOTInductor for this machine.
                `e2cm_ext.deploy.TorchCascade` runs both.
            progress: Show a progress bar.

        Returns:
            The manifest of the package.
        """
        refuse_train_mode(self, "export")
        if self.combination is not None:
            raise ValueError(
                f"the exits of this network answer together ({self.combination.name}), which packages cannot do: set "
                "ee.combination = None, if each may answer for itself"
            )
        thresholds: list[float] = self.thresholds.tolist()
        self.check_fitted(thresholds)
        spec = ExportSpec(
            self.stages, self.head_list(), self.rule, thresholds, self.num_classes, self.image_shape, self.image_dtype
        )
        return export(spec, path, format, progress=progress)
