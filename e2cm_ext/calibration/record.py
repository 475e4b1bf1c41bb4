"""A record: what every exit would have said about every sample of a data set. One pass over the data makes it, and any
thresholds can then be judged without the network."""

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
    """What would have happened under some thresholds; row i belongs to sample i."""

    prediction: Tensor  # [N] int64
    confidence: Tensor  # [N] float32: the certainty at the exit that answered
    exit: Tensor  # [N] int64: the number of the exit that answered; M is the network itself
    correct: Tensor  # [N] bool
    flops: float  # mean over the samples, of the base network's; NaN without samples
    accuracy: float  # NaN without samples


class Reliability(NamedTuple):
    """How far confidences can be believed: answers in bins of equal width, bin b from b / bins, excluded, to
    (b + 1) / bins, included; a confidence of 0 is in the first."""

    counts: Tensor  # [bins] int64
    confidence: Tensor  # [bins] float64: the mean; NaN in an empty bin
    accuracy: Tensor  # [bins] float64; NaN in an empty bin
    ece: float  # expected calibration error: the mean over the answers of |accuracy - confidence| of their bin


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """Certainty, prediction and truth for N samples at M exits, and in the last column of the network itself.

    The tensors are kept on the CPU, dense. A NaN among the certainties stands for an exit that this sample never takes.
    """

    confidence: Tensor  # [N, M+1] float32: what the rule compares with a threshold; the higher, the surer
    prediction: Tensor  # [N, M+1] int32 or int64
    label: Tensor  # [N] int64
    costs: Costs
    rule: str = "confidence"  # its name

    def __post_init__(self) -> None:
        if not isinstance(self.costs, Costs):
            raise TypeError(f"`costs` is a {type(self.costs).__name__}; wanted Costs")
        if not isinstance(self.rule, str):
            raise TypeError(f"`rule` is a {type(self.rule).__name__}; wanted the name of a rule")
        columns = len(self.costs.stages)
        what = f"[samples, {columns}]: {columns - 1} exits and the network itself"
        confidence = _plain("confidence", self.confidence, (torch.float32,), what)
        if confidence.dim() != 2 or confidence.shape[1] != columns:
            raise ValueError(f"`confidence` has shape {list(confidence.shape)}; wanted {what}")
        prediction = _plain("prediction", self.prediction, (torch.int64, torch.int32), what)
        if prediction.shape != confidence.shape:
            raise ValueError(f"`prediction` has shape {list(prediction.shape)}; wanted {list(confidence.shape)}")
        label = _plain("label", self.label, (torch.int64, torch.int32), "[samples]").long()
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
        """M, without the network itself."""
        return len(self.costs.heads)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the exits."""
        return self.costs.names

    @property
    def flops(self) -> Tensor:
        """[M+1] float64: what a sample costs that leaves at exit j, all heads on; see Costs.fractions."""
        return self.costs.fractions

    @property
    def correct(self) -> Tensor:
        """[N, M+1] bool."""
        return self.prediction == self.label[:, None]

    @property
    def accuracy(self) -> Tensor:
        """[M+1] float64: if all samples left at exit j; the last: of the base network. NaN without samples."""
        return self.correct.double().mean(0)

    def replay(self, thresholds: Tensor | Sequence[float]) -> Replay:
        """What would have happened under `thresholds` [M].

        A sample leaves at the first exit where its certainty is above the threshold, strictly, compared in float32. It
        pays the stages up to there, and the heads of those exits that are on: whose threshold is below +inf.
        """
        limits = threshold_vector(thresholds, self.exits)
        exit = torch.full_like(self.label, self.exits)
        for j in range(self.exits - 1, -1, -1):
            exit[self.confidence[:, j] > limits[j]] = j
        prediction = self.prediction.gather(1, exit[:, None])[:, 0].long()
        correct = prediction == self.label
        return Replay(
            prediction=prediction,
            confidence=self.confidence.gather(1, exit[:, None])[:, 0],
            exit=exit,
            correct=correct,
            flops=_mean_flops(self.costs, exit.bincount(minlength=self.exits + 1).tolist(), limits.isposinf().tolist()),
            accuracy=int(correct.sum()) / len(self) if len(self) else float("nan"),
        )

    def reliability(self, thresholds: Tensor | Sequence[float], bins: int = 15) -> Reliability:
        """Confidence against accuracy, of the answers given under `thresholds` [M].

        Only the rule "confidence" records probabilities: a ValueError for others. Answers whose confidence is NaN, as
        the network's own may be, are left out.
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
        limits = torch.arange(1, bins, dtype=torch.float64) / bins
        which = torch.bucketize(confidence, limits)
        counts = which.bincount(minlength=bins)
        sums = (torch.zeros(bins, dtype=torch.float64).index_add(0, which, each) for each in (confidence, correct))
        mean_confidence, accuracy = (each / counts for each in sums)
        gaps = (counts * (accuracy - mean_confidence).abs()).nansum()
        ece = float(gaps / len(confidence)) if len(confidence) else float("nan")
        return Reliability(counts, mean_confidence, accuracy, ece)

    def plot(self, thresholds: Tensor | Sequence[float] | None = None) -> Figure:
        """Four pictures with matplotlib: how accurate each exit is; who leaves where under `thresholds` [M] (without
        them nobody leaves early); how far confidences can be believed; how sure each exit is, when right and wrong.

        The figure belongs to nobody else: figure.savefig(path), or the last line of a notebook's cell, shows it.
        """
        return plotting.of_record(self, [float("inf")] * self.exits if thresholds is None else thresholds)

    def at_exits(self, exits: Iterable[str | int]) -> Record:
        """The record of the same network with these exits only, given by name or number: what the network would have
        said had it been cut there."""
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
        """The record of some of the samples: by number, mask or slice, in that order."""
        if not isinstance(samples, slice):
            samples = torch.as_tensor(samples)
            samples = (samples.long() if samples.numel() == 0 else samples).cpu()
            if samples.dim() != 1 or samples.is_floating_point():
                raise TypeError("`samples` is neither a list of numbers, nor a mask, nor a slice")
        rows = (self.confidence[samples], self.prediction[samples], self.label[samples])
        return Record(*rows, costs=self.costs, rule=self.rule)

    @classmethod
    def merge(cls, records: Iterable[Record]) -> Record:
        """One record of all their samples, in order: of several loaders, or of the processes that shared one."""
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
        """A safetensors file, complete or not there at all."""
        tensors = {"confidence": self.confidence, "prediction": self.prediction, "label": self.label}
        info = {"rule": self.rule, "stages": self.costs.stages, "heads": self.costs.heads, "names": self.costs.names}
        serialization.write(path, "record", tensors, info)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """A ValueError says what is wrong with a file that is no record, not whole, or altered."""
        tensors, info = serialization.read(path, "record")
        costs = Costs(tuple(info["stages"]), tuple(info["heads"]), tuple(info["names"]))
        return cls(tensors["confidence"], tensors["prediction"], tensors["label"], costs, info["rule"])


def _plain(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], wanted: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` is a {type(value).__name__}; wanted a tensor {wanted}")
    if value.dtype not in dtypes:
        raise TypeError(f"`{name}` is a {value.dtype} tensor; wanted {' or '.join(map(str, dtypes))}, {wanted}")
    return value.detach().cpu().contiguous()


def _mean_flops(costs: Costs, leavers: Sequence[int], off: Sequence[bool]) -> float:
    """Of the base network's. In the same order of operations as the native search, so that the last bit agrees."""
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
