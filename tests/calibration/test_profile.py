"""Times: what is measured, by a clock that the network itself moves; what a batch takes, against all batches there are;
the thresholds that are found by it; and once with a true clock."""

import dataclasses
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fast_exits import NetWithExits
from support.networks import digits, loader, net, samples, trained
from support.records import random_record, records, thresholds_for
from support.tensors import INF, NAN, generator

from e2cm_ext import Confidence, EarlyExit, Profile, TimedPoint, curve, fast_exit
from e2cm_ext.calibration import profile
from e2cm_ext.calibration.latency import drop_unprofitable_exits, fastest
from e2cm_ext.calibration.profiler import measure
from e2cm_ext.heads import Head
from e2cm_ext.stages.flops import Costs


def made_up(exits: int, sizes=(1, 2, 4, 8), seed: int = 0) -> Profile:
    g = generator(seed)
    stages, heads = (torch.rand(len(sizes), n, generator=g).cumsum(0).double() for n in (exits + 1, exits))
    return Profile(stages, heads, sizes, tuple(f"exit{j}" for j in range(exits)), "an abacus")


# ---- the table -------------------------------------------------------------------------------------------------------


def test_between_the_sizes_time_is_linear():
    found = Profile(
        torch.tensor([[1.0, 2.0], [1.5, 3.0], [4.5, 9.0]]), torch.tensor([[0.1], [0.2], [0.4]]), (1, 2, 5), ("a",)
    )
    assert [found.seconds(0, n) for n in (0, 0.5, 1, 2, 3, 5)] == pytest.approx([0, 0.5, 1, 1.5, 2.5, 4.5])
    assert found.head_seconds(0, 1.5) == pytest.approx(0.15)
    assert found.base_seconds(2) == pytest.approx(4.5)
    for count in (-1, 6, NAN):
        with pytest.raises(ValueError, match="wanted 0 to 5"):
            found.seconds(1, count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (2, 4)}, r"`sizes` is \(2, 4\)"),
        ({"sizes": (1, 1)}, r"`sizes` is \(1, 1\)"),
        ({"stages": torch.zeros(2, 2)}, r"`stages` has shape \[2, 2\]; wanted \[2, 3\]"),
        ({"heads": torch.zeros(1, 2)}, r"`heads` has shape \[1, 2\]; wanted \[2, 2\]"),
        ({"moves": torch.zeros(2, 3)}, r"`moves` has shape \[2, 3\]; wanted \[2, 2\]"),
    ],
)
def test_tables_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made_up(2, (1, 2)), **change)


def test_save_load_and_text(tmp_path):
    found = made_up(2)
    found.save(tmp_path / "profile")
    again = Profile.load(tmp_path / "profile")
    assert torch.equal(again.stages, found.stages) and torch.equal(again.heads, found.heads)
    assert again.moves is None and again.move_seconds(1, 3) == 0
    moves = dataclasses.replace(found, moves=2 * found.heads)
    moves.save(tmp_path / "profile")
    again = Profile.load(tmp_path / "profile")
    assert torch.equal(again.moves, moves.moves) and again.move_seconds(1, 2) == 2 * found.head_seconds(1, 2)
    assert (again.sizes, again.names, again.device) == (found.sizes, found.names, found.device)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines] == ["microseconds", "exit0", "exit0,", "exit1", "exit1,", "(end)", "an"]
    assert float(lines[1].split()[1]) == pytest.approx(1e6 * found.seconds(0, 1), abs=0.06)
    assert repr(found) == "Profile(2 exits, batches of 1 to 8, an abacus)"


# ---- what a batch takes ----------------------------------------------------------------------------------------------


def of_all_batches(found: Profile, record, thresholds, batch_size: int) -> float:
    """The mean over every batch that can be drawn from the record."""
    exits = record.replay(thresholds).exit.tolist()
    total = 0.0
    for batch in itertools.product(exits, repeat=batch_size):
        for j in range(record.exits + 1):
            here = sum(exit >= j for exit in batch)
            total += found.seconds(j, here)
            if j < record.exits and thresholds[j] < INF:
                total += found.head_seconds(j, here)
    return total / len(exits) ** batch_size


@given(records(rows=(1, 2, 5)), st.data(), st.integers(1, 4))
def test_expected_time_is_the_mean_over_all_batches(record, data, batch_size):
    thresholds = data.draw(thresholds_for(record))
    found = made_up(record.exits)
    expected = of_all_batches(found, record, thresholds, batch_size)
    assert found.expected_seconds(record, thresholds, batch_size) == pytest.approx(expected, rel=1e-9)
    off = found.expected_seconds(record, [INF] * record.exits, batch_size)
    assert off == pytest.approx(found.base_seconds(batch_size), rel=1e-9)


def test_what_a_profile_cannot_say():
    record, found = random_record(20, 2), made_up(2)
    with pytest.raises(ValueError, match="`batch_size` is 9; the profile knows batches of up to 8"):
        found.expected_seconds(record, [0.0, 0.0], 9)
    with pytest.raises(ValueError, match="of another network, with exits exit0, exit1, exit2; wanted exit0, exit1"):
        made_up(3).expected_seconds(record, [0.0, 0.0], 2)


# ---- thresholds ------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(records(rows=(17, 65), exits=(1,)), st.floats(0.05, 1.0), st.integers(1, 8))
def test_with_one_exit_nothing_better_is_left(record, latency, batch_size):
    """Time then rises with FLOPs, and the search knows all thresholds that cost no more than the base network."""
    record = dataclasses.replace(record, costs=Costs((100, 100), (7,), ("exit0",)))
    found = made_up(1)
    limit = latency * found.base_seconds(batch_size)
    below = [value - 1e-4 for value in record.confidence[:, 0].tolist() if abs(value) < INF]
    replays = {
        t: record.replay([t]) for t in (-INF, *below) if found.expected_seconds(record, [t], batch_size) <= limit
    }
    allowed = [replay.accuracy for replay in replays.values() if replay.flops <= 1]
    try:
        point = fastest(record, found, latency=latency, batch_size=batch_size, method="paper")
    except ValueError as error:
        assert f"`latency` is {latency}" in str(error) and not allowed
        return
    assert point.seconds <= limit and point.accuracy == record.replay(point.thresholds).accuracy
    assert point.accuracy >= max(allowed, default=0.0)


def slow_heads() -> tuple[Profile, Costs]:
    """FLOPs say that exit steps are free; the clock says that the first one takes longer than all stages."""
    costs = Costs((100, 100, 100), (0, 0), ("exit0", "exit1"))
    n = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])[:, None].double()
    return Profile(
        n * torch.tensor([1.0, 1.0, 1.0]), n * torch.tensor([4.0, 0.1]), (1, 2, 4, 8, 16), costs.names
    ), costs


def test_time_decides_where_flops_mislead():
    found, costs = slow_heads()
    record = dataclasses.replace(random_record(3000, 2), costs=costs)
    point = fastest(record, found, latency=0.9, batch_size=16)
    assert isinstance(point, TimedPoint)
    assert point.thresholds[0] == INF and point.thresholds[1] < INF
    assert 0.8 < point.latency <= 0.9
    assert point.seconds == pytest.approx(found.expected_seconds(record, point.thresholds, 16))
    assert point.base_seconds == 48.0
    by_flops = curve(record).best_within(0.9)
    assert found.expected_seconds(record, by_flops.thresholds, 16) > 48.0
    assert "ms per batch of 16" in str(point)
    same = fastest(record, found, milliseconds=0.9 * 48e3, batch_size=16)
    assert torch.equal(same.thresholds, point.thresholds)
    assert fastest(record, found, latency=1.0, batch_size=16).accuracy >= record.accuracy[-1]
    with pytest.raises(
        ValueError, match=r"`milliseconds` is 1; the fastest there is takes .* ms per batch of 16, 0\.\d+"
    ):
        fastest(record, found, milliseconds=1, batch_size=16)


@settings(max_examples=30)
@given(records(rows=(17, 65), exits=(1, 3)), st.data(), st.integers(1, 8), st.integers(0, 1000))
def test_exits_that_do_not_pay_are_switched_off(record, data, batch_size, seed):
    """What is left cannot be made quicker by one exit less, and is never slower than what there was."""
    limits = torch.as_tensor(data.draw(thresholds_for(record)))
    found = made_up(record.exits, seed=seed)
    point = drop_unprofitable_exits(record, found, limits, batch_size)
    kept = point.thresholds < INF
    assert torch.equal(point.thresholds[kept], limits[kept])
    assert point.seconds <= found.expected_seconds(record, limits, batch_size) + 1e-9
    assert point.seconds == pytest.approx(found.expected_seconds(record, point.thresholds, batch_size))
    for j in kept.nonzero()[:, 0].tolist():
        fewer = point.thresholds.clone()
        fewer[j] = INF
        assert found.expected_seconds(record, fewer, batch_size) >= point.seconds - 1e-9
    replay = record.replay(point.thresholds)
    assert (point.flops, point.accuracy) == (replay.flops, replay.accuracy)


def test_a_plan_by_hand():
    """The first exit step takes longer than all stages; without it, its samples leave at the second."""
    found, costs = slow_heads()
    record = dataclasses.replace(random_record(200, 2), costs=costs)
    point = drop_unprofitable_exits(record, found, [0.5, 0.5], 16)
    assert point.thresholds.tolist() == [INF, 0.5]
    assert point.base_seconds == 48 and point.batch_size == 16


def test_a_plan_is_made_only_if_asked_for():
    _, calibrate_on, _ = digits()
    ee = EarlyExit(trained(), calibrate_on[0][0][:1]).fit(calibrate_on, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on images that it was fitted on
        record = ee.record(calibrate_on, progress=False)
    set_to = ee.calibrate(record, flops=0.6, progress=False).thresholds
    n = torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None].double()
    exits = len(ee.heads)
    dear = Profile(n * torch.ones(exits + 1), n * torch.full((exits,), 50.0), (1, 2, 4, 8), ee.exit_names)
    assert torch.equal(ee.thresholds, set_to)
    point = ee.plan(record, dear, 8)
    assert ee.thresholds.isinf().all() and torch.equal(ee.thresholds, point.thresholds)
    assert point.seconds == point.base_seconds and point.accuracy == record.accuracy[-1]
    with pytest.raises(ValueError, match="the profile is of another network"):
        ee.plan(record, made_up(exits), 8)


# ---- measuring -------------------------------------------------------------------------------------------------------


class Clock:
    """Time passes when somebody works."""

    def __init__(self):
        self.time, self.calls = 0.0, []

    def __call__(self):
        return self.time

    def work(self, what, count, seconds):
        self.calls.append((what, count))
        self.time += seconds


class Slow(Head):
    """Takes 10 ms and 1 ms per sample; half of any batch passes the threshold that is set for that."""

    def __init__(self, clock):
        super().__init__(3, (4,))
        self.clock, self.left, self.fitted = clock, [], True

    def forward(self, x):
        return (x[:, :1] * torch.tensor([1.0, 0.0, 0.0])).log_softmax(1)

    def score(self, x, rule):
        self.clock.work("score", len(x), 1e6)
        return super().score(x, rule)

    def step(self, x, threshold, ids, out, *, rule, exit):
        self.clock.work("step", len(x), 0.010 + 0.001 * len(x))
        survivors, ids = super().step(x, threshold, ids, out, rule=rule, exit=exit)
        self.left.append((len(x), len(survivors)))
        return survivors, ids

    def flops(self):
        return 1


def timed(rows: int, batch_size: int, hiccups=(), repeats=3):
    clock, runs = Clock(), itertools.count()
    head = Slow(clock)

    def walk(x, visit, /, *, logits):
        clock.work("stage 0", len(x), 0.1 + 0.02 * len(x))
        if next(runs) in hiccups:
            clock.time += 1000
        visit(0, x)
        if logits:
            clock.work("stage 1", len(x), 0.3 + 0.04 * len(x))
        return x

    network = SimpleNamespace(head_list=lambda: [head], rule=Confidence(), walk=walk, exit_names=("a",))
    images = torch.rand(rows, 4, generator=generator(0))
    found = measure(network, images, batch_size=batch_size, repeats=repeats, progress=False, clock=clock)
    return SimpleNamespace(profile=found, head=head, calls=clock.calls)


def test_what_is_measured_is_what_it_took():
    found = timed(20, 11).profile
    assert found.sizes == (1, 2, 4, 8, 11)
    n = torch.tensor(found.sizes).double()
    torch.testing.assert_close(found.stages, torch.stack([0.1 + 0.02 * n, 0.3 + 0.04 * n], 1))
    torch.testing.assert_close(found.heads, 0.010 + 0.001 * n[:, None])
    assert (found.moves == 0).all()  # nobody works then, by this clock


def test_what_happens_once_does_not_count():
    """Three rounds of sizes 1, 2, 4: the first time each is for the thresholds, the second to warm up."""
    calm, rough = timed(4, 4), timed(4, 4, hiccups=(3, 4, 5, 6, 10, 14))
    torch.testing.assert_close(rough.profile.stages, calm.profile.stages)


def test_sizes_are_interleaved_and_few_images_are_repeated():
    found = timed(3, 4)
    sizes = [count for what, count in found.calls if what == "stage 1"]
    assert sizes == [1, 2, 4] * 4
    assert sorted(set(found.head.left)) == [(1, 1), (2, 1), (4, found.head.left[-1][1])]
    assert 1 <= found.head.left[-1][1] <= 3


@pytest.mark.parametrize(
    ("options", "message"), [({"batch_size": 0}, "`batch_size` is 0"), ({"repeats": 0}, "`repeats` is 0")]
)
def test_measuring_nothing(options, message):
    ee = EarlyExit(net(), samples(1)).fit(loader(), progress=False)
    with pytest.raises(ValueError, match=message):
        ee.profile(samples(4), **options)
    with pytest.raises(ValueError, match=r"`images` has shape \[0, 1, 8, 8\]; wanted at least one"):
        ee.profile(samples(4)[:0])


# ---- with a true clock -----------------------------------------------------------------------------------------------


def networks():
    fit_on, _, _ = digits()
    ee = EarlyExit(trained(), fit_on[0][0][:1]).fit(fit_on, progress=False)
    by_hand = NetWithExits(trained()).eval()
    fast_exit.fit(by_hand, fit_on, progress=False)
    yield ee.profile, ee.calibrate, ee.record, lambda: ee.thresholds
    exits = [m for m in by_hand.modules() if isinstance(m, fast_exit.FastExit)]
    yield (
        lambda *a, **k: fast_exit.profile(by_hand, *a, **k),
        lambda *a, **k: fast_exit.calibrate(by_hand, *a, **k),
        lambda *a, **k: fast_exit.record(by_hand, *a, **k),
        lambda: torch.stack([exit.threshold for exit in exits]),
    )


@pytest.mark.parametrize("which", [0, 1], ids=["EarlyExit", "FastExit"])
def test_calibrate_for_a_time(which):
    _, calibrate_on, _ = digits()
    profile, calibrate, record, thresholds = list(networks())[which]
    found = profile(calibrate_on[0][0], 32, repeats=3, progress=False)
    assert (found.stages > 0).all() and (found.heads > 0).all() and found.sizes[-1] == 32
    point = calibrate(calibrate_on, latency=0.9, batch_size=32, progress=False)
    assert isinstance(point, TimedPoint) and point.latency <= 0.9 and point.batch_size == 32
    assert torch.equal(thresholds(), point.thresholds)
    recorded = record(iter(calibrate_on), progress=False)
    point = calibrate(recorded, milliseconds=1e3 * found.base_seconds(32), batch_size=32, profile=found, progress=False)
    assert point.accuracy >= recorded.accuracy[-1] and point.base_seconds == found.base_seconds(32)
    guaranteed = calibrate(iter(calibrate_on), risk=(0.1, 0.1), progress=False)
    assert torch.equal(thresholds(), guaranteed.thresholds) and guaranteed.accepted > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"latency": 0.0}, ValueError, r"`latency` is 0\.0; wanted a number above 0"),
        ({"milliseconds": NAN}, ValueError, "`milliseconds` is nan"),
        ({"latency": 0.5, "batch_size": 9, "profile": made_up(4)}, ValueError, "`batch_size` is 9; the profile knows"),
        ({"risk": 0.05}, TypeError, r"`risk` is 0\.05; wanted \(epsilon, delta\)"),
        ({"risk": (0.05, 2)}, ValueError, "`delta` of `risk` is 2"),
        ({"flops": 0.5, "of": "agreement"}, TypeError, "`of` is 'agreement'"),
        ({"flops": 0.5, "method": "best"}, ValueError, "`method` is 'best'"),
    ],
)
def test_wrong_targets_are_refused_before_anything_runs(options, error, message):
    """Said before anything is run."""
    ee = EarlyExit(net(), samples(1)).fit(loader(), progress=False)
    with pytest.raises(error, match=message):
        ee.calibrate(None, **options)


def test_sources_that_know_too_little():
    ee = EarlyExit(net(), samples(1)).fit(loader(), progress=False)
    record = ee.record(loader(seed=1), progress=False)
    with pytest.raises(TypeError, match=r"a record holds no images .*: give a loader, or profile="):
        ee.calibrate(record, latency=0.5)
    for options in ({"latency": 0.5, "batch_size": 8, "profile": made_up(4)}, {"risk": (0.1, 0.1)}):
        with pytest.raises(TypeError, match="a curve does not know what each sample does"):
            ee.calibrate(ee.curve(record, progress=False), **options)
    with pytest.raises(ValueError, match="the profile is of another network"):
        ee.calibrate(record, latency=0.5, batch_size=8, profile=made_up(3), progress=False)
    assert profile.Profile is Profile
