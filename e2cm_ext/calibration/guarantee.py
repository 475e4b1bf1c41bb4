"""Thresholds with a guarantee: with probability 1 - delta over the choice of the samples, the risk is at most epsilon.

The risk of thresholds is the mean of a loss over all the samples there could be, not only those of the record:
of="accuracy", the base network is right and the exits are wrong (1), or the other way round (-1): the drop in accuracy;
of="agreement", the exits answer otherwise than the base network does (1), right or wrong: no label matters.

That is learn-then-test (Angelopoulos, Bates, Candes, Jordan, Lei, 2021) with fixed-sequence testing:

- The record is split into two halves by `seed`. The search goes over the first; the front of its curve, from the most
  accurate point to the cheapest, is an order of candidates from safe to daring, which owes nothing to the second half.
- On the second half one candidate after the other is tested for "the risk is epsilon or more", each at the level delta,
  until the first that is not refuted. The last one before it is taken. For this to go wrong, the first candidate in
  the order that is too risky must have been let through, and a single test does that with probability delta at most:
  so the number of candidates costs nothing. It would if the best were chosen by the half that tests.
- All exits off lose nothing and need no test: that is the answer if the first candidate fails.

The guarantee holds for samples drawn independently from one population, and for one call: whoever tries seeds,
epsilons or networks until something passes has chosen by the test. The heads must not have been fitted on the samples.

The p-values are exact for any number of samples, with no approximation by a normal distribution. For agreement it is
the binomial tail. For accuracy, b samples of n are lost and c gained; what counts is b - c, and the nuisance is how
many samples are either (Berger and Boos, 1994): p = error + P(b' - c' <= b - c), where P(lost) + P(gained) is the upper
confidence limit for it at a tenth of delta, `error`, and P(lost) - P(gained) = epsilon. Why that is valid: unless the
limit is too low, which is paid for by `error`, the truth lies within it, and the tail grows (1) as P(lost) - P(gained)
shrinks at the same sum and (2) with the sum s. For (2): its derivative is n/2 [P(d = t + 1) - P(d = t)], where d is
b - c of n - 1 samples and t that of n. Up to s = (1 + epsilon^2) / 2 loss + 1 is a sum of two independent coins, so
d + n - 1 is a sum of coins and rises up to its mode, which is within 1 of its mean (Darroch, 1964): the derivative is
not negative while t + 1 <= (n - 1) epsilon. Elsewhere p = 1, as nothing there looks like a risk below epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor

from ..ops import validation
from ..utils.warn import warn
from . import binomial, curves
from .curves import Method, OperatingPoint
from .record import Record

__all__ = ["GuaranteedPoint", "Of", "guaranteed", "p_value"]

Of = Literal["accuracy", "agreement"]

_MOST_SAMPLES = 1 << 24  # that anybody is told to bring


@dataclass(frozen=True, eq=False, kw_only=True)
class GuaranteedPoint(OperatingPoint):
    """Thresholds whose risk is at most epsilon with probability 1 - delta.

    FLOPs and accuracy are those on the half of the record that the thresholds were tested on.
    """

    epsilon: float
    delta: float
    of: Of
    risk: float  # on the samples of the test
    p_value: float  # of "the risk is epsilon or more"; 0 with all exits off, which needs no test
    samples: int  # of the test
    tested: int  # candidates, from safe to daring, up to and with the first that failed
    accepted: int  # of these; 0: all exits are off

    def __str__(self) -> str:
        what = "accuracy lost" if self.of == "accuracy" else "disagreement with the base network"
        return (
            f"{super().__str__()}; {what} at most {self.epsilon:g} with probability {1 - self.delta:g} "
            f"({self.risk:.4f} on {self.samples} samples, candidate {self.accepted} of {self.tested} tested)"
        )


def guaranteed(
    record: Record,
    epsilon: float,
    delta: float,
    *,
    of: Of = "accuracy",
    method: Method = "auto",
    seed: int = 0,
    progress: bool = False,
) -> GuaranteedPoint:
    """The most daring thresholds that pass: see the top of this file. If none do: all exits off, with a warning."""
    check_risk(epsilon, delta, of)
    if len(record) < 2:
        raise ValueError(f"`record` holds {len(record)} samples; wanted some thousand: half of them search, half test")
    order = torch.randperm(len(record), generator=torch.Generator().manual_seed(seed), device="cpu")
    first, second = (record.part(half) for half in order.tensor_split(2))
    candidates = _from_safe_to_daring(first, of, method, progress)

    def p_of(thresholds: Tensor) -> float:
        return p_value(*lost_and_gained(second, thresholds, of), len(second), epsilon, delta, of)

    passed = passing(map(p_of, candidates), delta)
    accepted, p = len(passed), passed[-1] if passed else 0.0
    if accepted:
        chosen = candidates[accepted - 1].clone()
    else:
        chosen = torch.full((record.exits,), math.inf, dtype=torch.float32, device="cpu")
        _warn(second, candidates[:1], epsilon, delta, of)
    lost, gained = lost_and_gained(second, chosen, of)
    replay = second.replay(chosen)
    return GuaranteedPoint(
        replay.flops,
        replay.accuracy,
        chosen,
        epsilon=epsilon,
        delta=delta,
        of=of,
        risk=(lost - gained) / len(second),
        p_value=p,
        samples=len(second),
        tested=min(accepted + 1, len(candidates)),
        accepted=accepted,
    )


def check_risk(epsilon: float, delta: float, of: str) -> None:
    for name, value, example in (("epsilon", epsilon, 0.01), ("delta", delta, 0.05)):
        if not validation.is_number(value):
            raise TypeError(f"`{name}` of `risk` is {value!r}; wanted a number, such as {example}")
        if not 0 < value < 1:
            raise ValueError(f"`{name}` of `risk` is {value}; wanted a number between 0 and 1, such as {example}")
    if of not in ("accuracy", "agreement"):
        raise ValueError(f"`of` is {of!r}; wanted 'accuracy' or 'agreement'")


def passing(p_values: Iterable[float], delta: float) -> list[float]:
    """Those before the first that does not refute the risk."""
    return list(takewhile(lambda p: p <= delta, p_values))


def lost_and_gained(record: Record, thresholds: Tensor, of: Of) -> tuple[int, int]:
    """How many samples of the record the exits lose, and how many they win."""
    replay = record.replay(thresholds)
    if of == "agreement":
        return int((replay.prediction != record.prediction[:, -1]).sum()), 0
    base = record.correct[:, -1]
    return int((base & ~replay.correct).sum()), int((~base & replay.correct).sum())


def _from_safe_to_daring(record: Record, of: Of, method: Method, progress: bool) -> Tensor:
    """[P, M]: the thresholds on the front of the record's curve, without all exits off, which needs no test."""
    if of == "agreement":
        record = replace(record, label=record.prediction[:, -1].long())
    thresholds = curves.curve(record, method=method, progress=progress).front.thresholds.flip(0)
    return thresholds[~thresholds.isposinf().all(1)]


def _warn(record: Record, safest: Tensor, epsilon: float, delta: float, of: Of) -> None:
    """Why no candidate has passed, and what would help."""
    lost, gained = lost_and_gained(record, safest[0], of) if len(safest) else (0, 0)
    needed = samples_needed(lost / len(record), gained / len(record), epsilon, delta, of)
    if needed is None:
        help = "better heads, later exits or a larger epsilon would help, more samples would not"
    else:
        help = f"with losses like these, about {needed} would be needed, {2 * needed} in the whole record"
    warn(
        f"all exits are off: of {len(record)} samples the safest thresholds lost {lost} and gained {gained}, which "
        f"does not show a risk below {epsilon:g} with probability {1 - delta:g}; {help}",
    )


# ---- p-values -------------------------------------------------------------------------------------------------------


def p_value(lost: int, gained: int, samples: int, epsilon: float, delta: float, of: Of) -> float:
    """Of "the risk is epsilon or more", for tests at the level delta.

    If that is true, this number is at most delta with a probability of at most delta.
    """
    if of == "agreement":
        return float(binomial.probabilities(samples, epsilon, lost).sum())
    error = delta / 10
    if lost - gained + 1 > (samples - 1) * epsilon:
        return 1.0
    limit = binomial.upper_limit(lost + gained, samples, error)
    if limit < epsilon:  # then so is the risk
        return error
    if limit > (1 + epsilon**2) / 2:
        return 1.0
    return min(1.0, error + tail(lost - gained, samples, epsilon, limit))


def tail(difference: int, samples: int, epsilon: float, either: float) -> float:
    """P(lost - gained <= difference) among so many, if P(lost) + P(gained) = either and P(lost) - P(gained) = epsilon.

    As either <= (1 + epsilon^2) / 2, that is the difference of two independent binomial numbers: with probabilities
    v (1 - u) of a loss and u (1 - v) of a gain, where v - u = epsilon and u + v - 2uv = either.
    """
    u = (1 - epsilon - math.sqrt(max(0.0, 1 + epsilon**2 - 2 * either))) / 2
    gains, losses = binomial.probabilities(samples, [max(0.0, u), u + epsilon])
    most = torch.arange(samples + 1, device="cpu") + difference  # that may be lost, by what is gained
    at_most = torch.where(most < 0, 0.0, losses.cumsum(0)[most.clamp(0, samples)])
    return float(gains @ at_most)


def samples_needed(lost: float, gained: float, epsilon: float, delta: float, of: Of) -> int | None:
    """How many samples, lost and gained at these rates, make the test pass; None if no number would do."""

    def enough(samples: int) -> bool:
        counts = math.ceil(lost * samples), math.floor(gained * samples)
        return p_value(*counts, samples, epsilon, delta, of) <= delta

    if lost - gained >= epsilon or (of == "accuracy" and lost + gained > (1 + epsilon**2) / 2):
        return None
    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST_SAMPLES:
            return None
    low = high // 2
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
