"""The threshold search against a slow twin, its hull against scipy, and what a curve answers."""

from __future__ import annotations

import _thread
import dataclasses
import itertools
import math
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.records import points_of, random_record, records, replay_by_hand, small_curve
from support.tensors import INF, NAN, same_bits, seeds
from torch import Tensor

from e2cm_ext.calibration import search
from e2cm_ext.calibration.curves import Curve, OperatingPoint, curve
from e2cm_ext.calibration.record import Record
from e2cm_ext.calibration.search import Points
from e2cm_ext.stages.flops import Costs

# ---- the twin: the same search, written to be read -------------------------------------------------------------------


def candidates(record: Record, exit: int) -> tuple[list[float], list[int]]:
    """Thresholds from +inf down, each letting one more value go; how many samples are above each."""
    certainties = [value + 0.0 for value in record.confidence[:, exit].tolist() if value > -INF]
    values = sorted(set(certainties), reverse=True)
    if not values:
        return [INF], [0]
    between = [halfway(low, high) for high, low in itertools.pairwise(values)]
    leavers = [sum(value >= last for value in certainties) for last in values]
    return [INF, *between, -INF], [0, *leavers]


def halfway(stays: float, leaves: float) -> float:
    middle = torch.tensor(0.5 * (stays + leaves), dtype=torch.float64).float().item()
    return middle if middle < leaves else stays


def random_number(seed: int, number: int, exit: int, most: int) -> int:
    def mixed(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    step = 0x9E3779B97F4A7C15
    stream = mixed((seed + step * (number + 1)) % 2**64)
    return (mixed((stream + step * (exit + 1)) % 2**64) >> 32) * (most + 1) >> 32


def twin(record: Record, number: int, targets: int, seed: int) -> list[float]:
    target = number / targets
    options = [candidates(record, j) for j in range(record.exits)]
    last = [len(thresholds) - 1 for thresholds, _ in options]
    at = []
    for j, (_, leavers) in enumerate(options):
        drawn = random_number(seed, number, j, leavers[-1])
        at.append(max(k for k, count in enumerate(leavers) if count <= drawn))

    def vector() -> list[float]:
        return [thresholds[k] for (thresholds, _), k in zip(options, at, strict=True)]

    def flops() -> float:
        return record.replay(vector()).flops

    def met() -> bool:
        return target - 0.0005 <= flops() <= target

    low, high, moved = [0] * record.exits, last.copy(), True
    while moved:
        moved = False
        for j in range(record.exits):
            if met():
                return vector()
            if flops() > target and at[j] < high[j]:
                low[j] = at[j] + 1
            elif flops() <= target and at[j] > low[j]:
                high[j] = at[j] - 1
            else:
                continue
            at[j] = (low[j] + high[j]) // 2
            moved = True

    for _ in range(2):
        before = at.copy()
        for j in range(record.exits):
            if met():
                return vector()
            costs = []
            for step in range(last[j] + 1):  # no binary search here
                at[j] = step
                costs.append(flops())
            at[j] = best_step(costs, target)
        if at == before:
            break
    return vector()


def best_step(costs: list[float], target: float) -> int:
    """The first of the most expensive within the target; if there are none, the cheaper of both ends."""
    within = [cost for cost in costs if cost <= target]
    if within:
        return costs.index(max(within))
    return 0 if costs[0] <= costs[-1] else len(costs) - 1


def searched(record: Record, targets: int, seed: int = 0) -> Points:
    found = search.Search(record)
    with search.progress_bar(False, "", 0) as bar:
        found.sort(bar)
        return found.search(targets, seed, bar)


@given(records(rows=(1, 2, 3, 5, 17, 65)), st.sampled_from([1, 4, 7]), st.integers(0, 2**64 - 1))
def test_the_search_finds_what_a_slow_search_finds(record, targets, seed):
    found = searched(record, targets, seed)
    assert len(found.flops) == targets + 1
    for number in range(targets + 1):
        assert found.thresholds[number].tolist() == twin(record, number, targets, seed)


@pytest.mark.slow
def test_the_search_finds_what_a_slow_search_finds_on_a_larger_record():
    record = random_record(600, 5, odd=0.01)
    found = searched(record, 8, 3)
    for number in range(9):
        assert found.thresholds[number].tolist() == twin(record, number, 8, 3)


@given(records(), seeds)
def test_every_point_is_what_a_replay_says(record, seed):
    found = searched(record, 9, seed)
    for flops, accuracy, thresholds in zip(*found, strict=True):
        replay = record.replay(thresholds)
        assert float(flops) == replay.flops  # to the last bit
        assert float(accuracy) == replay.accuracy
        assert replay.flops == pytest.approx(replay_by_hand(record, thresholds)[2], rel=1e-12)


# ---- what the search promises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [False, True])
def test_targets_are_met(heads):
    record = random_record(6000, 8, heads=heads)
    found = searched(record, 100)
    targets = torch.arange(101, dtype=torch.float64) / 100
    least = record.replay([-INF] + [INF] * 7).flops
    cheap = targets < least
    assert (found.flops[cheap] == least).all()
    assert (found.flops <= targets)[~cheap].all()
    assert (found.flops >= targets - 0.0005)[~cheap].all()


@given(records(rows=(3, 17, 65, 130), exits=(1,)))
def test_with_one_exit_the_curve_is_the_true_hull(record):
    """Of all thresholds there are, since every one of them is the best answer to some target."""
    record = dataclasses.replace(record, costs=Costs((100, 100), (7,), ("a",)))
    replays = [(t, record.replay([t])) for t in candidates(record, 0)[0]]
    every = Points(
        *torch.tensor([[r.flops, r.accuracy] for _, r in replays], dtype=torch.float64).unbind(1),
        torch.tensor([[t] for t, _ in replays]),
    )
    every = every.pick(every.flops <= 1)  # dearer ones are no target's answer
    front = every.pick(search.pareto_front(every))
    hull = front.pick(search.hull(front))
    found = curve(record, targets=1000, method="paper")
    assert found.flops.tolist() == hull.flops.tolist()
    assert found.accuracy.tolist() == hull.accuracy.tolist()


@given(records())
def test_a_curve_ends_at_least_as_accurate_as_the_base_network(record):
    found = curve(record, targets=20)
    assert found.base_accuracy == record.accuracy[-1]
    assert found.at(1.0).accuracy >= found.base_accuracy
    assert found.at(9.0).accuracy == found.front.accuracy.max()
    first = record.replay([-INF] * min(1, record.exits) + [INF] * (record.exits - 1))
    assert found.flops[0] <= min(1.0, first.flops)


def test_full_flops_are_the_base_network_where_it_is_best():
    record = random_record(3000, 4)
    record.prediction[:, -1] = record.label
    found = curve(record, targets=50, method="paper")
    assert found.at(1.0).accuracy == found.base_accuracy == record.accuracy[-1]
    assert found.at(1.0).flops == 1.0
    assert found.at(1.0).thresholds.tolist() == [INF] * 4


def test_a_record_where_no_sample_can_leave():
    record = random_record(20, 3)
    record.confidence[:, :-1] = NAN
    found = curve(record, targets=10)
    assert (found.flops.tolist(), found.thresholds.tolist()) == ([1.0], [[INF] * 3])
    with pytest.raises(ValueError, match="the cheapest there is costs 1 of the base network"):
        found.at(0.99)


def test_a_curve_without_exits_is_the_base_network():
    record = random_record(20, 0)
    found = curve(record, targets=10)
    assert found.flops.tolist() == [1.0]
    assert found.accuracy.tolist() == record.accuracy.tolist()
    assert found.thresholds.shape == (1, 0)
    assert found.on(record).flops.tolist() == [1.0]


def test_a_curve_needs_samples():
    empty = random_record(0, 2)
    with pytest.raises(ValueError, match="`record` holds no samples"):
        curve(empty)
    with pytest.raises(ValueError, match="`record` holds no samples"):
        curve(random_record(5, 2), targets=1).on(empty)


@pytest.mark.parametrize("targets", [0, -1, True, 1.5, 2**31, "many"])
def test_targets_that_make_no_sense(targets):
    with pytest.raises(ValueError, match="`targets` is"):
        curve(random_record(5, 2), targets=targets)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, None, True])
def test_seeds_that_make_no_sense(seed):
    with pytest.raises(ValueError, match="`seed` is"):
        curve(random_record(5, 2), seed=seed)


# ---- coordinate ascent -----------------------------------------------------------------------------------------------


def ascended(record: Record, starts: Tensor) -> Points:
    found = search.Search(record)
    with search.progress_bar(False, "", 0) as bar:
        found.sort(bar)
        return found.ascend(starts, bar)


@given(records(rows=(1, 2, 5, 17), exits=(0, 1, 3)), st.data())
def test_no_single_threshold_can_be_improved(record, data):
    prices = 6
    steps = [
        [data.draw(st.sampled_from(candidates(record, j)[0])) for j in range(record.exits)] for _ in range(prices + 1)
    ]
    starts = torch.tensor(steps, dtype=torch.float32).reshape(prices + 1, record.exits)
    found = ascended(record, starts)
    for price, (start, thresholds) in enumerate(zip(starts, found.thresholds, strict=True)):

        def value(vector: Tensor, price: int = price) -> float:
            replay = record.replay(vector)
            return (prices - price) * replay.accuracy - price * replay.flops

        reached = value(thresholds)
        assert (found.accuracy[price], found.flops[price]) == record.replay(thresholds)[:3:-1]
        assert reached >= value(start) - 1e-9
        for j in range(record.exits):
            for other in candidates(record, j)[0]:
                changed = thresholds.clone()
                changed[j] = other
                assert value(changed) <= reached + 1e-9


def test_coordinate_search_finds_what_pays():
    """Exit 0 is right whenever it is sure, exit 1 never: the first may be used, the second has to be off."""
    sure = torch.arange(1000) % 2 == 0
    label = torch.zeros(1000, dtype=torch.int64)
    record = Record(
        torch.stack([sure * 0.5 + torch.linspace(0.1, 0.4, 1000), torch.linspace(0, 1, 1000), torch.ones(1000)], 1),
        torch.stack([(~sure).long(), torch.ones_like(label), label], 1),
        label,
        Costs((100, 100, 800), (0, 0), ("a", "b")),
    )
    found = curve(record, targets=100, method="coordinate")
    assert (found.flops[0], found.flops[-1]) == (0.1, 0.55)
    assert (found.accuracy[0], found.accuracy[-1]) == (0.5, 1.0)
    assert found.within(accuracy_drop=0).thresholds[1] == INF
    assert found.at(0.325).accuracy == pytest.approx(0.75)


@given(records(), seeds)
def test_coordinate_search_is_never_worse(record, seed):
    """On the record that it has seen."""
    paper = curve(record, targets=15, seed=seed, method="paper")
    ours = curve(record, targets=15, seed=seed, method="coordinate")
    assert ours.flops[0] <= paper.flops[0]
    for flops, accuracy in zip(paper.front.flops.tolist(), paper.front.accuracy.tolist(), strict=True):
        assert ours.best_within(flops).accuracy >= accuracy
    for flops, accuracy, thresholds in zip(*ours.front, strict=True):
        assert (record.replay(thresholds).flops, record.replay(thresholds).accuracy) == (flops, accuracy)


def test_coordinate_search_pays_on_other_samples_too():
    record = random_record(8000, 6)
    seen, unseen = record.part(slice(4000)), record.part(slice(4000, None))
    paper, ours = (curve(seen, method=method).on(unseen) for method in ("paper", "coordinate"))
    budgets = [0.2, 0.3, 0.4, 0.5, 0.6]
    gains = [ours.at(f).accuracy - paper.at(f).accuracy for f in budgets]
    assert sum(gains) / len(gains) > 0.005, gains


@pytest.mark.parametrize(("rows", "method"), [(89, "paper"), (90, "coordinate")])
def test_the_search_that_is_taken_if_none_is_asked_for(rows, method):
    record = random_record(rows, 3)
    found, wanted, other = (curve(record, method=m) for m in ("auto", method, "coordinate" if rows < 90 else "paper"))
    assert same_points(found.front, wanted.front)
    assert len(found.front.flops) != len(other.front.flops) or not same_points(found.front, other.front)
    assert same_points(curve(record).front, found.front)


@pytest.mark.parametrize("method", ["best", None, ["paper"]])
def test_methods_that_do_not_exist(method):
    with pytest.raises(ValueError, match="`method` is"):
        curve(random_record(5, 2), method=method)


# ---- the same bits ---------------------------------------------------------------------------------------------------


def same_points(a: Points, b: Points) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads):
    record = random_record(3000, 6, odd=0.02)
    torch.set_num_threads(2)
    expected = searched(record, 60)
    torch.set_num_threads(threads)
    assert same_points(searched(record, 60), expected)
    starts = expected.thresholds[:9]
    several = ascended(record, starts)
    torch.set_num_threads(1)
    assert same_points(ascended(record, starts), several)


def test_a_target_does_not_depend_on_its_piece(monkeypatch):
    record = random_record(500, 4)
    expected = searched(record, 30)
    monkeypatch.setattr(search, "_CALL_SECONDS", 0.0)  # as few at a time as there are threads
    assert same_points(searched(record, 30), expected)


def test_seeds_matter_and_nothing_else_does():
    record = random_record(500, 4)
    state = torch.get_rng_state()
    first = searched(record, 20)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    again = searched(record, 20)
    assert curve(record, targets=5).thresholds.device.type == "cpu"
    torch.set_default_device(None)
    assert same_points(first, again)
    assert not same_points(first, searched(record, 20, seed=1))


def test_known_numbers():
    """The random numbers are part of the result: they must be the same on every machine and in every version."""
    assert [random_number(0, 0, 0, 10**6), random_number(7, 123, 4, 10**6)] == [652449, 111426]


# ---- hull ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40), st.booleans())
def test_hull_against_scipy(pairs, spread):
    spatial = pytest.importorskip("scipy.spatial")
    scale = 31.0 if spread else 32.0  # thirty-firsts are rounded, thirty-seconds are not
    x, y = (torch.tensor(column, dtype=torch.float64) / scale for column in zip(*pairs, strict=True))
    points = Points(x, y, torch.zeros(len(x), 0))
    front = points.pick(search.pareto_front(points))
    corners = front.pick(search.hull(front))
    assert all(a < b for a, b in itertools.pairwise(corners.flops.tolist()))
    assert all(a < b for a, b in itertools.pairwise(corners.accuracy.tolist()))
    # Closed by the two corners below, the region under the curve is the convex hull of the points and their shadows.
    shadows = torch.tensor(
        [[2.0, -1.0], [-1.0, -1.0], [2.0, float(y.max())], [float(x.min()), -1.0]], dtype=torch.float64
    )
    below = torch.cat([torch.stack([x, y], 1), shadows])
    area = spatial.ConvexHull(below[below[:, 0] >= x.min()].numpy()).volume
    outline_x = [*corners.flops.tolist(), 2.0]
    outline_y = [*corners.accuracy.tolist(), float(corners.accuracy[-1])]
    trapezoids = sum(
        (b - a) * ((p + q) / 2 + 1)
        for (a, b), (p, q) in zip(itertools.pairwise(outline_x), itertools.pairwise(outline_y), strict=True)
    )
    assert trapezoids == pytest.approx(area, rel=1e-9)


def test_front_and_hull_by_hand():
    points = points_of((0.5, 0.5), (0.2, 0.3), (0.2, 0.4), (0.3, 0.42), (0.6, 0.5), (0.8, 0.9), (1.0, 0.9), (0.4, 0.41))
    front = points.pick(search.pareto_front(points))
    assert front.thresholds[:, 0].tolist() == [2, 3, 0, 5]
    assert front.pick(search.hull(front)).thresholds[:, 0].tolist() == [2, 5]
    on_a_line = points_of((0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (1.0, 1.0))
    assert search.hull(on_a_line) == [0, 3]


# ---- what a curve answers --------------------------------------------------------------------------------------------


def number(point: OperatingPoint) -> float:
    return point.thresholds.item()


def test_time_sharing_by_hand():
    point = small_curve().at(0.25)
    assert (point.flops, number(point), number(point.other)) == (0.25, 0, 1)
    assert point.probability == pytest.approx(0.75)  # .75 * .2 + .25 * .4 = .25
    assert point.accuracy == pytest.approx(0.75 * 0.5 + 0.25 * 0.8)
    point = small_curve().at(0.85)
    assert (number(point), number(point.other)) == (1, 3)
    assert point.probability == pytest.approx(0.25)
    assert point.accuracy == pytest.approx(0.25 * 0.8 + 0.75 * 0.9)
    assert str(point) == (
        "accuracy 0.8750 at FLOPs 0.8500: 25.0% of the samples by one threshold vector, "
        "the others by (accuracy 0.9000 at FLOPs 1.0000)"
    )


@pytest.mark.parametrize(("flops", "which"), [(0.2, 0), (0.4, 1), (1.0, 3), (1.01, 3), (INF, 3)])
def test_corners_need_no_time_sharing(flops, which):
    point = small_curve().at(flops)
    assert number(point) == which
    assert (point.probability, point.other) == (1.0, None)
    assert str(point) == f"accuracy {point.accuracy:.4f} at FLOPs {point.flops:.4f}"


@pytest.mark.parametrize("ask", ["at", "best_within"])
def test_budgets_that_cannot_be_met(ask):
    with pytest.raises(ValueError, match=r"`flops` is 0.19; the cheapest there is costs 0.2 .* \(accuracy 0.5000\)"):
        getattr(small_curve(), ask)(0.19)
    with pytest.raises(ValueError, match="`flops` is NaN"):
        getattr(small_curve(), ask)(NAN)


@given(records(exits=(1, 2, 3)), st.floats(0, 1.2))
def test_time_sharing_keeps_to_the_budget_and_gains_by_it(record, flops):
    found = curve(record, targets=20)
    if flops < found.flops[0]:
        return
    point, single = found.at(flops), found.best_within(flops)
    assert point.flops <= flops
    assert single.flops <= flops
    assert point.accuracy >= single.accuracy - 1e-12
    if point.other is not None:
        assert point.flops == flops
        assert 0 < point.probability < 1
        first, second = record.replay(point.thresholds), record.replay(point.other.thresholds)
        assert point.probability * first.flops + (1 - point.probability) * second.flops == pytest.approx(flops)
        assert point.probability * first.accuracy + (1 - point.probability) * second.accuracy == pytest.approx(
            point.accuracy
        )
        assert first.flops < flops  # so that whoever knows no time sharing stays within the budget


@pytest.mark.parametrize(
    ("flops", "which"), [(0.2, 0), (0.39, 0), (0.4, 1), (0.59, 1), (0.6, 2), (0.99, 2), (1, 3), (5, 3)]
)
def test_best_single_vector_within_a_budget(flops, which):
    point = small_curve().best_within(flops=flops)
    assert number(point) == which
    assert point.other is None


@pytest.mark.parametrize(
    ("drop", "which"), [(0, 3), (0.0799, 3), (0.9 - 0.82, 2), (0.1, 1), (0.3999, 1), (0.4, 0), (1, 0)]
)
def test_cheapest_within_a_drop_of_accuracy(drop, which):
    assert number(small_curve().within(accuracy_drop=drop)) == which


def test_drops_that_cannot_be():
    with pytest.raises(ValueError, match=r"`accuracy_drop` is -0.1; the least on this curve is 0 \(accuracy 0.9000"):
        small_curve().within(-0.1)
    with pytest.raises(ValueError, match="`accuracy_drop` is NaN"):
        small_curve().within(NAN)


def test_points_are_their_own():
    """Writing into a point's thresholds leaves the curve as it was."""
    found = small_curve()
    found.at(0.4).thresholds.fill_(77)
    assert number(found.at(0.4)) == 1


def test_a_curve_prints_as_a_table():
    found = curve(random_record(200, 3), targets=10)
    lines = str(found).splitlines()
    assert len(lines) == len(found.flops) + 2
    assert lines[0].split() == ["FLOPs", "accuracy", "of", "base", "exits", "on"]
    assert lines[-1] == f"base network: accuracy {found.base_accuracy:.4f} at FLOPs 1"
    cells = lines[1].split()
    assert [float(cell) for cell in cells[:2]] == pytest.approx(
        [float(found.flops[0]), float(found.accuracy[0])], abs=1e-4
    )
    assert int(cells[3]) == int(found.thresholds[0].isfinite().sum() + found.thresholds[0].isneginf().sum())
    assert repr(small_curve()) == "Curve(3 points, FLOPs 0.2000 to 1.0000, accuracy 0.5000 to 0.9000, base 0.9000)"


# ---- on another record -----------------------------------------------------------------------------------------------


@given(records(rows=(17, 65), exits=(0, 1, 3)), seeds)
def test_on_another_record(record, seed):
    found = curve(record, targets=15)
    other = random_record(40, record.exits, seed=seed, odd=0.1)
    there = found.on(other)
    for before, after in ((found, there), (found.front, there.front)):
        assert sorted(before.thresholds.tolist()) == sorted(after.thresholds.tolist())
        assert all(a <= b for a, b in itertools.pairwise(after.flops.tolist()))
        for flops, accuracy, thresholds in zip(after.flops, after.accuracy, after.thresholds, strict=True):
            replay = other.replay(thresholds)
            assert (float(flops), float(accuracy)) == (replay.flops, replay.accuracy)
    assert there.base_accuracy == other.accuracy[-1]


def test_on_the_same_record_nothing_changes():
    record = random_record(300, 4)
    found = curve(record, targets=30)
    again = found.on(record)
    assert same_points(found.front, again.front)
    assert same_bits(found.thresholds, again.thresholds)


def test_where_the_curve_is_no_hull():
    """After a replay a dearer point may be less accurate: the best within a budget is then a cheaper one."""
    points = points_of((0.2, 0.5), (0.4, 0.8), (0.6, 0.7))
    replayed = Curve(*points, base_accuracy=0.9, names=("a",), rule="confidence", front=points)
    assert number(replayed.best_within(0.7)) == 1
    assert number(replayed.within(0.15)) == 1
    assert replayed.at(0.5).accuracy == pytest.approx(0.75)
    with pytest.raises(ValueError, match=r"the least on this curve is 0\.1 "):
        replayed.within(0.05)


def test_on_a_record_of_another_network():
    found = curve(random_record(20, 3), targets=3)
    with pytest.raises(ValueError, match="`record` has rule 'confidence' and exits exit0, exit1; the curve has"):
        found.on(random_record(20, 2))


# ---- as a user sees it -----------------------------------------------------------------------------------------------


def test_progress(capfd):
    record = random_record(100, 3)
    found = curve(record, targets=40)
    found.on(record)
    assert capfd.readouterr() == ("", "")
    curve(record, targets=40, progress=True)
    assert "threshold search" in capfd.readouterr().err
    found.on(record, progress=True)
    assert "replay" in capfd.readouterr().err


def test_ctrl_c_is_heard_within_a_second():
    record = random_record(20_000, 10)
    pressed = []

    def press() -> None:
        pressed.append(time.perf_counter())
        _thread.interrupt_main()

    timer = threading.Timer(0.5, press)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        curve(record, targets=10_000_000, progress=False)
    assert pressed
    assert time.perf_counter() - pressed[0] < 5  # a second or less on a machine with nothing else to do
    assert len(curve(record, targets=2).flops)


def test_others_run_while_it_searches():
    """The native part lets go of the interpreter."""
    record = random_record(20_000, 10)
    beats, done = 0, threading.Event()

    def search() -> None:
        try:
            curve(record, targets=200)
        finally:
            done.set()

    thread = threading.Thread(target=search)
    thread.start()
    while not done.wait(0.001):
        beats += 1
    thread.join()
    assert beats > 5


def test_the_search_takes_seconds_on_a_large_record():
    """Generous: on two idle cores all 1001 targets take two seconds."""
    record = random_record(50_000, 28)
    start = time.perf_counter()
    found = curve(record, targets=50, method="paper")
    assert time.perf_counter() - start < 10
    assert math.isfinite(float(found.accuracy.sum()))


def test_thresholds_keep_away_from_the_values():
    """Certainties that change by less than their distances do not change a decision."""
    record = random_record(300, 3)
    point = curve(record, targets=50).best_within(0.5)
    moved = Record(record.confidence * (1 + 1e-7), record.prediction, record.label, record.costs, record.rule)
    assert not same_bits(moved.confidence, record.confidence)
    assert record.replay(point.thresholds).flops == moved.replay(point.thresholds).flops


def test_decisions_are_those_of_the_thresholds_as_saved():
    """Thresholds are float32, and stay what they are in a list of Python floats."""
    record = random_record(300, 3)
    point = curve(record, targets=50).best_within(0.5)
    assert point.thresholds.dtype is torch.float32
    again = Tensor(point.thresholds.tolist())
    assert same_bits(again, point.thresholds)
    assert record.replay(point.thresholds.tolist()).flops == point.flops
