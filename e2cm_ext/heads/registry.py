"""All heads, and what makes them: by name, by class, by what a file says of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..utils.warn import warn
from .base import HEAD_REGISTRY, Head
from .class_means import ClassMeans, PooledMeans, channel_axis
from .whitened_means import WhitenedMeans, statistics_of, suits

__all__ = ["ClassMeans", "Head", "PooledMeans", "WhitenedMeans", "build", "from_config", "statistics_of"]


@torch.inference_mode(False)  # buffers made in it could not be written to outside of it, as a fit does
def build(
    head: str | type[Head] | Callable[[int, tuple[int, ...]], Head],
    num_classes: int,
    shapes: Sequence[Sequence[int]],
    memory: int = 256 << 20,
) -> list[Head]:
    """One empty head for every exit, whose features have these shapes.

    head: a name, a Head class, or a function (num_classes, feature_shape) -> Head, such as
    functools.partial(PooledMeans, grid=2). Names are those of the classes, and
    - "whitened_means": WhitenedMeans, but class_means for features that these do not suit, which are those with 4 axes
      or more (videos) and vectors of more than 4096 numbers;
    - "auto": class_means wherever all the means together stay within `memory` bytes; where they do not, the largest
      give way to pooled_means, one after the other, until they do. (While fitting, a head holds three times the bytes
      of its means.)
    """
    sizes = [tuple(shape) for shape in shapes]
    if isinstance(head, str) and head == "auto":
        return _within(memory, num_classes, sizes)
    make: Callable[[int, tuple[int, ...]], Head]
    if isinstance(head, str) and head == WhitenedMeans.kind:
        make = _whitened
        _warn_of_channels(sizes)
    elif isinstance(head, str):
        make = _class_of(head, "`head` is", [*HEAD_REGISTRY, "auto"])
    elif callable(head) and not isinstance(head, nn.Module):
        make = head
    else:
        raise TypeError(f"`head` is a {type(head).__name__}; wanted a name, a Head class or a function that makes one")
    return [_checked(make(num_classes, shape), num_classes, shape) for shape in sizes]


def _whitened(num_classes: int, shape: tuple[int, ...]) -> Head:
    return (WhitenedMeans if suits(shape) else ClassMeans)(num_classes, shape)


def _warn_of_channels(shapes: list[tuple[int, ...]]) -> None:
    """Of maps that are square only if it is the last axis that holds the channels, as in Swin Transformers."""
    for shape in shapes:
        if len(shape) == 3 and shape[0] == shape[1] < shape[2]:
            warn(
                f"features of shape {list(shape)} are taken for {shape[0]} channels of maps {shape[1]} x {shape[2]}; "
                "if they are rows x columns x channels, whitened means need to be told so: head=lambda k, shape: "
                "WhitenedMeans(k, shape, statistics=statistics_of(shape, channels=-1)), both from e2cm_ext.heads"
            )
            return


def _within(memory: int, num_classes: int, shapes: list[tuple[int, ...]]) -> list[Head]:
    bytes_of = [4 * num_classes * math.prod(shape) for shape in shapes]
    averaged = [4 * num_classes * shape[channel_axis(len(shape), None)] if len(shape) < 4 else None for shape in shapes]
    heads: list[type[Head]] = [ClassMeans] * len(shapes)
    for i in sorted(range(len(shapes)), key=bytes_of.__getitem__, reverse=True):
        smaller = averaged[i]
        if sum(bytes_of) > memory and smaller is not None and smaller < bytes_of[i]:
            heads[i], bytes_of[i] = PooledMeans, smaller
    return [head(num_classes, shape) for head, shape in zip(heads, shapes, strict=True)]


def _checked(head: Head, num_classes: int, shape: tuple[int, ...]) -> Head:
    if not isinstance(head, Head):
        raise TypeError(f"`head` has made a {type(head).__name__}; wanted a Head")
    if (head.num_classes, head.feature_shape) != (num_classes, shape):
        raise ValueError(
            f"`head` has made a head for {head.num_classes} classes and features {list(head.feature_shape)}; "
            f"wanted {num_classes} and {list(shape)}"
        )
    return head


@torch.inference_mode(False)
def from_config(config: dict[str, Any]) -> Head:
    """An empty head like the one whose config() this is. The module that defines its class must have been imported."""
    if not isinstance(config, dict) or not isinstance(config.get("kind"), str):
        raise ValueError(f"`config` is {config!r}; wanted what Head.config() returns")
    arguments = {key: value for key, value in config.items() if key != "kind"}
    make = _class_of(config["kind"], "`config` is of kind", list(HEAD_REGISTRY))
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"`config` does not fit {make.__name__}: {error}") from None
    return make(**arguments)


def _class_of(kind: str, what: str, known: list[str]) -> type[Head]:
    if kind not in HEAD_REGISTRY:
        raise ValueError(
            f"{what} {kind!r}; known are {', '.join(map(repr, known))}: a Head of your own is known by the name of its "
            "class once the module that defines it has been imported"
        )
    return HEAD_REGISTRY[kind]
