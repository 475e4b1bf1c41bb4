"""Images and labels from datasets, folders and arrays, in batches that a network can take."""

from .arrays import Arrays
from .batches import Batches, split
from .preprocessing import transform_of
from .sources import load
from .validation import NoBatch, checked, class_numbers

__all__ = ["Arrays", "Batches", "NoBatch", "checked", "class_numbers", "load", "split", "transform_of"]
