"""A record: what every exit says about every sample of a data set.

One pass over the data makes it. Any thresholds can then be evaluated without the network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..heads.thresholds import threshold_vector
from ..stages.flops import Costs
from ..utils import serialization
from . import plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Record", "Reliability", "Replay"]

_ROUNDING = 1e-5  # of the exponential of a log-probability


class Replay(NamedTuple):
    """What the samples of a record do under some thresholds; row i belongs to sample i.

    Attributes:
        prediction: [N] int64.
        confidence: [N] float32: the certainty at the exit where the sample leaves.
        exit: [N] int64: the number of that exit; M is the network itself.
        correct: [N] bool.
        flops: Mean FLOPs per sample, as a fraction of the base network's; NaN without samples.
        accuracy: Share of right predictions; NaN without samples.
    """

    prediction: Tensor
    confidence: Tensor
    exit: Tensor
    correct: Tensor
    flops: float
    accuracy: float


class Reliability(NamedTuple):
    """Accuracy of answers by their confidence, in bins of equal width.

    Bin b holds confidences above b / bins, up to and including (b + 1) / bins; a confidence of 0 is in the first bin.

    Attributes:
        counts: [bins] int64: number of answers.
        confidence: [bins] float64: mean confidence; NaN in an empty bin.
        accuracy: [bins] float64: share of right answers; NaN in an empty bin.
        ece: Expected calibration error: the mean over the answers of |accuracy - confidence| of their bin.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor
    ece: float


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """Certainty, prediction and label of N samples at M exits; the last column is the network itself.

    The tensors are kept on the CPU, dense.

    Attributes:
        confidence: [N, M+1] float32: the certainty that the rule compares with a threshold; NaN: the sample never
            leaves there.
        prediction: [N, M+1] int32 or int64.
        label: [N] int64.
        costs: FLOPs of stages and heads.
        rule: Name of the rule.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A tensor has another shape, or `label` holds negative numbers.

    Example:
        >>> record = ee.record(held_out)                # or made by hand, from tensors
        >>> record.accuracy                             # [M+1]: if all samples left at that exit
        >>> record.replay([0.9] * record.exits).flops   # what these thresholds would cost
        >>> record.save("held_out.record")
    """

    confidence: Tensor
    prediction: Tensor
    label: Tensor
    costs: Costs
    rule: str = "confidence"

    def __post_init__(self) -> None:
        if not isinstance(self.costs, Costs):
            raise TypeError(f"`costs` is a {type(self.costs).__name__}; wanted Costs")
        if not isinstance(self.rule, str):
            raise TypeError(f"`rule` is a {type(self.rule).__name__}; wanted the name of a rule")
        columns = len(self.costs.stages)
        what = f"[samples, {columns}]: {columns - 1} exits and the network itself"
        confidence = _checked_tensor("confidence", self.confidence, (torch.float32,), what)
        if confidence.dim() != 2 or confidence.shape[1] != columns:
            raise ValueError(f"`confidence` has shape {list(confidence.shape)}; wanted {what}")
        prediction = _checked_tensor("prediction", self.prediction, (torch.int64, torch.int32), what)
        if prediction.shape != confidence.shape:
            raise ValueError(f"`prediction` has shape {list(prediction.shape)}; wanted {list(confidence.shape)}")
        label = _checked_tensor("label", self.label, (torch.int64, torch.int32), "[samples]").long()
        if label.shape != confidence.shape[:1]:
            raise ValueError(f"`label` has shape {list(label.shape)}; wanted [{len(confidence)}], one per sample")
        if (label < 0).any():
            first = int((label < 0).nonzero()[0])
            raise ValueError(f"`label` holds {int(label[first])} at sample {first}; wanted class numbers, from 0 on")
        for name, value in (("confidence", confidence), ("prediction", prediction), ("label", label)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.label)

    def __repr__(self) -> str:
        return f"Record({len(self)} samples, {self.exits} exits, rule {self.rule!r})"

    @property
    def exits(self) -> int:
        """M: the number of exits, without the network itself."""
        return len(self.costs.heads)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the exits."""
        return self.costs.names

    @property
    def flops(self) -> Tensor:
        """[M+1] float64: cost of a sample that leaves at exit j, all heads on; see Costs.fractions."""
        return self.costs.fractions

    @property
    def correct(self) -> Tensor:
        """[N, M+1] bool: whether the prediction is the label."""
        return self.prediction == self.label[:, None]

    @property
    def accuracy(self) -> Tensor:
        """[M+1] float64: accuracy if all samples left at exit j; the last: of the base network. NaN without samples."""
        return self.correct.double().mean(0)

    def replay(self, thresholds: Tensor | Sequence[float]) -> Replay:
        """Evaluate thresholds on the record.

        A sample leaves at the first exit where its certainty is above the threshold, strictly, compared in float32. It
        costs the stages up to there, and the heads of those exits whose threshold is below +inf.

        Args:
            thresholds: [M].

        Returns:
            What every sample does, and mean FLOPs and accuracy.
        """
        limits = threshold_vector(thresholds, self.exits)
        exit = torch.full_like(self.label, self.exits)
        for j in range(self.exits - 1, -1, -1):
            exit[self.confidence[:, j] > limits[j]] = j
        prediction = self.prediction.gather(1, exit[:, None])[:, 0].long()
        correct = prediction == self.label
        leavers, off = exit.bincount(minlength=self.exits + 1), limits.isposinf()
        return Replay(
            prediction=prediction,
            confidence=self.confidence.gather(1, exit[:, None])[:, 0],
            exit=exit,
            correct=correct,
            flops=_mean_flops(self.costs, leavers.tolist(), off.tolist()),
            accuracy=int(correct.sum()) / len(self) if len(self) else float("nan"),
        )

    def reliability(self, thresholds: Tensor | Sequence[float], bins: int = 15) -> Reliability:
        """Compare confidence with accuracy, for the answers given under some thresholds.

        Args:
            thresholds: [M].
            bins: Number of bins of confidence.

        Returns:
            Accuracy and mean confidence by bin. Answers whose confidence is NaN, as the network's own may be, are left
            out.

        Raises:
            ValueError: The rule is not "confidence": others do not record probabilities.
        """
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
            raise ValueError(f"`bins` is {bins!r}; wanted a whole number from 1 on, such as 15")
        if self.rule != "confidence":
            raise ValueError(
                f"the record holds what the rule {self.rule!r} compares, which is no probability of being right: "
                'reliability needs a record of the rule "confidence"'
            )
        replay = self.replay(thresholds)
        known = ~replay.confidence.isnan()
        confidence, correct = replay.confidence[known].double(), replay.correct[known].double()
        if len(confidence) and not (confidence.min() >= 0 and confidence.max() <= 1 + _ROUNDING):
            raise ValueError(
                f"`confidence` goes from {float(confidence.min()):.6g} to {float(confidence.max()):.6g} in this "
                "record; reliability needs probabilities, from 0 to 1"
            )
        bounds = torch.arange(1, bins, dtype=torch.float64) / bins
        which = torch.bucketize(confidence, bounds)
        counts = which.bincount(minlength=bins)
        sums = (torch.zeros(bins, dtype=torch.float64).index_add(0, which, each) for each in (confidence, correct))
        mean_confidence, accuracy = (each / counts for each in sums)
        gaps = (counts * (accuracy - mean_confidence).abs()).nansum()
        ece = float(gaps / len(confidence)) if len(confidence) else float("nan")
        return Reliability(counts, mean_confidence, accuracy, ece)

    def plot(self, thresholds: Tensor | Sequence[float] | None = None) -> Figure:
        """Draw four panels with matplotlib.

        They show how accurate each exit is; how many samples leave at each exit; how far confidences can be believed;
        and how certain each exit is of its right and of its wrong answers.

        Args:
            thresholds: [M]; None: all exits are off.

        Returns:
            A figure that pyplot does not know: figure.savefig(path), or the last line of a notebook's cell, shows it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plotting.plot_record(self, [float("inf")] * self.exits if thresholds is None else thresholds)

    def at_exits(self, exits: Iterable[str | int]) -> Record:
        """Return the record of the same network with these exits only.

        Args:
            exits: Names or numbers of exits.
        """
        numbers = self.costs.numbers(exits)
        columns = [*numbers, self.exits]
        return Record(
            self.confidence[:, columns],
            self.prediction[:, columns],
            self.label,
            self.costs.at_exits(numbers),
            self.rule,
        )

    def part(self, samples: Tensor | slice | Sequence[int]) -> Record:
        """Return the record of some of the samples.

        Args:
            samples: Numbers, a mask or a slice; numbers give the order.
        """
        if not isinstance(samples, slice):
            samples = torch.as_tensor(samples)
            samples = (samples.long() if samples.numel() == 0 else samples).cpu()
            if samples.dim() != 1 or samples.is_floating_point():
                raise TypeError("`samples` is neither a list of numbers, nor a mask, nor a slice")
        rows = (self.confidence[samples], self.prediction[samples], self.label[samples])
        return Record(*rows, costs=self.costs, rule=self.rule)

    @classmethod
    def merge(cls, records: Iterable[Record]) -> Record:
        """Join the samples of several records of one network, in order.

        Raises:
            ValueError: There is no record, or they have other exits, costs or rules.
        """
        records = list(records)
        if not records:
            raise ValueError("`records` is empty; wanted at least one record")
        first = records[0]
        for i, record in enumerate(records):
            for field in ("rule", "costs"):
                if getattr(record, field) != getattr(first, field):
                    raise ValueError(
                        f"`records` are not of one network: record {i} has other {field} than record 0\n"
                        f"{getattr(record, field)}\n{getattr(first, field)}"
                    )
        return cls(
            torch.cat([record.confidence for record in records]),
            torch.cat([record.prediction.long() for record in records]),
            torch.cat([record.label for record in records]),
            first.costs,
            first.rule,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file. What was at `path` stays as it is until the new file is complete."""
        tensors = {"confidence": self.confidence, "prediction": self.prediction, "label": self.label}
        info = {"rule": self.rule, "stages": self.costs.stages, "heads": self.costs.heads, "names": self.costs.names}
        serialization.write(path, "record", tensors, info)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read a file that `save` has written.

        Raises:
            ValueError: The file is not a record, truncated, or altered.
        """
        tensors, info = serialization.read(path, "record")
        costs = Costs(tuple(info["stages"]), tuple(info["heads"]), tuple(info["names"]))
        return cls(tensors["confidence"], tensors["prediction"], tensors["label"], costs, info["rule"])


def _checked_tensor(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], wanted: str) -> Tensor:
    """On the CPU, dense, without gradient."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` is a {type(value).__name__}; wanted a tensor {wanted}")
    if value.dtype not in dtypes:
        raise TypeError(f"`{name}` is a {value.dtype} tensor; wanted {' or '.join(map(str, dtypes))}, {wanted}")
    return value.detach().cpu().contiguous()


def _mean_flops(costs: Costs, leavers: Sequence[int], off: Sequence[bool]) -> float:
    """As a fraction of the base network's.

    The operations are in the same order as in the native search, so that the last bit agrees.

    Args:
        costs: FLOPs of stages and heads.
        leavers: [M+1]: how many samples leave at each exit, and at the end.
        off: [M]: whether the threshold is +inf.
    """
    reach = total = sum(leavers)
    if total == 0:
        return float("nan")
    heads = [0 if is_off else head for head, is_off in zip(costs.heads, off, strict=True)]
    spent = base = 0.0
    for stage, head, leave in zip(costs.stages, [*heads, 0], leavers, strict=True):
        spent += reach / total * (float(stage) + float(head))
        base += float(stage)
        reach -= leave
    return spent / base
