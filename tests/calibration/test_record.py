"""Records: what they accept, what a replay says against a loop over samples, files."""

import copy
import math
import pickle
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.records import random_record, records, replay_by_hand, small_record, thresholds_for
from support.tensors import INF, NAN, generator, same_bits, seeds

from e2cm_ext.calibration.record import Record
from e2cm_ext.stages.flops import Costs
from e2cm_ext.utils import serialization

# ---- replay ---------------------------------------------------------------------------------------------------------


@given(st.data())
def test_replay_is_a_loop_over_samples(data):
    record = data.draw(records())
    thresholds = data.draw(thresholds_for(record))
    exits, predictions, flops = replay_by_hand(record, thresholds)
    replay = record.replay(thresholds)
    assert replay.exit.tolist() == exits
    assert replay.prediction.tolist() == predictions
    assert replay.correct.tolist() == [p == y for p, y in zip(predictions, record.label.tolist(), strict=True)]
    assert replay.flops == pytest.approx(flops, rel=1e-12)
    assert replay.accuracy == sum(replay.correct.tolist()) / len(record)
    assert same_bits(replay.confidence, record.confidence[torch.arange(len(record)), replay.exit])


@pytest.mark.parametrize(
    ("thresholds", "exits", "flops", "accuracy"),
    [
        ([INF, INF], [2, 2, 2, 2], 1.0, 0.5),  # no head is computed
        ([INF, 0.8], [1, 2, 2, 1], (2 * 34 + 2 * 104) / 400, 0.25),  # above, strictly
        ([0.5, 0.5], [0, 1, 2, 1], (11 + 35 + 105 + 35) / 400, 0.75),
        ([-INF, INF], [0, 0, 0, 2], (3 * 11 + 101) / 400, 0.5),  # NaN never leaves
        ([2.0, 2.0], [2, 2, 2, 2], 1.05, 0.5),  # on, though nobody leaves
    ],
)
def test_replay_by_hand(thresholds, exits, flops, accuracy):
    replay = small_record().replay(thresholds)
    assert replay.exit.tolist() == exits
    assert replay.flops == pytest.approx(flops, rel=1e-14)
    assert replay.accuracy == accuracy


@given(st.data())
def test_flops_grow_with_every_threshold(data):
    """As long as it is below +inf: there the head is saved."""
    record = data.draw(records(exits=(1, 2, 3, 6)))
    thresholds = data.draw(thresholds_for(record)).clamp(max=3e38)
    j = data.draw(st.integers(0, record.exits - 1))
    higher = thresholds.clone()
    higher[j] = higher[j] + data.draw(st.floats(0, 5, width=32))
    assert record.replay(thresholds).flops <= record.replay(higher).flops + 1e-12


@given(records())
def test_exits_that_are_off_cost_exactly_nothing(record):
    replay = record.replay([INF] * record.exits)
    assert replay.flops == 1.0
    assert replay.accuracy == record.accuracy[-1]


def test_thresholds_are_compared_in_float32():
    """As the kernels do: 0.1 in float64 is below, in float32 above 0.1."""
    record = Record(
        torch.tensor([[0.1, 1.0]]), torch.zeros(1, 2).long(), torch.zeros(1).long(), Costs((1, 1), (1,), ("a",))
    )
    assert record.replay([0.1]).exit.tolist() == [1]
    assert record.replay(torch.tensor([0.1], dtype=torch.float64)).exit.tolist() == [1]
    assert record.replay([0.0999]).exit.tolist() == [0]
    assert record.replay([1e39]).flops == 1.0  # +inf in float32


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [([0.5], r"shape \[1\]; wanted \[2\]"), ([0.5, NAN], "NaN at exit 1"), ([[0.5, 0.5]], r"shape \[1, 2\]")],
)
def test_thresholds_that_make_no_sense(thresholds, message):
    with pytest.raises(ValueError, match=message):
        small_record().replay(thresholds)


def test_a_record_without_samples():
    record = small_record().part([])
    assert len(record) == 0
    replay = record.replay([0.5, 0.5])
    assert replay.exit.shape == replay.prediction.shape == (0,)
    assert math.isnan(replay.flops)
    assert math.isnan(replay.accuracy)
    assert record.accuracy.isnan().all()


# ---- fields ---------------------------------------------------------------------------------------------------------


def test_what_a_record_knows():
    record = small_record()
    assert len(record) == 4
    assert record.exits == 2
    assert record.names == ("a", "b")
    assert record.flops.tolist() == pytest.approx([0.11, 0.35, 1.05])
    assert record.accuracy.tolist() == [0.25, 0.25, 0.5]
    assert record.correct[0].tolist() == [True, False, False]
    assert repr(record) == "Record(4 samples, 2 exits, rule 'confidence')"
    for again in (copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
        assert same_bits(again.confidence, record.confidence)


def changed(**fields):
    record = small_record()
    old = {name: getattr(record, name) for name in ("confidence", "prediction", "label", "costs", "rule")}
    return Record(**{**old, **fields})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"confidence": torch.zeros(4, 2)}, ValueError, r"`confidence` has shape \[4, 2\]; wanted \[samples, 3\]"),
        ({"confidence": torch.zeros(4)}, ValueError, r"`confidence` has shape \[4\]"),
        ({"confidence": torch.zeros(4, 3).double()}, TypeError, "`confidence` is a torch.float64 tensor; wanted"),
        ({"confidence": [[0.5]]}, TypeError, "`confidence` is a list"),
        ({"prediction": torch.zeros(3, 3).long()}, ValueError, r"`prediction` has shape \[3, 3\]; wanted \[4, 3\]"),
        ({"prediction": torch.zeros(4, 3)}, TypeError, "`prediction` is a torch.float32 tensor; wanted torch.int64 or"),
        ({"label": torch.zeros(3).long()}, ValueError, r"`label` has shape \[3\]; wanted \[4\]"),
        ({"label": torch.zeros(4)}, TypeError, "`label` is a torch.float32 tensor"),
        ({"label": torch.tensor([0, 1, -1, 0])}, ValueError, "`label` holds -1 at sample 2"),
        ({"costs": (1, 2, 3)}, TypeError, "`costs` is a tuple; wanted Costs"),
        ({"rule": None}, TypeError, "`rule` is a NoneType"),
    ],
)  # fmt: skip
def test_fields_that_do_not_fit(fields, error, message):
    with pytest.raises(error, match=message):
        changed(**fields)


def test_any_strides_and_int32():
    record = small_record()
    other = changed(
        confidence=record.confidence.t().contiguous().t(), prediction=record.prediction.int(), label=record.label.int()
    )
    assert other.confidence.is_contiguous()
    assert other.label.dtype is torch.int64
    assert other.replay([0.5, 0.5]).prediction.dtype is torch.int64
    assert torch.equal(other.replay([0.5, 0.5]).prediction, record.replay([0.5, 0.5]).prediction)


def test_no_gradient_is_kept():
    assert not changed(confidence=torch.rand(4, 3, requires_grad=True) * 2).confidence.requires_grad


# ---- part, merge ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "rows"),
    [
        ([2, 0], [2, 0]),
        (torch.tensor([3, 3, -1]), [3, 3, 3]),
        (torch.tensor([True, False, True, False]), [0, 2]),
        ([False, True, True, True], [1, 2, 3]),
        (slice(1, 3), [1, 2]),
        ((), []),
        (range(2), [0, 1]),
    ],
)
def test_a_part_of_a_record(samples, rows):
    record = small_record()
    part = record.part(samples)
    assert same_bits(part.confidence, record.confidence[rows])
    assert torch.equal(part.prediction, record.prediction[rows])
    assert torch.equal(part.label, record.label[rows])
    assert part.costs == record.costs


@pytest.mark.parametrize("samples", [0, [0.5], [[0, 1]]])
def test_part_by_nonsense(samples):
    with pytest.raises(TypeError, match="`samples`"):
        small_record().part(samples)


def test_merged_parts_are_the_whole():
    record = random_record(50, 3, odd=0.1)
    merged = Record.merge(record.part(slice(i, i + 20)) for i in range(0, 60, 20))
    assert same_bits(merged.confidence, record.confidence)
    assert torch.equal(merged.prediction, record.prediction)
    assert torch.equal(merged.label, record.label)
    assert (merged.costs, merged.rule) == (record.costs, record.rule)


@pytest.mark.parametrize(
    "other",
    [
        {"rule": "entropy"},
        {"costs": Costs((10, 20, 71), (1, 4), ("a", "b"))},
        {"costs": Costs((10, 20, 70), (1, 4), ("a", "c"))},
    ],
)
def test_records_of_two_networks_do_not_merge(other):
    with pytest.raises(ValueError, match=f"record 1 has other {next(iter(other))} than record 0"):
        Record.merge([small_record(), changed(**other)])
    with pytest.raises(ValueError, match="`records` is empty"):
        Record.merge([])


# ---- some of the exits ----------------------------------------------------------------------------------------------


@given(st.data())
def test_a_record_at_some_exits_is_one_with_the_others_off(data):
    record = data.draw(records())
    kept = data.draw(st.lists(st.integers(0, record.exits - 1), unique=True) if record.exits else st.just([]))
    part = record.at_exits([record.names[j] if data.draw(st.booleans()) else j for j in kept])
    kept = sorted(kept)
    assert part.names == tuple(record.names[j] for j in kept)
    thresholds = data.draw(thresholds_for(record))
    off = torch.full_like(thresholds, INF)
    off[kept] = thresholds[kept]
    found, wanted = part.replay(thresholds[kept]), record.replay(off)
    assert found.exit.tolist() == [[*kept, record.exits].index(j) for j in wanted.exit.tolist()]
    assert torch.equal(found.prediction, wanted.prediction)
    assert same_bits(found.confidence, wanted.confidence)
    assert found.flops == pytest.approx(wanted.flops, rel=1e-12)


# ---- reliability ----------------------------------------------------------------------------------------------------


def answers(confidence: list[float], right: list[bool]) -> Record:
    """Of a network without exits."""
    label = torch.zeros(len(right), dtype=torch.int64)
    return Record(torch.tensor(confidence)[:, None], (~torch.tensor(right)).long()[:, None], label, Costs((1,), (), ()))


def test_reliability_by_hand():
    record = answers([0.0, 0.5, 0.625, 0.75, 1.0, NAN], [True, False, True, False, True, True])
    found = record.reliability([], bins=4)
    assert found.counts.tolist() == [1, 1, 2, 1]  # a border belongs to the bin below it
    assert found.confidence.tolist() == [0.0, 0.5, 0.6875, 1.0]
    assert found.accuracy.tolist() == [1.0, 0.0, 0.5, 1.0]
    assert found.ece == (1 * 1.0 + 1 * 0.5 + 2 * 0.1875 + 1 * 0.0) / 5
    assert record.part([]).reliability([]).counts.tolist() == [0] * 15
    assert math.isnan(record.part([]).reliability([]).ece)


@given(st.data(), st.sampled_from([1, 2, 10, 15]))
def test_reliability_in_exact_numbers(data, bins):
    """Also where confidences lie on a border, or as near to it as float32 can."""
    record = data.draw(records())
    steps = torch.randint(0, 31, record.confidence.shape, generator=generator(data.draw(seeds))) / 30
    confidence = steps.nextafter(torch.tensor(data.draw(st.sampled_from([0.0, 1.0])))).clamp(0, 1)
    record = Record(confidence, record.prediction, record.label, record.costs)
    thresholds = data.draw(thresholds_for(record))
    replay = record.replay(thresholds)
    rows = list(zip(map(Fraction, replay.confidence.tolist()), replay.correct.tolist(), strict=True))
    members = [[row for row in rows if Fraction(b, bins) < row[0] <= Fraction(b + 1, bins)] for b in range(bins)]
    members[0] += [row for row in rows if row[0] == 0]
    found = record.reliability(thresholds, bins)
    assert found.counts.tolist() == [len(each) for each in members]
    gaps = Fraction(0)
    for b, each in enumerate(members):
        if not each:
            assert math.isnan(found.confidence[b]) and math.isnan(found.accuracy[b])
            continue
        mean, right = (sum(map(Fraction, column)) / len(each) for column in zip(*each, strict=True))
        assert float(found.confidence[b]) == pytest.approx(float(mean), rel=1e-12)
        assert float(found.accuracy[b]) == pytest.approx(float(right), rel=1e-12)
        gaps += abs(mean - right) * len(each)
    assert found.ece == pytest.approx(float(gaps / len(record)), abs=1e-12)


def test_reliability_of_what_is_no_probability():
    with pytest.raises(ValueError, match="the rule 'entropy' compares, which is no probability"):
        changed(rule="entropy").reliability([0.5, 0.5])
    with pytest.raises(ValueError, match=r"`confidence` goes from -0\.5 to 0\.5 in this record"):
        answers([-0.5, 0.5], [True, False]).reliability([])
    with pytest.raises(ValueError, match="`bins` is 0; wanted a whole number"):
        small_record().reliability([0.5, 0.5], bins=0)


# ---- files ----------------------------------------------------------------------------------------------------------


@given(record=records(rows=(0, 1, 17)))
def test_a_file_brings_everything_back(record, tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "some.record"
    record.save(path)
    again = Record.load(path)
    for name in ("confidence", "prediction", "label"):
        assert same_bits(getattr(again, name), getattr(record, name))
    assert (again.costs, again.rule) == (record.costs, record.rule)
    assert [file.name for file in path.parent.iterdir()] == ["some.record"]


@pytest.mark.parametrize(
    "damage", ["half", "a byte short", "empty", "a byte more", "garbage", "altered", "another kind"]
)
def test_files_that_are_no_record(damage, tmp_path):
    path = tmp_path / "some.record"
    random_record(40, 3).save(path)
    data = path.read_bytes()
    altered = bytearray(data)
    altered[-100] ^= 1
    path.write_bytes(
        {
            "half": data[: len(data) // 2],
            "a byte short": data[:-1],
            "empty": b"",
            "a byte more": data + b"\0",
            "garbage": bytes(range(256)) * 4,
            "altered": bytes(altered),
            "another kind": data,
        }[damage]
    )
    if damage == "another kind":
        serialization.write(path, "something else", {"confidence": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Record.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Record.load(tmp_path / "nowhere")
