"""Packing: class means, or the weights of a linear head, brought once into the form that the CPU kernels read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from . import validation
from .calls import Batch

__all__ = ["Packed", "pack"]

_PLAIN = (Tensor, torch.nn.Parameter)


class Packed:
    """Class means or weights with what `pack` has made of them for the CPU kernels.

    The ops take it in the place of class means or weights; no result changes by a bit. It belongs to this process: a
    copy or a pickle of it packs again. If the tensors have been written to since, the next op raises a ValueError.
    torch counts most writes. Of those that it does not count (by numpy, other processes, fused optimizers, in inference
    mode, through `.data`) all are noticed but those that change a few numbers here and there.

    Attributes:
        vectors: The class means or weights, [K, ...].
        center: Their center, or None.
    """

    __slots__ = ("_panels", "_sources", "_state", "center", "vectors")

    def __init__(self, vectors: Tensor, center: Tensor | None) -> None:
        self.vectors, self.center = self._sources = vectors, center
        self._panels: Tensor | None = None

    def _pack(self) -> None:
        wanted = "a tensor [classes, ...], one class at least"
        if validation.strided("vectors", self.vectors, wanted).dim() < 2 or self.vectors.numel() == 0:
            raise ValueError(f"`vectors` has shape {list(self.vectors.shape)}; wanted {wanted}")
        found = validation.features("vectors", self.vectors)
        center = self.center if self.center is None else _like_one(found, self.center)
        size = native.packed_bytes(found.rows, found.dim) if found.tensor.is_cpu else 0
        if size == 0:
            return
        dense = validation.channels_last_format(found.tensor) if found.channels_last else torch.contiguous_format
        self.vectors, self.center = found.tensor.contiguous(memory_format=dense), center
        self._panels = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._state = self._state_now()
        native.pack(
            self.vectors.data_ptr(), found.dtype, found.rows, found.dim, 0 if center is None else center.data_ptr(),
            self._panels.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def _state_now(self) -> list[tuple[Any, ...]]:
        return [_state(t) for t in self._sources if t is not None]

    def is_of(self, vectors: Tensor, center: Tensor | None) -> bool:
        """Was this made of these tensor objects, whether or not they have been written to since?"""
        return self._sources[0] is vectors and self._sources[1] is center

    def is_empty(self) -> bool:
        return self._panels is None

    def is_current(self) -> bool:
        return self._panels is None or self._state_now() == self._state

    @property
    def panels(self) -> Tensor | None:
        if not self.is_current():
            raise ValueError("the vectors or their center have been written to since they were packed: pack them again")
        return self._panels

    def __reduce__(self) -> tuple[Any, ...]:
        return pack, self._sources

    def __repr__(self) -> str:
        packed = "nothing to pack" if self._panels is None else f"{self._panels.nbytes} bytes"
        return f"Packed({list(self.vectors.shape)}, {packed})"


def _state(t: Tensor) -> tuple[Any, ...]:
    """A value that differs once the tensor has been written to, or given other memory."""
    writes = None if t.is_inference() else t._version
    numbers = (
        native.sampled_hash(t.data_ptr(), t.nbytes) if t.is_contiguous() or validation.is_channels_last(t) else None
    )
    return writes, t.data_ptr(), t.stride(), numbers


def pack(vectors: Tensor, center: Tensor | None = None) -> Packed:
    """Pack class means or weights once, which the CPU kernels otherwise do in every call.

    With 24 classes or fewer, on a GPU, and for a tensor that is being traced there is nothing to pack. Otherwise it
    takes as much memory as the vectors do in float32, for up to 15 classes more.

    Args:
        vectors: Class means or weights [K, ...], in the memory order of the features that they will be used with; in
            another order they are packed in vain.
        center: Center of the class means, as in `exit_step`.

    Returns:
        An argument for the ops in the place of the class means or weights.

    Raises:
        TypeError: An argument is not a tensor of floats.
        ValueError: A shape or a device does not fit.

    Example:
        import torch
        from e2cm_ext import ops

        means = torch.randn(100, 512)
        packed = ops.pack(means, center=means.mean(0))
        scores = ops.class_scores(torch.randn(8, 512), packed, scale=torch.full((100,), 20.0))
    """
    packed = Packed(vectors, center)
    if not validation.is_tracing() and (type(vectors) in _PLAIN or not isinstance(vectors, Tensor)):
        packed._pack()
    return packed


def _like_one(vectors: Batch, center: Tensor) -> Tensor:
    """The center as float32 in the memory order of one of the vectors."""
    center = validation.strided("center", center, "a tensor [features] of floats, or None")
    shape = tuple(vectors.tensor.shape[1:])
    if not center.is_floating_point() or center.numel() != vectors.dim or center.device != vectors.tensor.device:
        raise ValueError(
            f"`center` is a {center.dtype} tensor {list(center.shape)} on {center.device}; wanted floats in the shape "
            f"of one of `vectors`, {list(shape)}, on {vectors.tensor.device}"
        )
    if not vectors.channels_last:
        return center.float().contiguous()
    last = validation.channels_last_format(vectors.tensor)
    return center.float().reshape(1, *shape).contiguous(memory_format=last)[0]


class Packing:
    """The last packed tensors of a head, packed again if they have changed."""

    def __init__(self) -> None:
        self._last: Packed | None = None

    def packed(self, vectors: Tensor, center: Tensor | None = None) -> Packed:
        last = self._last if self._last is not None and self._last.is_of(vectors, center) else None
        if last is not None and last.is_empty():
            return last
        # Not packed in inference mode: some changes could not be noticed.
        if validation.is_tracing() or any(t.is_inference() for t in (vectors, center) if t is not None):
            return Packed(vectors, center)
        if last is None or not last.is_current():
            last = self._last = pack(vectors, center)
        return last

    def __reduce__(self) -> tuple[Any, ...]:
        return Packing, ()
