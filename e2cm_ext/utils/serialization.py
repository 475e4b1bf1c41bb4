"""Files of tensors and a description: safetensors with a checksum, written completely or not at all.

Any reader of safetensors can open them. The metadata holds JSON under the key "e2cm_ext": the kind of the file, its
format, the package version, the memory order of the tensors, and a SHA-256 of the whole file (computed with zeros in
its own place). Reading a file never executes anything.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..native import build_info

__all__ = ["FORMAT", "atomic_write", "bytes_of", "read", "write"]

# Of the contents of files; to be raised by a change that an old reader would misunderstand.
# 1: what is "mean_shrinkage" in the configuration of WhitenedMeans was called "pull".
# The heads "voting" and "product" were "consulting" and "blended"; the heads and combinations of some methods had other
# names of parameters and settings.
FORMAT = 2
_PREFIX = b'{"__metadata__":{"e2cm_ext":"'
_ZERO_CHECKSUM = "0" * 64
_MAX_HEADER = 100_000_000  # bytes; safetensors accepts no more
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


# ---- writing --------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write a file.

    Args:
        path: What was there before stays until the new file is complete.
        kind: What the file is, such as "Record"; `read` checks it.
        tensors: In any memory order, on any device.
        info: Anything that JSON can hold.

    Raises:
        TypeError: A tensor has a dtype that files cannot hold, or `info` is not JSON.
        OSError: The file cannot be written.
    """
    with atomic_write(path) as file:
        _write(file, kind, tensors, info)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that appears when the block ends without an error.

    It is written under another name in the same folder and renamed when it is complete. If the disk is full or Ctrl-C
    is pressed, the file that was there before stays, and nothing else is left.

    Args:
        path: The file.

    Yields:
        The open file, in binary mode.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():  # the error of open() would name the temporary file
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # Not by tempfile, whose files only their owner may read.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _write(file: BinaryIO, kind: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    # The widest dtypes first, so that each tensor is aligned to its own size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    order = {name: _memory_order(tensors[name]) for name in names}
    stored = {name: tensors[name].detach().permute(order[name]) for name in names}
    metadata = {
        "package": build_info()["version"],
        **info,
        "kind": kind,
        "format": FORMAT,
        "order": {name: order[name] for name in names if order[name] != sorted(order[name])},
        "sha256": _ZERO_CHECKSUM,
    }
    header: dict[str, Any] = {"__metadata__": {"e2cm_ext": json.dumps(metadata)}}
    end = 0
    for name, tensor in stored.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name} is {tensor.dtype}, which cannot be saved; wanted one of {', '.join(map(str, _DTYPES))}"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise ValueError(f"the description takes {len(text)} bytes; safetensors allows {_MAX_HEADER}")
    encoded = len(text).to_bytes(8, "little") + text

    checksum = hashlib.sha256(encoded)
    file.write(encoded)
    for tensor in stored.values():
        data = bytes_of(tensor)
        checksum.update(data)
        file.write(data)
    file.seek(encoded.index(_ZERO_CHECKSUM.encode()))
    file.write(checksum.hexdigest().encode())


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values in contiguous order, whatever its memory order and device."""
    dense = tensor.detach().contiguous().cpu()
    # Not reshape(-1): an expanded tensor of one number is contiguous, but has stride 0.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def _memory_order(tensor: Tensor) -> list[int]:
    """The dimensions, outermost in memory first; unchanged for a tensor that is not dense."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.dim()))


# ---- reading --------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], kind: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` has written.

    Args:
        path: The file.
        kind: The kind it must have; None: any.

    Returns:
        The tensors, on the CPU and in their memory order; and `info`, with "kind", "format" and "package" added.

    Raises:
        ValueError: The file is not of this package, of another kind or format, truncated or damaged.
        OSError: The file cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        header, about, checksum = _read_header(file, path)
    if about["sha256"] != checksum:
        raise ValueError(f"{path} is damaged: its contents do not match its checksum; copy or save it again")
    if kind is not None and about["kind"] != kind:
        raise ValueError(f"{path} is a file of the kind {about['kind']!r}; wanted {kind!r}")
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    assert tensors.keys() == header.keys() - {"__metadata__"}
    for name, order in about.pop("order").items():
        tensors[name] = tensors[name].permute([order.index(d) for d in range(len(order))])
    return tensors, about


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The header, the part of it that is ours, and the checksum of the file's contents."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8 + len(_PREFIX))
    if start[8:] != _PREFIX[: max(0, len(start) - 8)]:
        raise ValueError(f"{path} is not a file of e2cm_ext: it does not begin like one")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 + len(_PREFIX) or (length <= _MAX_HEADER and 8 + length > size):
        raise ValueError(f"{path} is truncated: it ends after {size} bytes, before its description does")
    damaged = ValueError(f"{path} is damaged: its description cannot be read; copy or save it again")
    if not len(_PREFIX) < length <= _MAX_HEADER:
        raise damaged
    text = start[8:] + file.read(length - len(_PREFIX))
    try:
        header = json.loads(text)
        about = json.loads(header["__metadata__"]["e2cm_ext"])
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
        version, declared, wanted = about["format"], about["sha256"], 8 + length + int(end)
        usable = isinstance(version, int) and isinstance(declared, str) and text.count(declared.encode()) == 1
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError):
        raise damaged from None
    if not usable:
        raise damaged
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version} (written by e2cm_ext {about.get('package', '?')}); this version reads "
            f"format {FORMAT}: install the version that wrote it, or save it again"
        )
    if size < wanted:
        raise ValueError(f"{path} is truncated: it has {size} of {wanted} bytes")
    if size > wanted:
        raise ValueError(f"{path} is damaged: it has {size} bytes instead of {wanted}; copy or save it again")
    checksum = hashlib.sha256(start[:8] + text.replace(declared.encode(), _ZERO_CHECKSUM.encode()))
    while block := file.read(1 << 20):
        checksum.update(block)
    return header, about, checksum.hexdigest()
