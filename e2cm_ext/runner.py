"""Runs what EarlyExit.export has written for ONNX Runtime: stage, exit, compaction, next stage, without torch.

This one file needs numpy and onnxruntime and nothing else, not even the rest of e2cm_ext: copy it to where the network
is to run.

    from runner import OnnxCascade                     # or from e2cm_ext.runner

    cascade = OnnxCascade.load("model.zip")
    answers = cascade.predict(images)                  # .prediction .confidence .exit .log_probs, in input order
    log_probs = cascade(images)                        # [B, K]

A package is a zip file without compression: manifest.json, and a program for every stage. The manifest holds the
SHA-256 of every program; that of the manifest is the zip file's comment. They tell damage, not malice: whoever alters a
package can write new ones, so run none of which you do not know where it comes from.
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
FORMAT = 2  # of packages; a change that an old reader would misunderstand makes it 3
MANIFEST = "manifest.json"
OUTPUTS = ("features", "certainty", "log_probs")  # of a stage's program; its input is "x"

_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64",
          "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(uint8)": "uint8"}  # fmt: skip
_STEPS = 1000  # that are kept ready: some kilobytes each
_LINE = 64  # bytes


class Answers(NamedTuple):
    """In input order; row i belongs to sample i."""

    prediction: np.ndarray[Any, np.dtype[np.int64]]  # [N]
    confidence: np.ndarray[Any, np.dtype[np.float32]]  # [N]: the largest probability
    exit: np.ndarray[Any, np.dtype[np.int64]]  # [N]: the number of the exit that answered
    log_probs: np.ndarray[Any, np.dtype[np.float32]]  # [N, K]


class Stage(NamedTuple):
    """What the manifest says of a stage, and of the exit behind it."""

    file: str
    exit: int  # its number in the network that was exported; behind the last stage: the number of all its exits
    name: str  # of the exit
    threshold: float  # what certainty must be above for a sample to leave; of the last stage: -inf
    shape: tuple[int, ...]  # of one sample's features behind it


class Package:
    """A package, read and found whole.

    A ValueError says what is wrong with one: not ours, of another format or runtime, truncated, altered.
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
        """Whether images of this shape and dtype are those that the network wants."""
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
    """A network with early exits, on ONNX Runtime. Any number of threads may call one of them.

    thresholds: [exits of the package], can be set; a sample leaves where its certainty is above. manifest: what stands
    in the package. A sample with a NaN or an infinity never leaves early.
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
            # Every stage has its own threads: those of a stage that has finished must not keep the next one's cores.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
                raise ValueError(f"`threads` is {threads!r}; wanted a whole number from 1 up, or None for all cores")
            options.intra_op_num_threads = threads
        self.manifest, self.exit_names = package.manifest, package.exit_names
        self._package = package
        self._thresholds = np.array([stage.threshold for stage in package.stages[:-1]], np.float32)
        self._sessions: list[Any] = []
        self._lanes: list[_Lane] = []  # that nobody is using
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
        """What `EarlyExit.export(path, format="onnx")` wrote.

        threads: that one batch may use; None: as many as there are cores. providers: those of onnxruntime. options:
        onnxruntime.SessionOptions, for all stages, in the place of ours.
        """
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
        """Log-probabilities [B, K]."""
        return self.predict(images).log_probs

    def predict(self, images: np.ndarray[Any, Any]) -> Answers:
        """Prediction, confidence, exit and log-probabilities of every image [B, *image_shape], in input order."""
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
                lane = self._lanes.pop()
            except IndexError:
                lane = _Lane(self._package, self._sessions)
            lane.run(images, self._thresholds, answers)
            self._lanes.append(lane)  # not after an error
        return answers


class _Step(NamedTuple):
    """A stage on a number of samples, between two pieces of memory."""

    run: Callable[[], None]
    x: Any  # what it reads and what it writes, as arrays
    features: Any
    certainty: Any
    log_probs: Any


class _Lane:
    """Memory that one batch at a time goes through the stages in.

    Features go to and fro between two spaces, so that they are in the cache when the next stage reads them; what is
    written where is told to onnxruntime once for each stage and number of samples.
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
        self._steps: dict[tuple[int, int, int], _Step] = {}
        self._spaces: tuple[Any, Any] = (None, None)
        self._room = 0  # samples in each of them

    def run(self, images: Any, thresholds: Any, answers: Answers) -> None:
        count, here = len(images), 0
        if count > self._room:
            self._make_room(count)
        ids = np.arange(count)
        # ReLU may make a number of a NaN, and nobody would notice; not so here.
        sound = np.isfinite(images).reshape(count, -1).all(1) if self._floats else np.ones(count, bool)
        step = self._step(0, count, here)
        step.x[...] = images
        for i, limit in enumerate(thresholds):
            step = self._step(i, count, here)
            step.run()
            here = 1 - here
            leaving = step.certainty > limit
            if not leaving.any():
                continue
            log_probs = step.log_probs
            leaving &= sound
            leaving &= np.isfinite(log_probs).any(1)  # certainty may be a number though features are not
            leavers = leaving.nonzero()[0]
            if len(leavers) == 0:
                continue
            if len(leavers) == count:
                _write(answers, ids, log_probs, log_probs, self._stages[i].exit)
                return
            some = log_probs[leavers]
            _write(answers, ids[leavers], some, some, self._stages[i].exit)
            stayers = (~leaving).nonzero()[0]
            ids, sound, count = ids[stayers], sound[stayers], len(stayers)
            here = 1 - here
            step.features.take(stayers, 0, self._step(i + 1, count, here).x, "clip")
        step = self._step(len(thresholds), count, here)
        step.run()
        # By the logits: rounding can make equal in log_probs what is not.
        _write(answers, ids, step.log_probs, step.features, self._stages[-1].exit)

    def _step(self, stage: int, count: int, here: int) -> _Step:
        key = stage, count, here
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= _STEPS:
                self._steps.clear()
            step = self._steps[key] = self._bound(stage, count, here)
        return step

    def _bound(self, stage: int, count: int, here: int) -> _Step:
        session = self._sessions[stage]
        arrays = [
            space[: count * np.dtype(dtype).itemsize * math.prod(shape)].view(dtype).reshape(count, *shape)
            for space, (shape, dtype) in zip(
                (self._spaces[here], self._spaces[1 - here]), self._maps[stage : stage + 2], strict=True
            )
        ]
        arrays += [np.empty(count, np.float32), np.empty((count, self._classes), np.float32)]
        binding = session.io_binding()
        for bind, name, array in zip(
            (binding.bind_input, *[binding.bind_output] * 3), ("x", *OUTPUTS), arrays, strict=True
        ):
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return _Step(partial(session.run_with_iobinding, binding), *arrays)

    def _make_room(self, count: int) -> None:
        self._steps.clear()
        size = count * max(dtype.itemsize * math.prod(shape) for shape, dtype in self._maps)
        self._spaces = _aligned(size), _aligned(size)
        self._room = count


def _aligned(size: int) -> Any:
    """So many bytes, from the beginning of a line of the cache on."""
    space = np.empty(size + _LINE, np.uint8)
    first = -space.ctypes.data % _LINE
    return space[first : first + size]


def _write(answers: Answers, ids: Any, log_probs: Any, scores: Any, exit: int) -> None:
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
            text, seal = archive.read(MANIFEST), archive.comment.decode()
            contents = {name: archive.read(name) for name in archive.namelist() if name != MANIFEST}
    except KeyError:
        raise ValueError(f"{path} is not a package of e2cm_ext: it is a zip file without {MANIFEST}") from None
    except Exception as error:  # zipfile has many ways to stumble over a file that is not whole
        raise ValueError(f"{path} is truncated or damaged: {error}; copy or export it again") from error
    if len(seal) != 64:
        raise ValueError(f"{path} is not a package of e2cm_ext, or it has been packed anew: its seal is missing")
    damaged = f"{path} is damaged: {{}} does not match its checksum; copy or export it again"
    if hashlib.sha256(text).hexdigest() != seal:
        raise ValueError(damaged.format(MANIFEST))
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ValueError(f"{path} is not a package of e2cm_ext: its {MANIFEST} is somebody else's")
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
