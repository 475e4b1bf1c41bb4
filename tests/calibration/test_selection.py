"""Exit selection: against all subsets of few exits, on records where the best set is known, and as a user sees it."""

import _thread
import dataclasses
import itertools
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fast_exits import fitted as by_fast_exits
from support.networks import bits_of, images, loader, net, net_in_stages
from support.records import random_record
from support.tensors import INF, generator, same_bits
from tqdm import tqdm

from e2cm_ext import Costs, EarlyExit, Record, fast_exit
from e2cm_ext.calibration import selection
from e2cm_ext.calibration.curves import Points, curve
from e2cm_ext.calibration.selection import mean_accuracy, select
from e2cm_ext.stages import stage_flops


def points_of(*points: tuple[float, float]) -> Points:
    flops, accuracy = torch.tensor(points, dtype=torch.float64).unbind(1)
    return Points(flops, accuracy, torch.zeros(len(points), 1))


# ---- what a set of exits is worth ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "budgets", "worth"),
    [
        ([(1.0, 0.9)], (0.0, 1.0), 0.45),  # the network for some, nothing for the others
        ([(0.5, 0.8), (1.0, 0.9)], (0.0, 1.0), 0.5 * 0.4 + 0.5 * 0.85),
        ([(0.5, 0.8), (1.0, 0.9)], (0.5, 1.0), 0.85),
        ([(0.5, 0.8), (1.0, 0.9)], (0.25, 0.75), (0.4 + 0.8) / 2 * 0.5 + (0.8 + 0.85) / 2 * 0.5),
        ([(0.5, 0.8)], (0.5, 2.0), 0.8),  # more is of no use
        ([(0.1, 0.01), (0.5, 0.8)], (0.0, 1.0), 0.5 * 0.4 + 0.5 * 0.8),  # nothing is better than the first
        ([(0.5, 0.8), (0.2, 0.9)], (0.0, 1.0), 0.2 * 0.45 + 0.8 * 0.9),
        ([(0.5, 0.0)], (0.0, 1.0), 0.0),
    ],
)
def test_mean_accuracy_by_hand(points, budgets, worth):
    assert mean_accuracy(points_of(*points), *budgets) == pytest.approx(worth, rel=1e-12)


share = st.integers(0, 20).map(lambda i: i / 20)


@given(st.lists(st.tuples(share, share), min_size=1, max_size=6), st.tuples(share, share).filter(lambda r: r[0] < r[1]))
def test_mean_accuracy_is_the_mean_of_the_best_mixtures(points, budgets):
    """Of two points each, or of one and nothing, at the middle of every small interval: exact, for lines."""
    low, high = budgets
    pairs = list(itertools.product([(0.0, 0.0), *points], repeat=2))
    steps = 20 * 40
    total = 0.0
    for i in range(round(low * steps), round(high * steps)):
        budget = (i + 0.5) / steps
        best = 0.0
        for (x, a), (y, b) in pairs:
            if y <= budget:
                best = max(best, b)
            elif x <= budget:
                best = max(best, a + (b - a) * (budget - x) / (y - x))
        total += best
    # Corners of the upper hull are points, which lie on the borders of the intervals.
    expected = total / (round(high * steps) - round(low * steps))
    assert mean_accuracy(points_of(*points), low, high) == pytest.approx(expected, abs=1e-9)


# ---- the search ------------------------------------------------------------------------------------------------------


def searched(record: Record, count: int | None, budgets: tuple[float, float] = (0.0, 1.0)) -> tuple[int, ...]:
    with tqdm(disable=True) as bar:
        return selection._SubsetSearch(record, budgets, bar).search(count)


SLACK = 1e-3  # the search looks at 21 prices, and `worth` at a whole curve: they may see another order


def worth(record: Record, exits, budgets=(0.0, 1.0)) -> float:
    """By the whole search, from the start."""
    return mean_accuracy(curve(record.at_exits(exits), targets=300, method="coordinate").front, *budgets)


def layered(rows: int, exits: int, seed: int) -> Record:
    """Like a network: samples have a difficulty, later exits master more of it; heads of all prices."""
    g = generator(seed)
    difficulty, skill = torch.rand(rows, 1, generator=g), torch.linspace(0.2, 0.95, exits + 1)
    skill = skill + 0.2 * (torch.rand(exits + 1, generator=g) - 0.5)
    margin = skill - difficulty + 0.1 * torch.randn(rows, exits + 1, generator=g)
    confidence = torch.sigmoid(8 * (margin + 0.1 * torch.randn(rows, exits + 1, generator=g)))
    costs = Costs(
        tuple(torch.randint(50, 1000, (exits + 1,), generator=g).tolist()),
        tuple(torch.randint(1, 300, (exits,), generator=g).tolist()),
        tuple(f"exit{j}" for j in range(exits)),
    )
    prediction = torch.where(margin > 0, 0, 1)
    return Record(confidence, prediction, torch.zeros(rows, dtype=torch.int64), costs)


@pytest.mark.parametrize("budgets", [(0.0, 1.0), (0.4, 0.8)])
@pytest.mark.parametrize("make", [layered, lambda rows, exits, seed: random_record(rows, exits, seed=seed)])
@pytest.mark.parametrize(("exits", "seed"), [(2, 0), (4, 1), (5, 2), (6, 3), (6, 4)])
def test_no_subset_is_better(make, exits, seed, budgets):
    record = make(600, exits, seed)
    every = {
        chosen: worth(record, chosen, budgets)
        for count in range(1, exits + 1)
        for chosen in itertools.combinations(range(exits), count)
    }
    for count in range(1, exits + 1):
        best = max(value for chosen, value in every.items() if len(chosen) == count)
        chosen = searched(record, count, budgets)
        assert len(chosen) == count
        assert every[chosen] >= best - SLACK
    best = max(every.values())
    enough = searched(record, None, budgets)
    assert every[enough] >= best - 0.001 - SLACK
    fewer = [value for chosen, value in every.items() if len(chosen) < len(enough)]
    assert not fewer or max(fewer) < best - 0.001 + SLACK


def test_of_copies_one_stays():
    record = layered(1000, 3, 5)
    record = dataclasses.replace(record, costs=Costs((100, 100, 100, 100), (1, 1, 1), record.names))
    twice = Record(
        record.confidence[:, [0, 0, 1, 1, 2, 2, 3]],
        record.prediction[:, [0, 0, 1, 1, 2, 2, 3]],
        record.label,
        Costs((100, 0, 100, 0, 100, 0, 100), (1,) * 6, tuple("aabbcc"[j] + str(j % 2) for j in range(6))),
    )
    assert {j // 2 for j in searched(twice, 3)} == {0, 1, 2}
    assert len(searched(twice, None)) <= 3


def test_a_head_that_costs_more_than_it_saves_goes():
    record = layered(1000, 4, 6)
    for dear in range(4):
        heads = tuple(2000 if j == dear else 1 for j in range(4))
        costly = dataclasses.replace(record, costs=Costs((100,) * 5, heads, record.names))
        assert dear not in searched(costly, 3)
        assert dear not in searched(costly, None)


def test_a_head_that_knows_nothing_goes():
    record = layered(1000, 4, 7)
    record = dataclasses.replace(record, costs=Costs((100,) * 5, (5,) * 4, record.names))
    for useless in range(4):
        record.prediction[:, useless], before = 1, record.prediction[:, useless].clone()
        assert useless not in searched(record, 3)
        record.prediction[:, useless] = before


def test_exits_that_never_fire_are_no_trouble():
    record = layered(300, 3, 8)
    record.confidence[:, :-1] = torch.nan
    assert len(searched(record, 2)) == 2
    assert len(searched(record, None)) == 1


# ---- what is reported ------------------------------------------------------------------------------------------------


def test_the_gain_is_measured_on_the_half_that_did_not_choose():
    record = layered(1000, 5, 9)
    found = select(record, 2)
    assert len(found.record) == 500
    # Spoil that half: the choice stays, the figures do not.
    score_with_rule = {tuple(row) for row in found.record.confidence.tolist()}
    columns = [*found.exits, record.exits]
    rows = torch.tensor([tuple(row) in score_with_rule for row in record.confidence[:, columns].tolist()])
    assert rows.sum() == 500
    spoiled = dataclasses.replace(record, prediction=torch.where(rows[:, None], 1, record.prediction))
    again = select(spoiled, 2)
    assert again.exits == found.exits
    assert same_bits(again.curve.front.thresholds.sort(0).values, found.curve.front.thresholds.sort(0).values)
    assert again.mean_accuracy == again.mean_accuracy_of_all == 0


def test_thresholds_that_were_found_are_not_lost(monkeypatch):
    """Whatever the whole search comes to."""
    record = layered(300, 5, 11)
    good = curve(record, method="coordinate")
    monkeypatch.setattr(selection.curves, "curve", lambda record, **options: curve(record, targets=1))
    found = selection._curve(record, good.front.thresholds, progress=False)
    assert found.names == record.names
    for flops, accuracy in zip(good.front.flops.tolist(), good.front.accuracy.tolist(), strict=True):
        assert found.at(flops).accuracy >= accuracy - 1e-12


def test_the_figures_are_those_of_the_curves():
    record = layered(2000, 5, 10)
    found = select(record, 3, flops=(0.2, 0.9))
    assert found.names == tuple(record.names[j] for j in found.exits) == found.record.names == found.curve.names
    assert found.curve_of_all.names == record.names
    assert found.mean_accuracy == mean_accuracy(found.curve.front, 0.2, 0.9)
    assert found.mean_accuracy_of_all == mean_accuracy(found.curve_of_all.front, 0.2, 0.9)
    for flops, accuracy, thresholds in zip(*found.curve.front, strict=True):
        replay = found.record.replay(thresholds)
        assert (replay.flops, replay.accuracy) == (float(flops), float(accuracy))
    lines = str(found).splitlines()
    assert lines[0] == "3 of 5 exits"
    assert [line.split()[0] for line in lines[2:6]] == [*found.names, "(end)"]
    assert lines[-2].startswith(f"mean accuracy over FLOPs 0.2 to 0.9: {found.mean_accuracy:.4f}, with all exits")
    assert lines[-1].startswith("(on 1000 samples")


def test_it_comes_out_the_same_every_time():
    record = random_record(500, 8)
    before = torch.get_rng_state()
    found = select(record)
    assert same_bits(torch.get_rng_state(), before)
    torch.manual_seed(77)
    torch.set_num_threads(2)
    again = select(record)
    assert again.exits == found.exits
    assert again.mean_accuracy == found.mean_accuracy


def test_ctrl_c_is_heard():
    record = random_record(8000, 28)
    pressed = []

    def press() -> None:
        pressed.append(time.perf_counter())
        _thread.interrupt_main()

    threading.Timer(0.5, press).start()
    with pytest.raises(KeyboardInterrupt):
        select(record, 5)
    assert time.perf_counter() - pressed[0] < 5


def test_progress(capfd):
    record = random_record(100, 3)
    select(record)
    assert capfd.readouterr() == ("", "")
    select(record, progress=True)
    assert "exit selection" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "`count` is 0; wanted a number of exits, 1 to 3, or None"),
        ({"count": 4}, "`count` is 4"),
        ({"count": True}, "`count` is True"),
        ({"flops": (0.5, 0.5)}, r"`flops` is \(0.5, 0.5\); wanted a range"),
        ({"flops": (-0.1, 0.5)}, "`flops`"),
        ({"flops": (0.0, INF)}, "`flops`"),
    ],
)
def test_what_cannot_be_chosen(options, message):
    with pytest.raises(ValueError, match=message):
        select(random_record(10, 3), **options)


@pytest.mark.parametrize(("rows", "exits"), [(1, 3), (0, 3), (10, 0)])
def test_records_without_a_choice(rows, exits):
    with pytest.raises(ValueError, match=f"`record` holds {rows} samples at {exits} exits"):
        select(random_record(rows, exits))


# ---- networks --------------------------------------------------------------------------------------------------------


def wrapped(model=None) -> EarlyExit:
    return EarlyExit(net() if model is None else model, loader()[0][0][:1]).fit(loader(), progress=False)


def test_a_network_with_some_of_its_exits(tmp_path):
    model = net()
    ee = wrapped(model)
    ee.thresholds = [0.3, 0.3, 0.3, 0.3]
    before, weights = bits_of(ee), bits_of(model)
    record = ee.record(loader(), progress=False)
    few = ee.at_exits(["block2", 0])
    assert few.exit_names == ("stem", "block2")
    assert few.thresholds.tolist() == [INF, INF]
    assert few.costs == record.at_exits(["stem", "block2"]).costs == cost_of(few)
    x = loader()[0][0]
    assert same_bits(few(x), model(x).log_softmax(1))
    own, part = few.record(loader(), progress=False), record.at_exits([0, 2])
    assert same_bits(own.confidence, part.confidence)
    assert torch.equal(own.prediction, part.prediction)
    # What is done to the new one does not show in the old one.
    few.thresholds = 0.3
    for buffer in few.heads.buffers():
        buffer.zero_()
    assert all(same_bits(value, before[name]) for name, value in bits_of(ee).items())
    assert all(same_bits(value, weights[name]) for name, value in bits_of(model).items())

    again = ee.at_exits([0, 1, 2]).at_exits(["block2"])
    again.save(tmp_path / "few")
    loaded = EarlyExit.load(tmp_path / "few", model)
    again.thresholds = loaded.thresholds = 0.3
    assert loaded.exit_names == ("block2",)
    assert same_bits(loaded(x), again(x))


def test_stages_by_hand_are_joined_too(tmp_path):
    stages = net_in_stages()
    few = EarlyExit(stages, images(1)).fit(loader(), progress=False).at_exits(["far"])
    few.thresholds = 0.3
    few.save(tmp_path / "few")
    assert few.exit_names == ("far",)
    assert same_bits(EarlyExit.load(tmp_path / "few", stages)(images(9)), few(images(9)))


def cost_of(ee: EarlyExit) -> Costs:
    """Counted, not summed."""
    return Costs(stage_flops(ee.stages, loader()[0][0]), tuple(head.flops() for head in ee.heads), ee.exit_names)


def test_select_makes_a_network_of_what_is_worth_it():
    ee = wrapped()
    record = ee.record(loader(300, seed=3), progress=False)
    few = ee.select(record, 2)
    assert few.exit_names == few.selection.names == select(record, 2).names
    assert len(few.heads) == 2 and len(ee.heads) == 4
    assert ee.selection is None
    assert ee.select(loader(300, seed=3), 2, progress=False).exit_names == few.exit_names
    point = few.calibrate(record.at_exits(few.exit_names), flops=0.8, progress=False)
    assert few.evaluate(loader(300, seed=3), progress=False).accuracy == pytest.approx(point.accuracy)
    point = few.calibrate(few.selection.curve, flops=0.8)
    assert few.selection.record.replay(few.thresholds).accuracy == point.accuracy


def test_exits_that_are_not_there():
    ee = wrapped()
    with pytest.raises(ValueError, match="`exits` is empty"):
        ee.at_exits([])
    with pytest.raises(ValueError, match="`exits` holds 'nowhere'; wanted names or numbers"):
        ee.at_exits(["nowhere"])
    with pytest.raises(ValueError, match="the record is of another network"):
        ee.select(random_record(10, 4))


def test_fast_exits_get_names():
    record = fast_exit.record(by_fast_exits(), loader(), progress=False)
    assert set(select(record, 2).names) < {"exit1", "exit2", "exit3"}
