"""Construction of heads: by name, by class, by a function, and from what a file says."""

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
from .whitened_means import WhitenedMeans, supports

__all__ = ["build", "from_config"]


@torch.inference_mode(False)  # buffers made in inference mode could not be written to outside of it, as a fit does
def build(
    head: str | type[Head] | Callable[[int, tuple[int, ...]], Head],
    num_classes: int,
    shapes: Sequence[Sequence[int]],
    memory: int = 256 << 20,
) -> list[Head]:
    """Build one unfitted head per exit.

    Args:
        head: The name of a Head class, or one of these:

            - "whitened_means": WhitenedMeans, and ClassMeans for features that these do not support: with four axes or
              more (videos), or vectors of more than 4,096 numbers;
            - "auto": ClassMeans as long as all means together stay within `memory` bytes. Otherwise the largest are
              replaced by PooledMeans, one after the other. (While it is fitted, a head holds three times as much.)
            - a Head class, or a function (num_classes, feature_shape) -> Head, such as
              functools.partial(PooledMeans, grid=2).
        num_classes: K, the number of classes.
        shapes: Shapes of one sample's features at each exit.
        memory: Bytes for the means, if `head` is "auto".

    Returns:
        The heads, in the order of `shapes`.

    Raises:
        TypeError: `head` is none of these, or has made something else.
        ValueError: The name is not known, or a head does not fit the classes or the features.
    """
    sizes = [tuple(shape) for shape in shapes]
    if isinstance(head, str) and head == "auto":
        return _build_within(memory, num_classes, sizes)
    make: Callable[[int, tuple[int, ...]], Head]
    if isinstance(head, str) and head == WhitenedMeans.kind:
        make = _whitened_or_class_means
        _warn_of_channels_last(sizes)
    elif isinstance(head, str):
        make = _class_of(head, "`head` is", [*HEAD_REGISTRY, "auto"])
    elif callable(head) and not isinstance(head, nn.Module):
        make = head
    else:
        raise TypeError(f"`head` is a {type(head).__name__}; wanted a name, a Head class or a function that makes one")
    return [_check_head(make(num_classes, shape), num_classes, shape) for shape in sizes]


def _whitened_or_class_means(num_classes: int, shape: tuple[int, ...]) -> Head:
    return (WhitenedMeans if supports(shape) else ClassMeans)(num_classes, shape)


def _warn_of_channels_last(shapes: list[tuple[int, ...]]) -> None:
    """Warn of maps that are square only if the last axis holds the channels, as in Swin Transformers."""
    for shape in shapes:
        if len(shape) == 3 and shape[0] == shape[1] < shape[2]:
            warn(
                f"features of shape {list(shape)} are taken for {shape[0]} channels of maps {shape[1]} x {shape[2]}; "
                "if they are rows x columns x channels, whitened means need to be told so: head=lambda k, shape: "
                "WhitenedMeans(k, shape, statistics=statistics_of(shape, channels=-1)), both from e2cm_ext.heads"
            )
            return


def _build_within(memory: int, num_classes: int, shapes: list[tuple[int, ...]]) -> list[Head]:
    sizes = [4 * num_classes * math.prod(shape) for shape in shapes]  # bytes
    pooled = [4 * num_classes * shape[channel_axis(len(shape), None)] if len(shape) < 4 else None for shape in shapes]
    heads: list[type[Head]] = [ClassMeans] * len(shapes)
    for i in sorted(range(len(shapes)), key=sizes.__getitem__, reverse=True):
        pooled_size = pooled[i]
        if sum(sizes) > memory and pooled_size is not None and pooled_size < sizes[i]:
            heads[i], sizes[i] = PooledMeans, pooled_size
    return [head(num_classes, shape) for head, shape in zip(heads, shapes, strict=True)]


def _check_head(head: Head, num_classes: int, shape: tuple[int, ...]) -> Head:
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
    """Build the unfitted head that a configuration describes.

    Args:
        config: What `Head.config` has returned.

    Returns:
        The head; `load_state_dict` makes it what the original was.

    Raises:
        ValueError: The configuration is none, or its class is not known. The module that defines the class must have
            been imported.
    """
    if not isinstance(config, dict) or not isinstance(config.get("kind"), str):
        raise ValueError(f"`config` is {config!r}; wanted what Head.config() returns")
    arguments = {key: value for key, value in config.items() if key != "kind"}
    head_class = _class_of(config["kind"], "`config` is of kind", list(HEAD_REGISTRY))
    try:
        inspect.signature(head_class).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"`config` does not fit {head_class.__name__}: {error}") from None
    return head_class(**arguments)


def _class_of(kind: str, what: str, known: list[str]) -> type[Head]:
    if kind not in HEAD_REGISTRY:
        raise ValueError(
            f"{what} {kind!r}; known are {', '.join(map(repr, known))}: a Head of your own is known by the name of its "
            "class once the module that defines it has been imported"
        )
    return HEAD_REGISTRY[kind]
