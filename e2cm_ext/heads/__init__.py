"""Heads, which predict classes at an exit, and rules, which decide what samples leave there."""

from ..utils.distributed import all_reduce_sum
from .base import Head
from .class_means import ClassMeans, PooledMeans
from .registry import build, from_config
from .rules import Confidence, Entropy, Rule
from .whitened_means import WhitenedMeans, statistics_of

__all__ = [
    "ClassMeans",
    "Confidence",
    "Entropy",
    "Head",
    "PooledMeans",
    "Rule",
    "WhitenedMeans",
    "all_reduce_sum",
    "build",
    "from_config",
    "statistics_of",
]
