"""Images and labels from data sets, folders and arrays, in batches that a network can take."""

from .sources import Arrays, Batches, NoBatch, checked, class_numbers, load, split, transform_of

__all__ = ["Arrays", "Batches", "NoBatch", "checked", "class_numbers", "load", "split", "transform_of"]
