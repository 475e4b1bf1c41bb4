"""The ops as operators of torch: opcheck, torch.compile, torch.export, fake tensors.

torch.compile(fullgraph=True) needs no flag for the number of survivors, which is known only at run time.
"""

import pytest
import torch
from support.tensors import (
    INF,
    NAN,
    assert_same_decisions,
    clusters,
    generator,
    laid_out,
    same_bits,
    sentinels,
    shuffled_ids,
)
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from e2cm_ext import Decisions, Statistics, ops

ROWS, CLASSES, SHAPE = 12, 6, (3, 4, 5)
ROOM = 15
LOOK = Statistics(mean=(2, 2), rms=(1, 1), max=(4, 5))
# A linear head that looks at them.
WEIGHT = torch.randn(CLASSES, LOOK.size(SHAPE), generator=generator(3)) / 10
BIAS = torch.arange(CLASSES) / 4
LAYOUTS = ("contiguous", "channels_last", "channels_last rows apart", "transposed")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def problem(rows=ROWS, layout="contiguous"):
    x, means, scale = clusters(rows, SHAPE, CLASSES)
    return laid_out(x, layout), means, scale


# ---- opcheck -------------------------------------------------------------------------------------


def operator(name):
    return getattr(torch.ops.e2cm_ext, name).default


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_distances_and_scores(layout):
    x, means, scale = problem(layout=layout)
    for center in (None, means.mean(0)):
        torch.library.opcheck(operator("class_distances"), (x, means, center))
        torch.library.opcheck(operator("class_scores"), (x, means, scale, center, None))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_statistics_and_heads_on_them(layout):
    x, _, scale = problem(layout=layout)
    numbers = list(LOOK.numbers)
    torch.library.opcheck(operator("statistics"), (x, numbers))
    torch.library.opcheck(operator("linear_scores"), (x, WEIGHT, BIAS, numbers))
    torch.library.opcheck(operator("class_scores"), (x, WEIGHT, scale, None, numbers))
    for threshold in (0.75, INF, -INF):
        rest = (torch.tensor(threshold), torch.arange(ROWS), *sentinels(ROOM, CLASSES))
        torch.library.opcheck(operator("linear_step"), (x, WEIGHT, BIAS, *rest, numbers, "confidence", 2))
        torch.library.opcheck(operator("exit_step"), (x, WEIGHT, scale, *rest, None, numbers, "entropy", 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0, 1, 2])
def test_opcheck_of_compact(layout, share):
    x, _, _ = problem(layout=layout)
    torch.library.opcheck(operator("compact"), (x, torch.arange(ROWS) % 2 < share))


# 0.75: some leave. INF: nobody; x must come back as a copy in the promised strides. -INF: everybody.
OPCHECKS = [(layout, threshold) for layout in LAYOUTS for threshold in (0.75, INF, -INF)]


@pytest.mark.parametrize(("layout", "threshold"), OPCHECKS)
def test_opcheck_of_exit_step(layout, threshold):
    x, means, scale = problem(layout=layout)
    for log_probs, rule in ((CLASSES, "confidence"), (None, "entropy")):
        limit = torch.tensor(threshold if rule == "confidence" else -threshold + 1.5)
        arguments = (x, means, scale, limit, torch.arange(ROWS), *sentinels(ROOM, log_probs), None, None, rule, 2)
        torch.library.opcheck(operator("exit_step"), arguments)


@pytest.mark.parametrize(("layout", "threshold"), OPCHECKS)
def test_opcheck_of_decide(layout, threshold):
    x, means, scale = problem(layout=layout)
    distances = ops.class_distances(x, means)
    for scores, divisor, log_probs in ((distances, scale, CLASSES), (-distances / scale, None, None)):
        limit = torch.tensor(threshold)
        arguments = (x, scores, limit, torch.arange(ROWS), *sentinels(ROOM, log_probs), divisor, "confidence", 2)
        torch.library.opcheck(operator("decide"), arguments)


def test_opcheck_of_empty_batches():
    x, means, scale = problem(rows=0)
    torch.library.opcheck(operator("class_scores"), (x, means, scale, None, None))
    torch.library.opcheck(operator("linear_scores"), (x, WEIGHT, BIAS, list(LOOK.numbers)))
    torch.library.opcheck(operator("compact"), (x, torch.zeros(0, dtype=torch.bool)))


def test_the_operators_answer_as_the_functions_do():
    x, means, scale = problem()
    for a, b in zip(
        operator("class_scores")(x, means, scale, None, None), ops.class_scores(x, means, scale), strict=True
    ):
        assert same_bits(a, b)
    one, other, ids = sentinels(ROOM, CLASSES), sentinels(ROOM, CLASSES), shuffled_ids(ROWS, ROOM)
    expected = ops.exit_step(x, means, scale, 0.75, ids, one, exit=4)
    got = operator("exit_step")(x, means, scale, torch.tensor(0.75), ids, *other, None, None, "confidence", 4)
    assert 0 < len(expected[1]) < ROWS
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    assert_same_decisions(other, one)


@pytest.mark.parametrize("op", ["exit_step", "linear_step", "decide"])
def test_an_operator_hands_back_no_input(op):
    """All survive: the function gives x itself, the operator must give a copy."""
    x, means, scale = problem()
    ids, out = torch.arange(ROWS), sentinels(ROOM, CLASSES)
    head = (x, ops.class_distances(x, means)) if op == "decide" else (x, means, scale)
    rest = (None, None) if op == "exit_step" else (None,)
    survivors, kept = operator(op)(*head, torch.tensor(INF), ids, *out, *rest, "confidence", 0)
    assert same_bits(survivors, x)
    assert survivors.data_ptr() != x.data_ptr()
    assert kept.data_ptr() != ids.data_ptr()


# ---- torch.compile -------------------------------------------------------------------------------


def distances_twice(x, means, scale, threshold, ids, out):
    return 2 * ops.class_distances(torch.relu(x), means, means.mean(0))


def scores_in_a_graph(x, means, scale, threshold, ids, out):
    scores = ops.class_scores(x + 0, means, scale)
    return scores.confidence * 2, scores.prediction + 1, scores.log_probs.exp()


def an_exit(x, means, scale, threshold, ids, out):
    x, ids = ops.exit_step(x * 1, means, scale, threshold, ids, out, rule="confidence", exit=3)
    return x * 2, ids


def two_exits(x, means, scale, threshold, ids, out):
    x, ids = ops.exit_step(x * 1, means, scale, threshold, ids, out, exit=0)
    x, ids = ops.exit_step(x * 0.9, means, scale, 0.5, ids, out, rule="entropy", exit=1)
    return x * 2, ids


def a_learned_exit(x, means, scale, threshold, ids, out):
    x, ids = ops.decide(x * 1, ops.class_distances(x, means), threshold, ids, out, scale=scale, exit=1)
    return x.sum((2, 3)), ids


def a_compaction(x, means, scale, threshold, ids, out):
    survivors, index = ops.compact(x * 1, ops.class_scores(x, means, scale).confidence <= threshold)
    return survivors + 1, ids[index]


def an_exit_that_looks_at_statistics(x, means, scale, threshold, ids, out):
    x, ids = ops.linear_step(torch.relu(x), WEIGHT, BIAS, threshold - 0.3, ids, out, LOOK, exit=1)
    return ops.statistics(x * 2, LOOK), ids


FUNCTIONS = [
    an_exit_that_looks_at_statistics,
    distances_twice,
    scores_in_a_graph,
    an_exit,
    two_exits,
    a_learned_exit,
    a_compaction,
]


def assert_same_results(compiled, function, rows, threshold, layout="contiguous", exact=True):
    x, means, scale = problem(rows, layout)
    ids, one, other = shuffled_ids(rows, rows + 3), sentinels(rows + 3, CLASSES), sentinels(rows + 3, CLASSES)
    got, expected = (f(x, means, scale, threshold, ids, o) for f, o in ((compiled, one), (function, other)))
    got, expected = ([r] if isinstance(r, torch.Tensor) else r for r in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a, b) if exact else torch.allclose(a, b)
        assert a.stride() == b.stride() or a.numel() == 0
    assert_same_decisions(one, other)
    return len(expected[-1])


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_whole_graph_equals_eager(function, dynamic):
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    counts = set()
    for rows, threshold, layout in [
        (ROWS, torch.tensor(0.75), "contiguous"),
        (ROWS, torch.tensor(0.65), "contiguous"),
        (ROWS, torch.tensor(INF), "contiguous"),
        (ROWS, torch.tensor(0.75), "channels_last"),
        (29, torch.tensor(0.75), "channels_last"),
        (17, torch.tensor(0.8), "contiguous"),
    ]:
        counts.add(assert_same_results(compiled, function, rows, threshold, layout))
    assert len(counts) > 2


@pytest.mark.parametrize("function", [an_exit, two_exits, a_learned_exit], ids=lambda f: f.__name__)
def test_all_samples_may_leave_inside_a_graph(function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_results(compiled, function, ROWS, torch.tensor(-INF))


def test_every_survivor_may_be_removed_by_compact():
    compiled = torch.compile(a_compaction, fullgraph=True, backend="aot_eager")
    assert assert_same_results(compiled, a_compaction, ROWS, torch.tensor(-INF)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_threshold_may_be_a_float(dynamic):
    compiled = torch.compile(a_learned_exit, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for threshold in (0.75, 0.65, INF):
        assert_same_results(compiled, a_learned_exit, ROWS, threshold)


def test_a_threshold_tensor_does_not_recompile():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(an_exit, fullgraph=True, backend=counter)
    for threshold in (0.6, 0.65, 0.7, 0.75, INF):  # and so another number of survivors every time
        assert_same_results(compiled, an_exit, ROWS, torch.tensor(threshold))
    assert counter.frame_count == 1


def test_sizes_become_dynamic_after_the_second():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(an_exit, fullgraph=True, backend=counter)
    for rows in (12, 13, 20, 31, 64):
        assert_same_results(compiled, an_exit, rows, torch.tensor(0.75))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_inductor():
    compiled = torch.compile(two_exits, fullgraph=True)
    for threshold, layout in ((0.75, "channels_last"), (0.65, "channels_last"), (INF, "channels_last")):
        assert_same_results(compiled, two_exits, ROWS, torch.tensor(threshold), layout, exact=False)


def test_transposed_features_inside_a_graph():
    """Everybody survives, in any strides: what the graph was told of them must be true."""

    def function(x, means, scale, threshold, ids, out):
        survivors, kept = ops.exit_step(x.transpose(0, 3).transpose(0, 3), means, scale, threshold, ids, out)
        return survivors.view(len(kept), -1), kept  # dense rows may be viewed

    x, means, scale = problem(layout="transposed")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, _ = compiled(x, means, scale, torch.tensor(INF), torch.arange(ROWS), sentinels(ROOM, CLASSES))
    assert torch.equal(got, x.reshape(ROWS, -1))


@pytest.mark.parametrize("mode", [None, True])
def test_errors_come_through_a_graph(mode):
    x, means, scale = problem()
    arguments = (x, means, scale, torch.tensor(NAN), torch.arange(ROWS), sentinels(ROOM, CLASSES))
    with pytest.raises(ValueError, match="`threshold` is NaN"):
        torch.compile(an_exit, fullgraph=True, dynamic=mode, backend="aot_eager")(*arguments)
    arguments = (x, means, scale, torch.tensor(-INF), torch.arange(ROWS) + 4, sentinels(ROOM, CLASSES))
    with pytest.raises(IndexError, match="`ids` holds 15 at place 11"):
        torch.compile(an_exit, fullgraph=True, dynamic=mode, backend="aot_eager")(*arguments)


# ---- torch.export --------------------------------------------------------------------------------


class Head(torch.nn.Module):
    def __init__(self, means, scale):
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("scale", scale)


class Scores(Head):
    def forward(self, x):
        return ops.class_scores(torch.relu(x), self.means, self.scale).log_probs


class Survivors(Head):
    def forward(self, x, ids, prediction, confidence, exited):
        out = Decisions(prediction, confidence, exited, None)
        return ops.exit_step(x * 1, self.means, self.scale, 0.75, ids, out)


def test_export():
    x, means, scale = problem()
    program = torch.export.export(Scores(means, scale), (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    for rows in (ROWS, 31):
        x, _, _ = problem(rows)
        assert same_bits(program.module()(x), Scores(means, scale)(x))


def test_export_of_a_number_of_survivors_known_at_run_time():
    x, means, scale = problem()
    head = Survivors(means, scale)
    program = torch.export.export(head, (x, torch.arange(ROWS), *Decisions.empty(ROWS)[:3]))
    one, other = Decisions.empty(ROWS), Decisions.empty(ROWS)
    got = program.module()(x, torch.arange(ROWS), *one[:3])
    expected = head(x, torch.arange(ROWS), *other[:3])
    assert 0 < len(expected[1]) < ROWS
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    assert_same_decisions(one, other)


# ---- fake tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors(layout, dtype):
    x, means, scale = problem(layout=layout)
    real = (x.to(dtype), means.to(dtype), scale)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x, means, scale = map(mode.from_tensor, real)
        ids, out = torch.arange(ROWS), Decisions.empty(ROOM, CLASSES)
        distances = ops.class_distances(x, means)
        scores = ops.class_scores(x, means, scale)
        statistics = ops.statistics(x, LOOK)
        weight = torch.empty(CLASSES, LOOK.size(SHAPE))
        linear = ops.linear_scores(x, weight, scale, LOOK)
        moved = [
            ops.exit_step(x, means, scale, 0.5, ids, out),
            ops.linear_step(x, weight, scale, 0.5, ids, out, LOOK),
            ops.decide(x, distances, 0.5, ids, out),
            ops.compact(x, ids > 3),
        ]
    assert (distances.shape, distances.dtype) == ((ROWS, CLASSES), torch.float32)
    assert (statistics.shape, statistics.dtype) == ((ROWS, LOOK.size(SHAPE)), torch.float32)
    assert [(t.shape, t.dtype) for t in linear] == [(t.shape, t.dtype) for t in scores]
    assert [t.dtype for t in scores] == [torch.float32, torch.int64, torch.float32]
    assert [tuple(t.shape) for t in scores] == [(ROWS,), (ROWS,), (ROWS, CLASSES)]
    for survivors, kept in moved:
        assert survivors.shape[1:] == SHAPE
        assert survivors.dtype is dtype
        assert survivors.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
        assert kept.dtype is torch.int64
        assert kept.dim() == 1
        assert not isinstance(kept.shape[0], int)  # unknown until it runs
