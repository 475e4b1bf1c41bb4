"""From what every exit says about calibration samples to thresholds."""

from .curves import Curve, OperatingPoint, curve
from .evaluation import Evaluation
from .guarantee import GuaranteedPoint
from .latency import TimedPoint
from .profile import Profile
from .record import Record, Reliability, Replay
from .selection import Selection, select

__all__ = [
    "Curve",
    "Evaluation",
    "GuaranteedPoint",
    "OperatingPoint",
    "Profile",
    "Record",
    "Reliability",
    "Replay",
    "Selection",
    "TimedPoint",
    "curve",
    "select",
]
