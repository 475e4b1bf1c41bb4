# Addresses are of a tensor's first element; 0 stands for "none". dtypes: 0 float32, 1 bfloat16, 2 float16.
# statistics: channels, height, width, channels_last; rows and columns of the grids of mean, rms and max.
from collections.abc import Sequence
from typing import Any

from torch import Tensor

def class_distances(
    x: int,
    x_dtype: int,
    rows: int,
    dim: int,
    x_stride: int,
    means: int,
    means_dtype: int,
    classes: int,
    center: int,
    packed: int,
    out: int,
    threads: int,
) -> None: ...
def packed_bytes(classes: int, dim: int) -> int: ...
def pack(vectors: int, dtype: int, classes: int, dim: int, center: int, packed: int, threads: int) -> None: ...
def sampled_hash(data: int, bytes: int) -> int: ...
def statistics(
    x: int,
    x_dtype: int,
    rows: int,
    dim: int,
    x_stride: int,
    statistics: Sequence[int],
    out: int,
    threads: int,
) -> None: ...
def class_scores(
    x: int,
    x_dtype: int,
    rows: int,
    dim: int,
    x_stride: int,
    means: int,
    means_dtype: int,
    classes: int,
    means_dim: int,
    center: int,
    packed: int,
    scale: int,
    confidence: int,
    prediction: int,
    log_probs: int,
    statistics: Sequence[int] | None,
    threads: int,
) -> None: ...
def linear_scores(
    x: int,
    x_dtype: int,
    rows: int,
    dim: int,
    x_stride: int,
    weight: int,
    weight_dtype: int,
    classes: int,
    weight_dim: int,
    packed: int,
    bias: int,
    confidence: int,
    prediction: int,
    log_probs: int,
    statistics: Sequence[int] | None,
    threads: int,
) -> None: ...
def exit_step(
    x: int,
    x_dtype: int,
    rows: int,
    dim: int,
    x_stride: int,
    means: int,
    means_dtype: int,
    classes: int,
    means_dim: int,
    center: int,
    packed: int,
    scale: int,
    rule: int,
    threshold: float,
    exit_number: int,
    ids: int,
    out_rows: int,
    confidence: int,
    prediction: int,
    exit: int,
    log_probs: int,
    keep: int,
    statistics: Sequence[int] | None,
    threads: int,
) -> int: ...
def linear_step(
    x: int,
    x_dtype: int,
    rows: int,
    dim: int,
    x_stride: int,
    weight: int,
    weight_dtype: int,
    classes: int,
    weight_dim: int,
    packed: int,
    bias: int,
    rule: int,
    threshold: float,
    exit_number: int,
    ids: int,
    out_rows: int,
    confidence: int,
    prediction: int,
    exit: int,
    log_probs: int,
    keep: int,
    statistics: Sequence[int] | None,
    threads: int,
) -> int: ...
def decide(
    scores: int,
    scores_dtype: int,
    rows: int,
    classes: int,
    scores_stride: int,
    scale: int,
    rule: int,
    threshold: float,
    exit_number: int,
    ids: int,
    out_rows: int,
    confidence: int,
    prediction: int,
    exit: int,
    log_probs: int,
    keep: int,
    threads: int,
) -> int: ...
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

# Only in a build with CUDA. place: device and stream. answers: rows; addresses of confidence, prediction, exit and
# log_probs. departure: rule, threshold, number of the exit; addresses of ids, stays, bad_ids; whether rows that do not
# stay are passed over.
_Answers = tuple[int, int, int, int, int]
_Departure = tuple[int, float, int, int, int, int, bool]

def cuda_exit_workspace(rows: int, classes: int, dim: int, statistics: Sequence[int] | None) -> int: ...
def cuda_exit(
    x: int,
    x_dtype: int,
    rows: int,
    dim: int,
    x_stride: int,
    statistics: Sequence[int] | None,
    vectors: int,
    classes: int,
    vectors_dim: int,
    squares: bool,
    center: int,
    per_class: int,
    distances: int,
    answers: _Answers,
    departure: _Departure | None,
    workspace: int,
    place: tuple[int, int],
) -> None: ...
def cuda_decide(
    scores: int,
    scores_dtype: int,
    rows: int,
    classes: int,
    scores_stride: int,
    scale: int,
    answers: _Answers,
    departure: _Departure | None,
    place: tuple[int, int],
) -> None: ...
def cuda_statistics_workspace(rows: int, statistics: Sequence[int]) -> int: ...
def cuda_statistics(
    x: int,
    x_dtype: int,
    rows: int,
    dim: int,
    x_stride: int,
    statistics: Sequence[int],
    out: int,
    workspace: int,
    place: tuple[int, int],
) -> None: ...
def cuda_kept_rows_workspace(rows: int) -> int: ...
def cuda_kept_rows(
    mask: int, rows: int, ids: int, keep: int, kept_ids: int, count: int, workspace: int, place: tuple[int, int]
) -> None: ...
def cuda_gather_rows(
    source: int,
    row_bytes: int,
    source_stride: int,
    index: int,
    counted: int,
    most: int,
    target: int,
    place: tuple[int, int],
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
