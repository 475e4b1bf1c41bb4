"""Thresholds with a guarantee: with probability 1 - delta over the choice of the samples, the risk is at most epsilon.

The risk of thresholds is the mean of a loss over the whole population, not only over the samples of the record:
of="accuracy": the loss is 1 where the base network is right and the exits are wrong, -1 the other way round: the drop
in accuracy. of="agreement": it is 1 where the exits predict another class than the base network, right or wrong: no
label matters.

The method is learn-then-test (Angelopoulos, Bates, Candes, Jordan, Lei, 2021) with fixed-sequence testing:

- The record is split into two halves by `seed`. The threshold search runs on the first; the front of its curve, from
  the most accurate point to the cheapest, is an order of candidates from conservative to aggressive. It does not depend
  on the second half.
- On the second half one candidate after the other is tested for the null hypothesis "the risk is epsilon or more", each
  at the level delta, until the first that is not rejected. The last one before it is taken. This goes wrong only if the
  first candidate in the order that is too risky passes, and a single test lets it pass with probability delta at most:
  so there is no correction for the number of candidates. There would be one if the test half chose the best.
- All exits off lose nothing and need no test: they are the result if the first candidate fails.

The guarantee holds for samples drawn independently from one population, and for one call: trying seeds, epsilons or
networks until something passes is a choice made by the test. The heads must not have been fitted on the samples.

The p-values are exact for any number of samples, with no normal approximation. For agreement it is the binomial tail.
For accuracy, b of n samples are lost and c gained. The test statistic is b - c, and the nuisance parameter is the rate
of discordant samples, lost or gained (Berger and Boos, 1994): p = error + P(b' - c' <= b - c), where P(lost) +
P(gained) is its upper confidence limit at a tenth of delta, `error`, and P(lost) - P(gained) = epsilon. Why that is
valid: unless the limit is too low, which `error` pays for, the true rate is below it, and the tail grows (1) as P(lost)
- P(gained) shrinks at the same sum and (2) with the sum s. For (2): its derivative is n/2 [P(d = t + 1) - P(d = t)],
where d is b - c of n - 1 samples and t that of n. Up to s = (1 + epsilon^2) / 2, loss + 1 is a sum of two independent
Bernoulli variables, so d + n - 1 is a sum of Bernoulli variables and rises up to its mode, which is within 1 of its
mean (Darroch, 1964): the derivative is not negative while t + 1 <= (n - 1) epsilon. Elsewhere p = 1, as nothing there
looks like a risk below epsilon.
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

__all__ = ["GuaranteedPoint", "RiskKind", "check_risk", "guaranteed", "p_value"]

RiskKind = Literal["accuracy", "agreement"]

_MAX_SAMPLES = 1 << 24  # that a warning asks for


@dataclass(frozen=True, eq=False, kw_only=True)
class GuaranteedPoint(OperatingPoint):
    """Thresholds whose risk is at most epsilon with probability 1 - delta.

    `flops` and `accuracy` are those on the half of the record that the thresholds were tested on.

    Attributes:
        epsilon: The bound on the risk.
        delta: The probability that it does not hold.
        of: "accuracy": the risk is the drop in accuracy; "agreement": the share of samples whose prediction is not the
            base network's.
        risk: The risk on the samples of the test.
        p_value: Of "the risk is epsilon or more"; 0 with all exits off, which needs no test.
        samples: Number of samples of the test.
        tested: Number of candidates tested, from conservative to aggressive, with the first that failed.
        accepted: How many of these passed; 0: all exits are off.

    Example:
        >>> point = ee.calibrate(held_out, risk=(0.01, 0.05))   # accuracy drops by 0.01 at most, with 95% confidence
        >>> point.accepted > 0                                  # were there thresholds that could be shown to do that?
        >>> print(point)
    """

    epsilon: float
    delta: float
    of: RiskKind
    risk: float
    p_value: float
    samples: int
    tested: int
    accepted: int

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
    of: RiskKind = "accuracy",
    method: Method = "auto",
    seed: int = 0,
    progress: bool = False,
) -> GuaranteedPoint:
    """Find the cheapest thresholds that can be shown to have a risk of at most epsilon.

    The top of `calibration/guarantee.py` describes the test.

    Args:
        record: Samples that the heads were not fitted on: one half finds candidates, the other tests them.
        epsilon: The bound on the risk.
        delta: The probability that it may not hold.
        of: The risk: "accuracy" or "agreement".
        method: Of the threshold search, see `curve`.
        seed: Of the split.
        progress: Show a progress bar.

    Returns:
        The thresholds, and what the test found. If no candidate passes, all exits are off, and a warning says why.

    Raises:
        ValueError: An argument is out of range, or there are fewer than 2 samples.
    """
    check_risk(epsilon, delta, of)
    if len(record) < 2:
        raise ValueError(f"`record` holds {len(record)} samples; wanted some thousand: half of them search, half test")
    order = torch.randperm(len(record), generator=torch.Generator().manual_seed(seed), device="cpu")
    search_half, test_half = (record.part(half) for half in order.tensor_split(2))
    candidates = _ordered_candidates(search_half, of, method, progress)

    def p_of(thresholds: Tensor) -> float:
        return p_value(*lost_and_gained(test_half, thresholds, of), len(test_half), epsilon, delta, of)

    passed = fixed_sequence_test(map(p_of, candidates), delta)
    accepted, p = len(passed), passed[-1] if passed else 0.0
    if accepted:
        chosen = candidates[accepted - 1].clone()
    else:
        chosen = torch.full((record.exits,), math.inf, dtype=torch.float32, device="cpu")
        _warn_all_off(test_half, candidates[:1], epsilon, delta, of)
    lost, gained = lost_and_gained(test_half, chosen, of)
    replay = test_half.replay(chosen)
    return GuaranteedPoint(
        replay.flops,
        replay.accuracy,
        chosen,
        epsilon=epsilon,
        delta=delta,
        of=of,
        risk=(lost - gained) / len(test_half),
        p_value=p,
        samples=len(test_half),
        tested=min(accepted + 1, len(candidates)),
        accepted=accepted,
    )


def check_risk(epsilon: float, delta: float, of: str) -> None:
    """Refuse what no guarantee can be given for."""
    for name, value, example in (("epsilon", epsilon, 0.01), ("delta", delta, 0.05)):
        if not validation.is_number(value):
            raise TypeError(f"`{name}` of `risk` is {value!r}; wanted a number, such as {example}")
        if not 0 < value < 1:
            raise ValueError(f"`{name}` of `risk` is {value}; wanted a number between 0 and 1, such as {example}")
    if of not in ("accuracy", "agreement"):
        raise ValueError(f"`of` is {of!r}; wanted 'accuracy' or 'agreement'")


def fixed_sequence_test(p_values: Iterable[float], delta: float) -> list[float]:
    """The p-values of the candidates that pass: those before the first above delta."""
    return list(takewhile(lambda p: p <= delta, p_values))


def lost_and_gained(record: Record, thresholds: Tensor, of: RiskKind) -> tuple[int, int]:
    """How many samples of the record have a loss of 1, and of -1, under these thresholds."""
    replay = record.replay(thresholds)
    if of == "agreement":
        return int((replay.prediction != record.prediction[:, -1]).sum()), 0
    base = record.correct[:, -1]
    return int((base & ~replay.correct).sum()), int((~base & replay.correct).sum())


def _ordered_candidates(record: Record, of: RiskKind, method: Method, progress: bool) -> Tensor:
    """[P, M], from conservative to aggressive: the front of the record's curve, without all exits off."""
    if of == "agreement":
        record = replace(record, label=record.prediction[:, -1].long())
    thresholds = curves.curve(record, method=method, progress=progress).front.thresholds.flip(0)
    return thresholds[~thresholds.isposinf().all(1)]


def _warn_all_off(record: Record, first: Tensor, epsilon: float, delta: float, of: RiskKind) -> None:
    """Say why no candidate has passed, and what would help. first: the most conservative candidate [0 or 1, M]."""
    lost, gained = lost_and_gained(record, first[0], of) if len(first) else (0, 0)
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


def p_value(lost: int, gained: int, samples: int, epsilon: float, delta: float, of: RiskKind) -> float:
    """The p-value of the null hypothesis "the risk is epsilon or more", for tests at the level delta.

    If the hypothesis is true, the p-value is at most delta with a probability of at most delta.

    Args:
        lost: Number of samples with a loss of 1.
        gained: Number of samples with a loss of -1.
        samples: Number of samples.
        epsilon: The bound on the risk.
        delta: Level of the test.
        of: The risk: "accuracy" or "agreement".
    """
    if of == "agreement":
        return float(binomial.pmf(samples, epsilon, lost).sum())
    error = delta / 10
    if lost - gained + 1 > (samples - 1) * epsilon:
        return 1.0
    limit = binomial.upper_limit(lost + gained, samples, error)
    if limit < epsilon:  # then so is the risk
        return error
    if limit > (1 + epsilon**2) / 2:
        return 1.0
    return min(1.0, error + difference_cdf(lost - gained, samples, epsilon, limit))


def difference_cdf(difference: int, samples: int, epsilon: float, discordant: float) -> float:
    """P(lost - gained <= difference) among so many samples.

    As discordant <= (1 + epsilon^2) / 2, lost - gained is the difference of two independent binomial numbers: with
    probabilities v (1 - u) of a loss and u (1 - v) of a gain, where v - u = epsilon and u + v - 2uv = discordant.

    Args:
        difference: Lost minus gained samples.
        samples: Number of samples.
        epsilon: P(lost) - P(gained) of one sample.
        discordant: P(lost) + P(gained) of one sample.
    """
    u = (1 - epsilon - math.sqrt(max(0.0, 1 + epsilon**2 - 2 * discordant))) / 2
    gains, losses = binomial.pmf(samples, [max(0.0, u), u + epsilon])
    most = torch.arange(samples + 1, device="cpu") + difference  # that may be lost, by what is gained
    at_most = torch.where(most < 0, 0.0, losses.cumsum(0)[most.clamp(0, samples)])
    return float(gains @ at_most)


def samples_needed(lost: float, gained: float, epsilon: float, delta: float, of: RiskKind) -> int | None:
    """How many samples, lost and gained at these rates, make the test pass; None if no number would do."""

    def enough(samples: int) -> bool:
        counts = math.ceil(lost * samples), math.floor(gained * samples)
        return p_value(*counts, samples, epsilon, delta, of) <= delta

    if lost - gained >= epsilon or (of == "accuracy" and lost + gained > (1 + epsilon**2) / 2):
        return None
    high = 1
    while not enough(high):
        high *= 2
        if high > _MAX_SAMPLES:
            return None
    low = high // 2
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
