"""Early exits for trained image classifiers: every sample leaves the network as soon as it is recognised."""

import torch  # before _native, so that both share one OpenMP runtime

try:
    from ._native import build_info
except ModuleNotFoundError as error:
    raise ImportError(
        "e2cm_ext has no compiled module here: `pip install .` makes one (`pip install -e .`, to work on the package); "
        "a checkout that is not installed cannot be imported"
    ) from error
from . import (
    calibration,
    cascade,
    clusters,
    cost,
    data,
    deploy,
    fast_exit,
    guarantee,
    heads,
    ops,
    profile,
    reference,
    rules,
    selection,
    stages,
    stream,
)
from .calibration import Curve, OperatingPoint, curve
from .cost import Costs
from .decisions import Decisions
from .early_exit import EarlyExit, Evaluation
from .fast_exit import FastExit
from .guarantee import GuaranteedPoint
from .heads import ClassMeans, Head, PooledMeans
from .profile import Profile, TimedPoint
from .record import Record
from .rules import Confidence, Entropy, Rule
from .selection import Selection, select
from .stages import CutError, Stages, cut
from .statistics import Statistics
from .whitened import WhitenedMeans

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
    # the rooms
    "calibration",
    "cascade",
    "clusters",
    "cost",
    "data",
    "deploy",
    "guarantee",
    "heads",
    "ops",
    "profile",
    "reference",
    "rules",
    "selection",
    "stages",
    "stream",
    # this build
    "__version__",
    "build_info",
]

del torch
