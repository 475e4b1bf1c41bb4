"""Files that hold tensors and a description of them: safetensors, sealed with a checksum, written whole or not at all.

Any reader of safetensors can open them. What is ours stands in the metadata, as JSON under the key "e2cm_ext": the kind
of the file, its format and the package version, the memory order of the tensors, and a SHA-256 of the whole file (taken
with zeros in its own place). Nothing in a file is ever executed.
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

__all__ = ["FORMAT", "bytes_of", "read", "atomic_write", "write"]

FORMAT = 1  # of what stands in the file; a change that an old reader would misunderstand makes it 2
_OPENING = b'{"__metadata__":{"e2cm_ext":"'
_NO_SUM = "0" * 64
_LONGEST_HEADER = 100_000_000  # that safetensors accepts
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


# ---- writing --------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """A file of that kind with `tensors` and `info` (anything that JSON holds)."""
    with atomic_write(path) as file:
        _write(file, kind, tensors, info)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write into: complete at the end of the block, or not there at all.

    It is made under another name in the same folder and takes its name when it is complete: if the disk is full or
    Ctrl-C comes, what was there before is still there, and nothing else.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():  # what open() says of the other name would puzzle who has never heard of it
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # Not by tempfile: its files are for their owner only, and the new name would keep that.
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
    # The widest first: so each lies at a multiple of its own size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    order = {name: _order(tensors[name]) for name in names}
    stored = {name: tensors[name].detach().permute(order[name]) for name in names}
    about = {
        "package": build_info()["version"],
        **info,
        "kind": kind,
        "format": FORMAT,
        "order": {name: order[name] for name in names if order[name] != sorted(order[name])},
        "sha256": _NO_SUM,
    }
    header: dict[str, Any] = {"__metadata__": {"e2cm_ext": json.dumps(about)}}
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
    if len(text) > _LONGEST_HEADER:
        raise ValueError(f"the description takes {len(text)} bytes; safetensors allows {_LONGEST_HEADER}")
    start_of_file = len(text).to_bytes(8, "little") + text

    checksum = hashlib.sha256(start_of_file)
    file.write(start_of_file)
    for tensor in stored.values():
        data = bytes_of(tensor)
        checksum.update(data)
        file.write(data)
    file.seek(start_of_file.index(_NO_SUM.encode()))
    file.write(checksum.hexdigest().encode())


def bytes_of(tensor: Tensor) -> memoryview:
    """Those of all its numbers in the usual order, whatever its memory order and wherever it is."""
    dense = tensor.detach().contiguous().cpu()
    # Not reshape(-1): one number that was expanded is contiguous, and yet has stride 0.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def _order(tensor: Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost; as they come for a tensor that is not dense."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.dim()))


# ---- reading --------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], kind: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` was given; tensors on the CPU, in the memory order they had. kind: None takes any.

    A ValueError says what is wrong with a file: not ours, of another kind or format, truncated, altered.
    """
    path = Path(path)
    with open(path, "rb") as file:
        header, about, rest = _opened(file, path)
    if about["sha256"] != rest:
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


def _opened(file: BinaryIO, path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The header, our part of it, and the checksum that the file ought to have."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8 + len(_OPENING))
    if start[8:] != _OPENING[: max(0, len(start) - 8)]:
        raise ValueError(f"{path} is not a file of e2cm_ext: it does not begin like one")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 + len(_OPENING) or (length <= _LONGEST_HEADER and 8 + length > size):
        raise ValueError(f"{path} is truncated: it ends after {size} bytes, before its description does")
    damaged = ValueError(f"{path} is damaged: its description cannot be read; copy or save it again")
    if not len(_OPENING) < length <= _LONGEST_HEADER:
        raise damaged
    text = start[8:] + file.read(length - len(_OPENING))
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
    checksum = hashlib.sha256(start[:8] + text.replace(declared.encode(), _NO_SUM.encode()))
    while block := file.read(1 << 20):
        checksum.update(block)
    return header, about, checksum.hexdigest()
