"""The table of the ops, and their operators in torch.library: what torch.compile and torch.export see."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cuda, eager, reference, validation
from .calls import Batch, Departure, HeadParams
from .eager import Op, run
from .types import Decisions, Statistics

# ---- shapes of the results ------------------------------------------------------------------------------------------


def _fake_statistics(x: Tensor, wanted: Sequence[int]) -> Tensor:
    return x.new_empty((x.shape[0], Statistics.of_numbers(wanted).size(x.shape[1:])), dtype=torch.float32)


def _fake_distances(x: Tensor, means: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], means.shape[0]), dtype=torch.float32)


def _fake_scores(x: Tensor, vectors: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:1]
    confidence, prediction = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.int64)
    return confidence, prediction, _fake_distances(x, vectors)


def _fake_survivors(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """As many rows of x, in its memory format, as will be known only at run time; and one number for each."""
    count = torch.library.get_ctx().new_dynamic_size()
    return _format_of(x).new_rows(count), x.new_empty((count,), dtype=torch.int64)


def _format_of(x: Tensor) -> Batch:
    """What Batch.new_rows must know of x. Asks nothing of the size of the batch, which may be unknown."""
    return Batch(x, -1, -1, -1, -1, validation.is_channels_last(x))


# ---- the table ------------------------------------------------------------------------------------------------------


def _decide_masked(x: Tensor, scores: Batch, scale: Tensor | None, departure: Departure, pending: Tensor) -> None:
    # Also on the CPU: the compiled module has it for CUDA alone.
    reference.decide_masked(x, pending=pending, scale=scale, **departure._asdict())


# Decisions, as parameters of an operator.
_OUT = ("prediction", "confidence", "exited", "log_probs")
_OUT_SCHEMA = "Tensor(a!) prediction, Tensor(b!) confidence, Tensor(c!) exited, Tensor(d!)? log_probs"

TABLE = (
    Op(
        "statistics",
        "(Tensor x, SymInt[] wanted) -> Tensor",
        resolve=validation.resolve_statistics,
        cpu=eager.statistics,
        cuda=cuda.statistics,
        reference=lambda x, input: reference.statistics(x, input.statistics),
        fake=_fake_statistics,
    ),
    Op(
        "class_distances",
        "(Tensor x, Tensor means, Tensor? center) -> Tensor",
        resolve=validation.resolve_distances,
        cpu=eager.class_distances,
        cuda=cuda.class_distances,
        reference=lambda x, input, head: reference.class_distances(x, head.vectors, head.center).float(),
        fake=_fake_distances,
    ),
    Op(
        "class_scores",
        "(Tensor x, Tensor means, Tensor scale, Tensor? center, SymInt[]? statistics) -> (Tensor, Tensor, Tensor)",
        resolve=validation.resolve_scores,
        cpu=eager.scores,
        cuda=cuda.scores,
        reference=lambda x, input, head: reference.class_scores(
            x, head.vectors, head.per_class, head.center, input.statistics
        ),
        fake=_fake_scores,
    ),
    Op(
        "linear_scores",
        "(Tensor x, Tensor weight, Tensor bias, SymInt[]? statistics) -> (Tensor, Tensor, Tensor)",
        resolve=validation.resolve_scores,
        cpu=eager.scores,
        cuda=cuda.scores,
        reference=lambda x, input, head: reference.linear_scores(x, head.vectors, head.per_class, input.statistics),
        fake=_fake_scores,
    ),
    Op(
        "exit_step",
        f"(Tensor x, Tensor means, Tensor scale, Tensor threshold, Tensor ids, {_OUT_SCHEMA}, Tensor? center, "
        "SymInt[]? statistics, str rule, SymInt exit) -> (Tensor, Tensor)",
        resolve=validation.resolve_step,
        cpu=eager.step,
        cuda=cuda.step,
        reference=lambda x, input, head, departure: reference.exit_step(
            x, head.vectors, head.per_class, center=head.center, statistics=input.statistics, **departure._asdict()
        ),
        fake=_fake_survivors,
    ),
    Op(
        "linear_step",
        f"(Tensor x, Tensor weight, Tensor bias, Tensor threshold, Tensor ids, {_OUT_SCHEMA}, SymInt[]? statistics, "
        "str rule, SymInt exit) -> (Tensor, Tensor)",
        resolve=validation.resolve_step,
        cpu=eager.step,
        cuda=cuda.step,
        reference=lambda x, input, head, departure: reference.linear_step(
            x, head.vectors, head.per_class, statistics=input.statistics, **departure._asdict()
        ),
        fake=_fake_survivors,
    ),
    Op(
        "decide",
        f"(Tensor x, Tensor scores, Tensor threshold, Tensor ids, {_OUT_SCHEMA}, Tensor? scale, str rule, SymInt exit) "
        "-> (Tensor, Tensor)",
        resolve=validation.resolve_decide,
        cpu=eager.decide,
        cuda=cuda.decide,
        reference=lambda x, f, scores, scale, departure: reference.decide(
            x, scores.tensor, scale=scale, **departure._asdict()
        ),
        fake=_fake_survivors,
    ),
    Op(
        "decide_masked",
        f"(Tensor scores, float threshold, Tensor(m!) pending, Tensor ids, {_OUT_SCHEMA}, Tensor? scale, str rule, "
        "SymInt exit) -> ()",
        resolve=validation.resolve_decide_masked,
        cpu=_decide_masked,
        cuda=cuda.decide_masked,
        reference=_decide_masked,
        fake=lambda *_: None,
    ),
    Op(
        "compact",
        "(Tensor x, Tensor keep) -> (Tensor, Tensor)",
        resolve=validation.resolve_compact,
        cpu=eager.compact,
        cuda=cuda.compact,
        reference=lambda x, f, keep: reference.compact(x, keep),
        fake=_fake_survivors,
    ),
)
OPS = {op.name: op for op in TABLE}


# ---- operators of torch: they take tensors and numbers alone, in the order of the schema ----------------------------

# Of each op: (type, name) of each parameter of its operator; the names of the arguments that its function takes.
_PARAMETERS = {op.name: [tuple(p.split()) for p in op.schema[1 : op.schema.index(") ->")].split(", ")] for op in TABLE}
_NAMES = {op.name: tuple(inspect.signature(op.resolve).parameters) for op in TABLE}


def call_operator(name: str, *arguments: Any) -> Any:
    """Calls the operator of an op with the arguments of its function."""
    values: dict[str, Any] = dict(zip(_NAMES[name], arguments, strict=True))
    if "head" in values:
        values |= values["head"].named()
    if "out" in values:
        values |= zip(_OUT, values["out"], strict=True)
    for key in ("statistics", "wanted"):
        if isinstance(values.get(key), Statistics):
            values[key] = values[key].numbers
    if ("Tensor", "threshold") in _PARAMETERS[name] and not isinstance(values["threshold"], Tensor):
        values["threshold"] = torch.tensor(values["threshold"], dtype=torch.float32)
    return OPERATORS[name](*[values[key] for _, key in _PARAMETERS[name]])


def _arguments(op: Op, operands: Sequence[Any]) -> list[Any]:
    """The arguments that call_operator was given."""
    values: dict[str, Any] = dict(zip((key for _, key in _PARAMETERS[op.name]), operands, strict=True))
    if "means" in values:
        values["head"] = HeadParams("distances", values["means"], values.get("scale"), values["center"])
    if "weight" in values:
        values["head"] = HeadParams("logits", values["weight"], values["bias"])
    if "prediction" in values:
        values["out"] = Decisions(*(values[key] for key in _OUT))
    for key in ("statistics", "wanted"):
        if values.get(key) is not None:
            values[key] = Statistics.of_numbers(values[key])
    return [values[key] for key in _NAMES[op.name]]


def _register(op: Op) -> Any:
    def operator(*operands: Any) -> Any:
        result = run(op, *_arguments(op, operands))
        if not isinstance(result, tuple):
            return result
        # An operator must not return its own inputs, which the function does when all samples survive.
        return tuple(_copy(t) if any(t is operand for operand in operands) else t for t in result)

    written = re.findall(r"!\)\??\s*(\w+)", op.schema)
    made = torch.library.custom_op(f"e2cm_ext::{op.name}", operator, mutates_args=written, schema=op.schema)
    made.register_fake(op.fake)
    return made


def _copy(x: Tensor) -> Tensor:
    return _format_of(x).new_rows(x.shape[0]).copy_(x)


OPERATORS = {op.name: _register(op) for op in TABLE}
