"""Early exits for trained image classifiers: every sample leaves the network as soon as it is recognised."""

from . import calibration, clusters, data, deploy, fast_exit, heads, ops, runtime, stages
from .calibration import (
    Curve,
    GuaranteedPoint,
    OperatingPoint,
    Profile,
    Record,
    Selection,
    TimedPoint,
    curve,
    select,
)
from .calibration.evaluation import Evaluation
from .early_exit import EarlyExit
from .fast_exit import FastExit
from .heads import ClassMeans, Confidence, Entropy, Head, PooledMeans, Rule, WhitenedMeans
from .native import build_info
from .ops.types import Decisions, Statistics
from .stages import Costs, CutError, Stages, cut

__version__: str = build_info()["version"]
__all__ = [
    # wrap a network, or write an exit into it
    "EarlyExit",
    "Evaluation",
    "FastExit",
    "fast_exit",
    # what they are made of
    "CutError",
    "Stages",
    "cut",
    "Costs",
    "Statistics",
    "Head",
    "ClassMeans",
    "PooledMeans",
    "WhitenedMeans",
    "Rule",
    "Confidence",
    "Entropy",
    "Decisions",
    # thresholds
    "Record",
    "Curve",
    "OperatingPoint",
    "GuaranteedPoint",
    "Profile",
    "TimedPoint",
    "curve",
    # exits
    "Selection",
    "select",
    # packages
    "calibration",
    "clusters",
    "data",
    "deploy",
    "heads",
    "ops",
    "runtime",
    "stages",
    # this build
    "__version__",
    "build_info",
]
