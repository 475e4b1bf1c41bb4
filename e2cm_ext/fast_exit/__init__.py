"""FastExit: an early exit as a layer, for a network whose forward() you write yourself.

`fit`, `record`, `profile`, `calibrate` and `set_thresholds` do for all FastExit layers of a network what the methods of
EarlyExit do for the exits that it finds by itself.
"""

from .functions import calibrate, fit, profile, record, set_thresholds
from .layer import FastExit, State

__all__ = ["FastExit", "State", "calibrate", "fit", "profile", "record", "set_thresholds"]
