"""Runs packages of EarlyExit.export on ONNX Runtime, without torch: stage, exit, compaction, next stage.

This file needs numpy and onnxruntime and nothing else, not even the rest of e2cm_ext: copy it to the machine that runs
the network.

    from runner import OnnxCascade                     # or from e2cm_ext.runner

    cascade = OnnxCascade.load("model.zip")
    answers = cascade.predict(images)                  # .prediction .confidence .exit .log_probs, in input order
    log_probs = cascade(images)                        # [B, K]

A package is a zip file without compression: manifest.json, and a program for every stage. The manifest holds the
SHA-256 of every program; the SHA-256 of the manifest is the zip file's comment. These checksums detect damage, not
manipulation: run only packages from a source that you trust.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Answers", "FORMAT", "KIND", "OnnxCascade", "Package"]

KIND = "e2cm_ext cascade"
FORMAT = 2  # of packages; raise it for a change that an old reader would misunderstand
MANIFEST = "manifest.json"
OUTPUTS = ("features", "certainty", "log_probs")  # of a stage's program; its input is "x"

_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64",
          "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(uint8)": "uint8"}  # fmt: skip
_MAX_BOUND_STAGES = 1000  # kept for reuse, some kilobytes each
_CACHE_LINE = 64  # bytes


class Answers(NamedTuple):
    """Results in input order: row i belongs to sample i."""

    prediction: np.ndarray[Any, np.dtype[np.int64]]  # [N]
    confidence: np.ndarray[Any, np.dtype[np.float32]]  # [N]: the largest probability
    exit: np.ndarray[Any, np.dtype[np.int64]]  # [N]: the number of the exit that answered
    log_probs: np.ndarray[Any, np.dtype[np.float32]]  # [N, K]


class Stage(NamedTuple):
    """An entry of the manifest: a stage, and the exit behind it."""

    file: str
    exit: int  # its number in the exported network; for the last stage: the number of exits
    name: str  # of the exit
    threshold: float  # a sample leaves if its certainty is above; last stage: -inf
    shape: tuple[int, ...]  # of one sample's features behind the stage


class Package:
    """A package that has been read and checked.

    Args:
        path: The file.
        *runtimes: The runtimes ("onnx", "torch", "aoti") that are accepted; none given: all.

    Raises:
        ValueError: The file is not a package, of another format or runtime, truncated or altered.
    """

    def __init__(self, path: str | os.PathLike[str], *runtimes: str) -> None:
        self.path = os.fspath(path)
        self.manifest, self.programs = _read(self.path)
        try:
            self.runtime, stages = self.manifest["runtime"], self.manifest["stages"]
            self.image_shape = tuple(int(size) for size in self.manifest["image_shape"])
            self.image_dtype = str(self.manifest["image_dtype"])
            self.num_classes = int(self.manifest["num_classes"])
            self.exit_names = tuple(str(name) for name in self.manifest["exits"])
            self.stages = [
                Stage(s["file"], int(s["exit"]), str(s["name"]), float(s["threshold"]), tuple(s["shape"]))
                for s in stages
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged: its manifest lacks something: {error!r}") from None
        if runtimes and self.runtime not in runtimes:
            wanted = " or ".join(map(repr, runtimes))
            raise ValueError(f"{self.path} is a package for {self.runtime!r}; this runs packages for {wanted}")

    def checked(self, shape: Sequence[int], dtype: str) -> None:
        """Refuse images of a shape or dtype that the network does not take."""
        if tuple(shape[1:]) == self.image_shape and dtype == self.image_dtype:
            return
        wanted = ", ".join(map(str, ("batch", *self.image_shape)))
        if tuple(shape[1:]) != self.image_shape or len(shape) != len(self.image_shape) + 1:
            hint = ": is it one image without a batch? images[None]" if tuple(shape) == self.image_shape else ""
            raise ValueError(f"`images` has shape {list(shape)}; wanted [{wanted}]{hint}")
        if dtype != self.image_dtype:
            raise TypeError(f"`images` is {dtype}; wanted {self.image_dtype} [{wanted}]")


def refuse_other(package: object) -> None:
    if not isinstance(package, Package):
        raise TypeError(f"`package` is a {type(package).__name__}; wanted a Package: `load` takes a path")


class OnnxCascade:
    """A network with early exits on ONNX Runtime. Any number of threads may call one object.

    A sample leaves at the first exit where its certainty is above the threshold. A sample with a NaN or an infinity
    never leaves early.

    Args:
        package: See `load`, which takes a path.
        threads: Threads that one batch may use; None: as many as there are cores.
        providers: Execution providers of onnxruntime.
        options: onnxruntime.SessionOptions for all stages, in place of the default ones.

    Attributes:
        thresholds: One number per exit of the package; can be set.
        manifest: The manifest of the package, as a dict.

    Example:
        >>> cascade = OnnxCascade.load("model.zip", threads=4)
        >>> answers = cascade.predict(images)
    """

    def __init__(
        self,
        package: Package,
        *,
        threads: int | None = None,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
        options: Any = None,
    ) -> None:
        import onnxruntime as ort

        refuse_other(package)
        if options is None:
            options = ort.SessionOptions()
            # Every stage has its own thread pool: idle threads of one stage must not occupy the cores of the next.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
                raise ValueError(f"`threads` is {threads!r}; wanted a whole number from 1 up, or None for all cores")
            options.intra_op_num_threads = threads
        self.manifest, self.exit_names = package.manifest, package.exit_names
        self._package = package
        self._thresholds = np.array([stage.threshold for stage in package.stages[:-1]], np.float32)
        self._sessions: list[Any] = []
        self._free_workspaces: list[_Workspace] = []  # not in use by a thread
        for stage in package.stages:
            try:
                session = ort.InferenceSession(package.programs[stage.file], options, providers=list(providers))
            except Exception as error:  # onnxruntime has some twenty kinds of them
                raise ValueError(f"{package.path}: onnxruntime cannot load {stage.file}: {error}") from error
            self._sessions.append(session)
        package.programs.clear()  # the sessions have their own copies

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
        options: Any = None,
    ) -> OnnxCascade:
        """Load what `EarlyExit.export(path, format="onnx")` wrote. For the arguments see the class."""
        return cls(Package(path, "onnx"), threads=threads, providers=providers, options=options)

    @property
    def num_classes(self) -> int:
        return self._package.num_classes

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self._package.image_shape

    @property
    def image_dtype(self) -> str:
        return self._package.image_dtype

    @property
    def thresholds(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        return self._thresholds.copy()

    @thresholds.setter
    def thresholds(self, value: Any) -> None:
        vector = np.asarray(value, np.float32)
        vector = np.broadcast_to(vector, self._thresholds.shape) if vector.ndim == 0 else vector
        if vector.shape != self._thresholds.shape or np.isnan(vector).any():
            raise ValueError(f"`thresholds` is {value!r}; wanted {len(self._thresholds)} numbers, or one for all exits")
        self._thresholds = vector.copy()

    def __call__(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Compute log-probabilities [B, K]."""
        return self.predict(images).log_probs

    def predict(self, images: np.ndarray[Any, Any]) -> Answers:
        """Predict a batch of images.

        Args:
            images: [B, *image_shape], in the dtype of the package.

        Returns:
            Prediction, confidence, exit and log-probabilities of every image, in input order.
        """
        if not isinstance(images, np.ndarray):
            raise TypeError(f"`images` is a {type(images).__name__}; wanted a numpy array")
        self._package.checked(images.shape, str(images.dtype))
        count, classes = len(images), self.num_classes
        answers = Answers(
            np.empty(count, np.int64),
            np.empty(count, np.float32),
            np.empty(count, np.int64),
            np.empty((count, classes), np.float32),
        )
        if count:
            try:
                workspace = self._free_workspaces.pop()
            except IndexError:
                workspace = _Workspace(self._package, self._sessions)
            workspace.run(images, self._thresholds, answers)
            self._free_workspaces.append(workspace)  # not after an error
        return answers


class _BoundStage(NamedTuple):
    """A stage, bound to its buffers for a certain number of samples."""

    run: Callable[[], None]
    x: Any  # what it reads and what it writes, as arrays
    features: Any
    certainty: Any
    log_probs: Any


class _Workspace:
    """Buffers for one batch at a time.

    Features alternate between two buffers, so that they are in the cache when the next stage reads them. Buffers are
    bound to onnxruntime once for each stage and number of samples.
    """

    def __init__(self, package: Package, sessions: Sequence[Any]) -> None:
        self._stages, self._sessions = package.stages, sessions
        self._classes = package.num_classes
        image = (package.image_shape, np.dtype(package.image_dtype))
        features = [
            (stage.shape, np.dtype(_TYPES[session.get_outputs()[0].type]))
            for stage, session in zip(package.stages, sessions, strict=True)
        ]
        self._maps = [image, *features]
        self._floats = image[1].kind == "f"
        self._steps: dict[tuple[int, int, int], _BoundStage] = {}
        self._buffers: tuple[Any, Any] = (None, None)
        self._capacity = 0  # samples that fit into each of them

    def run(self, images: Any, thresholds: Any, answers: Answers) -> None:
        count, side = len(images), 0
        if count > self._capacity:
            self._allocate(count)
        ids = np.arange(count)
        # A ReLU may turn a NaN into a number: look at the images themselves.
        finite = np.isfinite(images).reshape(count, -1).all(1) if self._floats else np.ones(count, bool)
        step = self._step(0, count, side)
        step.x[...] = images
        for i, limit in enumerate(thresholds):
            step = self._step(i, count, side)
            step.run()
            side = 1 - side
            leaving = step.certainty > limit
            if not leaving.any():
                continue
            log_probs = step.log_probs
            leaving &= finite
            leaving &= np.isfinite(log_probs).any(1)  # certainty may be a number though features are not
            leavers = leaving.nonzero()[0]
            if len(leavers) == 0:
                continue
            if len(leavers) == count:
                _write_answers(answers, ids, log_probs, log_probs, self._stages[i].exit)
                return
            some = log_probs[leavers]
            _write_answers(answers, ids[leavers], some, some, self._stages[i].exit)
            stayers = (~leaving).nonzero()[0]
            ids, finite, count = ids[stayers], finite[stayers], len(stayers)
            side = 1 - side
            step.features.take(stayers, 0, self._step(i + 1, count, side).x, "clip")
        step = self._step(len(thresholds), count, side)
        step.run()
        # Of the logits: rounding can make different logits equal in log_probs.
        _write_answers(answers, ids, step.log_probs, step.features, self._stages[-1].exit)

    def _step(self, stage: int, count: int, side: int) -> _BoundStage:
        key = stage, count, side
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= _MAX_BOUND_STAGES:
                self._steps.clear()
            step = self._steps[key] = self._bind(stage, count, side)
        return step

    def _bind(self, stage: int, count: int, side: int) -> _BoundStage:
        session = self._sessions[stage]
        arrays = [
            space[: count * np.dtype(dtype).itemsize * math.prod(shape)].view(dtype).reshape(count, *shape)
            for space, (shape, dtype) in zip(
                (self._buffers[side], self._buffers[1 - side]), self._maps[stage : stage + 2], strict=True
            )
        ]
        arrays += [np.empty(count, np.float32), np.empty((count, self._classes), np.float32)]
        binding = session.io_binding()
        for bind, name, array in zip(
            (binding.bind_input, *[binding.bind_output] * 3), ("x", *OUTPUTS), arrays, strict=True
        ):
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return _BoundStage(partial(session.run_with_iobinding, binding), *arrays)

    def _allocate(self, count: int) -> None:
        self._steps.clear()
        size = count * max(dtype.itemsize * math.prod(shape) for shape, dtype in self._maps)
        self._buffers = _aligned(size), _aligned(size)
        self._capacity = count


def _aligned(size: int) -> Any:
    """A buffer of so many bytes that begins at a cache line."""
    space = np.empty(size + _CACHE_LINE, np.uint8)
    first = -space.ctypes.data % _CACHE_LINE
    return space[first : first + size]


def _write_answers(answers: Answers, ids: Any, log_probs: Any, scores: Any, exit: int) -> None:
    answers.prediction[ids] = scores.argmax(1)
    answers.confidence[ids] = np.exp(log_probs.max(1))
    answers.exit[ids] = exit
    answers.log_probs[ids] = log_probs


# ---- reading --------------------------------------------------------------------------------------------------------


def _read(path: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest, and every program by its name."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            raise ValueError(f"{path} is not a package of e2cm_ext: it does not begin like one")
    try:
        with zipfile.ZipFile(path) as archive:
            text, checksum = archive.read(MANIFEST), archive.comment.decode()
            contents = {name: archive.read(name) for name in archive.namelist() if name != MANIFEST}
    except KeyError:
        raise ValueError(f"{path} is not a package of e2cm_ext: it is a zip file without {MANIFEST}") from None
    except Exception as error:  # zipfile raises many kinds of errors for a damaged file
        raise ValueError(f"{path} is truncated or damaged: {error}; copy or export it again") from error
    if len(checksum) != 64:
        raise ValueError(f"{path} is not a package of e2cm_ext, or it has been packed anew: its seal is missing")
    damaged = f"{path} is damaged: {{}} does not match its checksum; copy or export it again"
    if hashlib.sha256(text).hexdigest() != checksum:
        raise ValueError(damaged.format(MANIFEST))
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ValueError(f"{path} is not a package of e2cm_ext: its {MANIFEST} is of another program")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')} (written by e2cm_ext {manifest.get('version', '?')}); this "
            f"runner reads format {FORMAT}: take the runner of the version that wrote it, or export it again"
        )
    files = manifest.get("files", {})
    if files.keys() != contents.keys():
        odd = ", ".join(sorted(files.keys() ^ contents.keys()))
        raise ValueError(f"{path} is damaged: it does not hold just what {MANIFEST} says: {odd}")
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != files[name]:
            raise ValueError(damaged.format(name))
    return manifest, contents
