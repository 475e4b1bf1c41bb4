"""Writes a network with early exits as a package: one program per stage, for runtimes without early exits.

A program maps the features before its stages to those behind them, and to the certainty and the log-probabilities of
the exit there. The runner compares certainties with the threshold and passes the survivors on: runner.py on ONNX
Runtime, torch_runner.py on torch. Exits that are off are left out, and so are their heads.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.loader import device_and_dtype
from ..heads import Head, Rule
from ..native import build_info
from ..runner import FORMAT, KIND, MANIFEST, OUTPUTS
from ..runtime.segments import segments
from ..stages import Stages
from ..utils import serialization
from .export_modules import StageWithExit, ends_in_relu
from .onnx_layout import keep_nchwc

__all__ = ["ExportSpec", "Format", "export"]

Format = Literal["onnx", "torch", "aoti"]
_Writer = Callable[[torch.export.ExportedProgram, Tensor], bytes]
_ENDINGS = {"onnx": "onnx", "torch": "pt2", "aoti": "pt2"}
_MOST = 2 << 30  # bytes, in a message of protobuf


@dataclass(frozen=True)
class ExportSpec:
    """What an exporter needs to know of a network with exits, each of which answers for itself."""

    stages: Stages
    heads: Sequence[Head]
    rule: Rule
    thresholds: Sequence[float]
    num_classes: int
    image_shape: tuple[int, ...]
    image_dtype: torch.dtype


def export(
    spec: ExportSpec, path: str | os.PathLike[str], format: Format = "onnx", *, progress: bool = True
) -> dict[str, Any]:
    """Write a package: see EarlyExit.export.

    Args:
        spec: The network.
        path: Where to write; complete, or not there at all.
        format: "onnx", "torch" or "aoti".
        progress: Show a progress bar.

    Returns:
        The manifest of the package.

    Raises:
        ValueError: A stage or a head cannot be exported.
    """
    if format not in _ENDINGS:
        raise ValueError(f"`format` is {format!r}; wanted {', '.join(map(repr, _ENDINGS))}")
    write = _writer(format)
    device, dtype = device_and_dtype(spec.stages)
    if format == "onnx" and dtype is not torch.float32:
        raise ValueError(f"the network is {dtype}; ONNX Runtime wants torch.float32: call .float() first")
    # Two samples: an exporter takes a size of 1 for a constant.
    x = torch.zeros(2, *spec.image_shape, dtype=dtype if spec.image_dtype.is_floating_point else spec.image_dtype)
    programs, stages = _export_stages(spec, x.to(device), write, _ENDINGS[format], progress)
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "version": build_info()["version"],
        "torch": torch.__version__,
        "runtime": format,
        "rule": spec.rule.name,
        "num_classes": spec.num_classes,
        "image_shape": list(spec.image_shape),
        "image_dtype": str(x.dtype).removeprefix("torch."),
        "device": device.type,
        "exits": list(spec.stages.names),
        "stages": stages,
        "files": {name: hashlib.sha256(program).hexdigest() for name, program in programs.items()},
    }
    _pack(path, manifest, programs)
    return manifest


def _export_stages(
    spec: ExportSpec, x: Tensor, write: _Writer, ending: str, progress: bool
) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The programs by file name, and what the manifest says of each."""
    programs: dict[str, bytes] = {}
    stages = []
    parts = segments(spec.stages, spec.heads, spec.thresholds)
    bar = tqdm(parts, desc="export", unit="stage", disable=not progress, leave=False)
    for number, segment in enumerate(bar):
        name = f"stage-{number:03d}.{ending}"
        last = segment.head is None
        exit_name = "(end)" if last else spec.stages.names[segment.exit]
        with torch.no_grad(), _silenced():
            features, nonnegative = ends_in_relu(list(segment.stages), x.clone())
            module = StageWithExit(list(segment.stages), segment.head, spec.rule, nonnegative).to(x.device)
            programs[name] = _program(write, module, x, name if last else f"{name}, with exit {exit_name!r}")
            x = features.clone()
        stages.append(
            {
                "file": name,
                "exit": segment.exit,
                "name": exit_name,
                "threshold": "-inf" if last else repr(segment.threshold),
                "shape": list(x.shape[1:]),
            }
        )
    return programs, stages


def _program(write: _Writer, module: StageWithExit, x: Tensor, what: str) -> bytes:
    try:
        exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        return write(exported, x)
    except Exception as error:  # what exporters say of a network that they cannot follow
        why, _, _ = str(error).strip().partition("\n")
        raise ValueError(f"{what} cannot be exported: {type(error).__name__}: {why}") from error


# ---- what a program is, in each format ------------------------------------------------------------------------------


def _writer(format: Format) -> _Writer:
    if format != "onnx":
        return _torch_program if format == "torch" else _compiled_program
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError(
            'format="onnx" needs onnx and onnxscript: pip install "e2cm_ext[onnx]", or take format="torch"'
        ) from None
    return _onnx_program


def _onnx_program(exported: torch.export.ExportedProgram, x: Tensor) -> bytes:
    program = torch.onnx.export(
        exported, (x,), dynamo=True, input_names=["x"], output_names=list(OUTPUTS), verbose=False
    )
    assert program is not None
    model = program.model_proto
    keep_nchwc(model.graph)
    if (size := model.ByteSize()) >= _MOST:
        raise ValueError(f"its weights take {size} bytes, and an ONNX file holds {_MOST}: put an exit in between")
    contents: bytes = model.SerializeToString()
    return contents


def _torch_program(exported: torch.export.ExportedProgram, x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.export.save(exported, file)
    return file.getvalue()


def _compiled_program(exported: torch.export.ExportedProgram, x: Tensor) -> bytes:
    from torch._inductor import aoti_compile_and_package

    with tempfile.TemporaryDirectory() as folder:
        package = aoti_compile_and_package(exported, package_path=os.path.join(folder, "stage.pt2"))
        return Path(package).read_bytes()


@contextmanager
def _silenced() -> Iterator[None]:
    """Hides warnings that exporters raise about their own work."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


# ---- the file -------------------------------------------------------------------------------------------------------


def _pack(path: str | os.PathLike[str], manifest: dict[str, Any], programs: dict[str, bytes]) -> None:
    text = json.dumps(manifest, indent=1).encode()
    with serialization.atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = hashlib.sha256(text).hexdigest().encode()
        for name, content in {MANIFEST: text, **programs}.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # without a date: the same network, the same bytes
