"""Good and wrong arguments of every op."""

from __future__ import annotations

import numpy as np
import torch

from e2cm_ext import Statistics, ops
from support.tensors import NAN, clusters, generator, sentinels

ROWS, CLASSES, SHAPE = 6, 4, (2, 3, 5)
DIM = 30


def good(flat: bool = False) -> dict:
    """Arguments that fit each other; `flat`: features in a row, contiguous float32, which is checked at one glance."""
    x, means, scale = clusters(ROWS, SHAPE, CLASSES)
    if flat:
        x, means = x.flatten(1), means.flatten(1)
    return {
        "x": x,
        "means": means,
        "scale": scale,
        "center": means.mean(0),
        "weight": means / 16,
        "bias": torch.arange(CLASSES) / 4,
        "statistics": None,
        "threshold": 0.5,
        "ids": torch.arange(ROWS),
        "out": sentinels(ROWS + 1, CLASSES),
        "scores": torch.randn(ROWS, CLASSES, generator=generator(1)),
        "keep": torch.arange(ROWS) % 2 == 0,
        "rule": "confidence",
        "exit": 0,
    }


TAKES = {
    "class_distances": ("x", "means", "center"),
    "class_scores": ("x", "means", "scale", "center", "statistics"),
    "exit_step": ("x", "means", "scale", "threshold", "ids", "out", "center", "statistics", "rule", "exit"),
    "linear_scores": ("x", "weight", "bias", "statistics"),
    "linear_step": ("x", "weight", "bias", "threshold", "ids", "out", "statistics", "rule", "exit"),
    "decide": ("x", "scores", "threshold", "ids", "out", "scale", "rule", "exit"),
    "compact": ("x", "keep"),
}


def call(op: str, arguments: dict):
    return getattr(ops, op)(**{name: arguments[name] for name in TAKES[op]})


def out_with(**changed):
    return lambda a: a["out"]._replace(**changed)


FLOATS = "wanted float32, bfloat16 or float16"
DECISIONS = "see Decisions.empty"
# argument, a bad value (or a function of the good ones), the error, and what it must say: all of these
WRONG = [
    ("x", None, TypeError, ["`x` is a NoneType", "wanted a tensor"]),
    ("x", np.zeros((ROWS, DIM), np.float32), TypeError, ["`x` is a ndarray", "wanted a tensor"]),
    ("x", [[1.0]], TypeError, ["`x` is a list", "wanted a tensor"]),
    ("x", torch.zeros(ROWS), ValueError, [f"`x` has shape [{ROWS}]", "wanted [batch, features ...]"]),
    ("x", torch.tensor(1.0), ValueError, ["`x` has shape []", "wanted [batch, features ...]"]),
    ("x", torch.zeros(ROWS, DIM).to_sparse(), TypeError, ["`x` has layout torch.sparse_coo", ".to_dense()"]),
    ("means", None, TypeError, ["`means` is a NoneType", "wanted a tensor [classes, ...]"]),
    ("means", 3.0, TypeError, ["`means` is a float", "wanted a tensor [classes, ...]"]),
    ("means", torch.zeros(CLASSES, DIM, dtype=torch.float64), TypeError, ["`means` is torch.float64", FLOATS]),
    ("means", torch.zeros(CLASSES, DIM, dtype=torch.int64), TypeError, ["`means` is torch.int64", FLOATS]),
    ("means", torch.zeros(CLASSES, DIM, dtype=torch.complex64), TypeError, ["`means` is torch.complex64", FLOATS]),
    ("means", torch.zeros(CLASSES, DIM, device="meta"), ValueError, ["`means` is on meta", "`x` on cpu"]),
    ("means", torch.zeros(0, DIM), ValueError, ["`means` has shape [0, 30]", "classes >= 1"]),
    ("means", torch.zeros(DIM), ValueError, ["`means` has shape [30]", "2, 3, 5]", "30 features in a row"]),
    ("means", torch.tensor(1.0), ValueError, ["`means` has shape []", "wanted [classes, ...]"]),
    ("means", torch.zeros(CLASSES, DIM - 1), ValueError, ["`means` has shape [4, 29]", "30 features in a row"]),
    ("means", torch.zeros(CLASSES, 3, 2, 5), ValueError, ["`means` has shape [4, 3, 2, 5]", "2, 3, 5]"]),
    ("means", torch.zeros(CLASSES, 2, 15), ValueError, ["`means` has shape [4, 2, 15]", "2, 3, 5]"]),
    ("center", "mean", TypeError, ["`center` is a str", "wanted a float32 tensor"]),
    ("center", torch.zeros(DIM, dtype=torch.int64), TypeError, ["`center` is a torch.int64 tensor", "float32"]),
    ("center", torch.zeros(DIM, device="meta"), ValueError, ["`center` is on meta", "`x` on cpu"]),
    ("center", torch.zeros(DIM + 1), ValueError, ["`center` has shape [31]", "[2, 3, 5]", "[30]"]),
    ("center", torch.zeros(1, DIM), ValueError, ["`center` has shape [1, 30]", "[2, 3, 5]", "[30]"]),
    ("center", torch.tensor(0.0), ValueError, ["`center` has shape []", "[30]"]),
    ("scale", [1.0] * CLASSES, TypeError, ["`scale` is a list", "wanted a float32 tensor [4]"]),
    ("scale", 1.0, TypeError, ["`scale` is a float", "wanted a float32 tensor [4]"]),
    ("scale", torch.ones(CLASSES, dtype=torch.int32), TypeError, ["`scale` is a torch.int32 tensor", "float32"]),
    ("scale", torch.ones(CLASSES, device="meta"), ValueError, ["`scale` is on meta", "`x` on cpu"]),
    ("scale", torch.ones(CLASSES + 1), ValueError, ["`scale` has shape [5]", "wanted [4]"]),
    ("scale", torch.ones(CLASSES, 1), ValueError, ["`scale` has shape [4, 1]", "wanted [4]"]),
    ("scale", torch.tensor(1.0), ValueError, ["`scale` has shape []", "wanted [4]"]),
    ("weight", None, TypeError, ["`weight` is a NoneType", "wanted a tensor [classes, ...]"]),
    ("weight", torch.zeros(CLASSES, DIM, dtype=torch.float64), TypeError, ["`weight` is torch.float64", FLOATS]),
    ("weight", torch.zeros(CLASSES, DIM, device="meta"), ValueError, ["`weight` is on meta", "`x` on cpu"]),
    ("weight", torch.zeros(0, DIM), ValueError, ["`weight` has shape [0, 30]", "classes >= 1"]),
    ("weight", torch.zeros(CLASSES, DIM - 1), ValueError, ["`weight` has shape [4, 29]", "30 features in a row"]),
    ("bias", [1.0] * CLASSES, TypeError, ["`bias` is a list", "wanted a float32 tensor [4]"]),
    ("bias", torch.ones(CLASSES, dtype=torch.int32), TypeError, ["`bias` is a torch.int32 tensor", "float32"]),
    ("bias", torch.ones(CLASSES + 1), ValueError, ["`bias` has shape [5]", "wanted [4]"]),
    ("bias", torch.ones(CLASSES, device="meta"), ValueError, ["`bias` is on meta", "`x` on cpu"]),
    ("statistics", (1, 1), TypeError, ["`statistics` is a tuple", "wanted e2cm_ext.Statistics"]),
    ("statistics", "rich", TypeError, ["`statistics` is a str", "wanted e2cm_ext.Statistics"]),
    ("statistics", Statistics(mean=(9, 1)), ValueError, ["`mean` is (9, 1)", "has a map of 3 x 5"]),
    ("threshold", None, TypeError, ["`threshold` is a NoneType", "wanted a number"]),
    ("threshold", "high", TypeError, ["`threshold` is a str", "wanted a number"]),
    ("threshold", [0.5], TypeError, ["`threshold` is a list", "wanted a number"]),
    ("threshold", 1j, TypeError, ["`threshold` is a complex", "wanted a number"]),
    ("threshold", NAN, ValueError, ["`threshold` is NaN", "wanted a number, or +-inf"]),
    ("threshold", torch.tensor(NAN), ValueError, ["`threshold` is NaN", "wanted a number"]),
    ("threshold", torch.tensor([0.5, 0.6]), ValueError, ["`threshold` has shape [2]", "wanted one number"]),
    ("threshold", torch.zeros(0), ValueError, ["`threshold` has shape [0]", "wanted one number"]),
    ("ids", None, TypeError, ["`ids` is a NoneType", "wanted an int64 tensor [6]"]),
    ("ids", list(range(ROWS)), TypeError, ["`ids` is a list", "wanted an int64 tensor [6]"]),
    ("ids", torch.arange(ROWS).int(), TypeError, ["`ids` is a torch.int32 tensor", "wanted an int64 tensor [6]"]),
    ("ids", torch.zeros(ROWS), TypeError, ["`ids` is a torch.float32 tensor", "wanted an int64 tensor [6]"]),
    ("ids", torch.arange(ROWS - 1), ValueError, ["`ids` has shape [5]", "wanted [6]"]),
    ("ids", torch.arange(ROWS)[:, None], ValueError, ["`ids` has shape [6, 1]", "wanted [6]"]),
    ("ids", torch.arange(ROWS, device="meta"), ValueError, ["`ids` is on meta", "`x` on cpu"]),
    ("out", None, TypeError, ["`out` is a NoneType", "wanted Decisions", DECISIONS]),
    ("out", (torch.zeros(3),), TypeError, ["`out` is a tuple", "wanted Decisions", DECISIONS]),
    ("out", (None,) * 4, TypeError, ["`out.prediction` is a NoneType", "wanted torch.int64", DECISIONS]),
    ("out", out_with(prediction=[0] * 7), TypeError, ["`out.prediction` is a list", "torch.int64", DECISIONS]),
    ("out", out_with(prediction=torch.zeros(7)), TypeError, ["`out.prediction` is a torch.float32 tensor", "int64"]),
    ("out", out_with(prediction=torch.zeros(7, 1).long()), ValueError, ["`out.prediction` has shape [7, 1]"]),
    ("out", out_with(confidence=None), TypeError, ["`out.confidence` is a NoneType", "wanted torch.float32"]),
    (
        "out",
        out_with(confidence=torch.zeros(7).double()),
        TypeError,
        ["`out.confidence` is a torch.float64", "float32"],
    ),
    ("out", out_with(confidence=torch.zeros(8)), ValueError, ["`out.confidence` has shape [8]", "wanted [7]"]),
    ("out", out_with(confidence=torch.zeros(())), ValueError, ["`out.confidence` has shape []", "wanted [7]"]),
    ("out", out_with(confidence=torch.zeros(7, device="meta")), ValueError, ["is on meta", "`x` on cpu"]),
    (
        "out",
        out_with(confidence=torch.zeros(7, 2)[:, 0]),
        ValueError,
        ["`out.confidence` is not contiguous", DECISIONS],
    ),
    ("out", out_with(confidence=torch.zeros(1).expand(7)), ValueError, ["`out.confidence` is not contiguous"]),
    ("out", out_with(exit=torch.zeros(7).int()), TypeError, ["`out.exit` is a torch.int32 tensor", "torch.int64"]),
    ("out", out_with(exit=torch.zeros(6).long()), ValueError, ["`out.exit` has shape [6]", "wanted [7]"]),
    ("out", out_with(log_probs=torch.zeros(7, 4).half()), TypeError, ["`out.log_probs` is a torch.float16", "float32"]),
    ("out", out_with(log_probs=torch.zeros(7, 5)), ValueError, ["`out.log_probs` has shape [7, 5]", "wanted [7, 4]"]),
    ("out", out_with(log_probs=torch.zeros(6, 4)), ValueError, ["`out.log_probs` has shape [6, 4]", "wanted [7, 4]"]),
    ("out", out_with(log_probs=torch.zeros(28)), ValueError, ["`out.log_probs` has shape [28]", "wanted [7, 4]"]),
    ("out", out_with(log_probs=torch.zeros(4, 7).t()), ValueError, ["`out.log_probs` is not contiguous", DECISIONS]),
    ("scores", None, TypeError, ["`scores` is a NoneType", "wanted a tensor"]),
    ("scores", torch.zeros(ROWS, CLASSES).double(), TypeError, ["`scores` is torch.float64", FLOATS]),
    ("scores", torch.zeros(ROWS, CLASSES).long(), TypeError, ["`scores` is torch.int64", FLOATS]),
    ("scores", torch.zeros(ROWS), ValueError, ["`scores` has shape [6]"]),
    ("scores", torch.zeros(ROWS, 2, 2), ValueError, ["`scores` has shape [6, 2, 2]", "wanted [6, classes]"]),
    ("scores", torch.zeros(ROWS + 1, CLASSES), ValueError, ["`scores` has shape [7, 4]", "wanted [6, classes]"]),
    ("scores", torch.zeros(ROWS, 0), ValueError, ["`scores` has shape [6, 0]", "wanted [6, classes]"]),
    ("scores", torch.zeros(ROWS, CLASSES, device="meta"), ValueError, ["`scores` is on meta", "`x` on cpu"]),
    ("keep", None, TypeError, ["`keep` is a NoneType", "wanted a bool tensor [6]"]),
    ("keep", [True] * ROWS, TypeError, ["`keep` is a list", "wanted a bool tensor [6]"]),
    ("keep", torch.arange(ROWS), TypeError, ["`keep` is a torch.int64 tensor", "wanted a bool tensor [6]"]),
    ("keep", torch.ones(ROWS, dtype=torch.uint8), TypeError, ["`keep` is a torch.uint8 tensor", "wanted a bool"]),
    ("keep", torch.ones(ROWS + 1).bool(), ValueError, ["`keep` has shape [7]", "wanted [6]"]),
    ("keep", torch.ones(ROWS, 1).bool(), ValueError, ["`keep` has shape [6, 1]", "wanted [6]"]),
    ("keep", torch.ones(ROWS, device="meta").bool(), ValueError, ["`keep` is on meta", "`x` on cpu"]),
    ("rule", "certainty", ValueError, ["`rule` is 'certainty'", "wanted one of 'confidence', 'entropy'"]),
    ("rule", None, ValueError, ["`rule` is None", "wanted one of 'confidence', 'entropy'"]),
    ("rule", 0, ValueError, ["`rule` is 0", "wanted one of 'confidence', 'entropy'"]),
]
WRONG_FEATURES = [
    ("x", torch.zeros(ROWS, *SHAPE, dtype=dtype), TypeError, [f"`x` is {dtype}", FLOATS, ".float()"])
    for dtype in (torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64)
]
SPARSE = [
    ("class_distances", "means", lambda a: a["means"].flatten(1).to_sparse()),
    ("class_distances", "means", lambda a: a["means"].flatten(1).to_sparse_csr()),
    ("class_distances", "center", lambda a: a["center"].flatten().to_sparse()),
    ("class_scores", "scale", lambda a: a["scale"].to_sparse()),
    ("exit_step", "ids", lambda a: a["ids"].to_sparse()),
    ("decide", "scores", lambda a: a["scores"].to_sparse()),
    ("compact", "keep", lambda a: a["keep"].to_sparse()),
    ("exit_step", "out", lambda a: a["out"]._replace(confidence=a["out"].confidence.to_sparse())),
]
