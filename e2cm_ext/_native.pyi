# Addresses are of a tensor's first element; 0 stands for "none". dtypes: 0 float32, 1 bfloat16, 2 float16.
# Tuples stand for the structs of csrc/api.h; e2cm_ext/ops/calls.py makes them.
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

# data, dtype, rows, dim, stride
_Matrix: TypeAlias = tuple[int, int, int, int, int]
# channels, height, width, channels_last; rows and columns of the grids of mean, rms and max; pairs
_Numbers: TypeAlias = Sequence[int]
# a matrix; the statistics of it that are read, if it is not read itself
_Input: TypeAlias = tuple[_Matrix, _Numbers | None]
# kind (0 distances, 1 logits), vectors, dtype, classes, dim, per_class, center, packed
_Head: TypeAlias = tuple[int, int, int, int, int, int, int, int]
# rows, confidence, prediction, exit, log_probs
_Answers: TypeAlias = tuple[int, int, int, int, int]
# rule (0 confidence, 1 entropy), threshold, number of the exit, ids
_Departure: TypeAlias = tuple[int, float, int, int]

def class_distances(x: _Matrix, head: _Head, out: int, threads: int) -> None: ...
def packed_bytes(classes: int, dim: int) -> int: ...
def pack(vectors: int, dtype: int, classes: int, dim: int, center: int, packed: int, threads: int) -> None: ...
def sampled_hash(data: int, bytes: int) -> int: ...
def statistics(x: _Matrix, statistics: _Numbers, out: int, threads: int) -> None: ...
def scores(x: _Input, head: _Head, out: _Answers, threads: int) -> None: ...
def step(x: _Input, head: _Head, departure: _Departure, out: _Answers, keep: int, threads: int) -> int: ...
def decide(scores: _Matrix, scale: int, departure: _Departure, out: _Answers, keep: int, threads: int) -> int: ...
def kept_rows(mask: int, rows: int, keep: int) -> int: ...
def gather_rows(
    source: int,
    row_bytes: int,
    source_stride: int,
    index: int,
    count: int,
    target: int,
    threads: int,
) -> None: ...

# Only in a build with CUDA. place: device and stream.
# stays, bad_ids; whether rows that do not stay are passed over
_Marks: TypeAlias = tuple[int, int, bool]
_Place: TypeAlias = tuple[int, int]

def cuda_exit_workspace(x: _Input, head: _Head) -> int: ...
def cuda_exit(
    x: _Input,
    head: _Head,
    distances: int,
    answers: _Answers,
    departure: tuple[_Departure, _Marks] | None,
    workspace: int,
    place: _Place,
) -> None: ...
def cuda_decide(
    scores: _Matrix, scale: int, answers: _Answers, departure: tuple[_Departure, _Marks] | None, place: _Place
) -> None: ...
def cuda_statistics_workspace(rows: int, statistics: _Numbers) -> int: ...
def cuda_statistics(x: _Matrix, statistics: _Numbers, out: int, workspace: int, place: _Place) -> None: ...
def cuda_kept_rows_workspace(rows: int) -> int: ...
def cuda_kept_rows(
    mask: int, rows: int, ids: int, keep: int, kept_ids: int, count: int, workspace: int, place: _Place
) -> None: ...
def cuda_gather_rows(
    source: int,
    row_bytes: int,
    source_stride: int,
    index: int,
    counted: int,
    most: int,
    target: int,
    place: _Place,
) -> None: ...
def register_torch_types(tensor: type, parameter: type, decisions: type, statistics: type) -> bool: ...

# By position only. Whatever comes: None if the fast path does not take it.
def try_exit_step(
    x: object,
    means: object,
    scale: object,
    threshold: object,
    ids: object,
    out: object,
    center: object,
    statistics: object,
    rule: object,
    exit: object,
    packed: object,
    threads: int,
    /,
) -> tuple[Tensor, Tensor] | None: ...
def try_linear_step(
    x: object,
    weight: object,
    bias: object,
    threshold: object,
    ids: object,
    out: object,
    statistics: object,
    rule: object,
    exit: object,
    packed: object,
    threads: int,
    /,
) -> tuple[Tensor, Tensor] | None: ...
def try_decide(
    x: object,
    scores: object,
    threshold: object,
    ids: object,
    out: object,
    scale: object,
    rule: object,
    exit: object,
    threads: int,
    /,
) -> tuple[Tensor, Tensor] | None: ...
def build_info() -> dict[str, Any]: ...

class ThresholdSearch:
    def __init__(
        self, confidence: int, correct: int, rows: int, exits: int, stage_flops: int, head_flops: int
    ) -> None: ...
    def sort(self, first: int, count: int, threads: int) -> None: ...
    def search(
        self,
        first: int,
        count: int,
        targets: int,
        seed: int,
        thresholds: int,
        flops: int,
        accuracy: int,
        threads: int,
    ) -> None: ...
    def ascend(
        self, first: int, count: int, prices: int, thresholds: int, flops: int, accuracy: int, threads: int
    ) -> None: ...
    def replay(self, count: int, thresholds: int, flops: int, accuracy: int, threads: int) -> None: ...
