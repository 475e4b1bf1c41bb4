"""Exits as layers of a hand-written forward(): the same answers as EarlyExit's, and every way to hold them wrong."""

import copy
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from support.fast_exits import NetWithExits, fitted
from support.networks import (
    CLASSES,
    Block,
    Interrupted,
    Scripted,
    all_of,
    bits_of,
    digits,
    example_of,
    images,
    loader,
    net,
    samples,
    trained,
)
from support.tensors import INF, NAN, assert_same_decisions, generator, same_bits
from torch import nn

from e2cm_ext import (
    Decisions,
    EarlyExit,
    FastExit,
    OperatingPoint,
    PooledMeans,
    Record,
    Statistics,
    WhitenedMeans,
    curve,
    fast_exit,
)

EXITS = ("stem", "block1", "block2")  # behind which EarlyExit puts its own


def wrapped(batches=None, head="class_means", **options) -> EarlyExit:
    return EarlyExit(net(), images(1), exits=EXITS, head=head, **options).fit(batches or loader(), progress=False)


def harder(count: int, seed: int):
    """The images of `loader`, hard to see."""
    return [(x + 4 * torch.randn(x.shape, generator=generator(seed)), y) for x, y in loader(count, seed=seed)]


def thresholds(record: Record, q: float = 0.6):
    return record.confidence[:, :-1].nanquantile(q, dim=0)


# So few that a thousand samples know their covariance: else all are sure to the last bit, or nearly.
FEW = partial(WhitenedMeans, statistics=Statistics(mean=(2, 2), pairs=2))

# ---- it is what EarlyExit is ----------------------------------------------------------------------


@pytest.mark.parametrize("head", [FEW, "class_means", "pooled_means"], ids=["whitened", "class", "pooled"])
@pytest.mark.parametrize("rule", ["confidence", "entropy"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_answers_are_those_of_early_exit(head, rule, layout):
    fit_on, others = harder(1000, seed=0), harder(200, seed=1)
    model, ee = fitted(fit_on, head=head, rule=rule), wrapped(fit_on, head=head, rule=rule)
    record = fast_exit.record(model, others, progress=False)
    other = ee.record(others, progress=False)
    assert same_bits(record.confidence, other.confidence)
    assert torch.equal(record.prediction, other.prediction)
    assert torch.equal(record.label, other.label)
    assert (record.rule, record.names) == (rule, ("exit1", "exit2", "exit3"))
    assert (record.costs.stages, record.costs.heads) == (ee.costs.stages, ee.costs.heads)
    fast_exit.set_thresholds(model, thresholds(record))
    ee.thresholds = thresholds(record)
    x = all_of(others)[0][:50].contiguous(memory_format=layout)
    out = model(x)
    assert_same_decisions(Decisions(*(t.detach() for t in out)), ee.predict(x))
    assert len(out.exit.unique()) > 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_without_thresholds_it_is_the_network_bit_for_bit(layout):
    base = net()
    x = images(20).contiguous(memory_format=layout)
    for model in (NetWithExits(base).eval(), fitted()):
        out = model(x)
        assert isinstance(out, Decisions)
        assert same_bits(out.log_probs, base(x).log_softmax(1))
        assert torch.equal(out.prediction, base(x).argmax(1))
        assert out.exit.tolist() == [3] * 20


def test_calibrate():
    fit_on, calibrate_on, test_on = digits()
    model = NetWithExits(trained()).eval()
    fast_exit.fit(model, fit_on, progress=False)
    record = fast_exit.record(model, calibrate_on, progress=False)
    points = [
        fast_exit.calibrate(model, source, flops=0.2, progress=False)
        for source in (calibrate_on, record, curve(record))
    ]
    assert all(isinstance(point, OperatingPoint) and point.flops <= 0.2 for point in points)
    assert all(torch.equal(point.thresholds, points[0].thresholds) for point in points)
    assert [model.get_submodule(name).threshold.item() for name in record.names] == points[0].thresholds.tolist()
    point = fast_exit.calibrate(model, record, accuracy_drop=0.02, progress=False)
    assert point.accuracy >= record.accuracy[-1] - 0.02
    x, y = all_of(test_on)
    assert (model(x).prediction == y).double().mean() > 0.8
    assert (model(x).exit < 3).sum() > 50


def test_the_example_runs(capsys):
    scope = {}
    exec(example_of(FastExit), scope)
    decisions, labels = scope["decisions"], scope["labels"]
    assert len(decisions.exit.unique()) > 1
    assert (decisions.prediction == labels).double().mean() > 0.8
    assert re.search(r"accuracy 0\.\d+ at FLOPs 0\.\d+", capsys.readouterr().out)


# ---- a layer --------------------------------------------------------------------------------------


class Vectors(nn.Module):
    """Features are the images themselves; heads are scripted."""

    def __init__(self, exits=2):
        super().__init__()
        self.exits = nn.ModuleList(FastExit(4, 3, head=lambda k, s: Scripted(0, k, s)) for _ in range(exits))
        self.seen = []

    def forward(self, x):
        state = None
        for exit in self.exits:
            x, state = exit(x, state)
            self.seen.append(x.clone())
            if state.done:
                return state.result()
        return state.result(x[:, 1:])


def test_survivors_go_on_in_their_old_order():
    model = Vectors().eval()
    fast_exit.set_thresholds(model, [0.8, 0.5])
    x = torch.tensor([[p, 0.0, 1.0, 3.0] for p in (0.4, 0.9, 0.6, 0.3, 0.85)])
    out = model(x)
    assert out.exit.tolist() == [2, 0, 1, 2, 0]
    assert out.prediction.tolist() == [2, 0, 0, 2, 0]
    assert torch.equal(model.seen[0], x[[0, 2, 3]]) and torch.equal(model.seen[1], x[[0, 3]])


def test_done_when_all_samples_have_left():
    model = Vectors().eval()
    fast_exit.set_thresholds(model, [-INF, -INF])
    assert model(torch.rand(5, 4)).exit.tolist() == [0] * 5
    assert len(model.seen) == 1
    # Without asking, the rest of the way is gone by nobody; the logits of nobody are welcome, and not needed.
    x, state = model.exits[0](torch.rand(5, 4))
    x, state = model.exits[1](x, state)
    assert x.shape == (0, 4) and state.done
    assert state.result() is state.result(x[:, 1:])


def test_result_may_be_asked_for_again():
    model = Vectors().eval()
    x, state = model.exits[0](torch.rand(5, 4))
    with pytest.raises(RuntimeError, match="all samples have no answer yet; it takes their logits"):
        state.result()
    assert not state.done
    first = state.result(x[:, 1:])
    assert state.done and state.result() is first and state.result(torch.zeros(5, 3)) is first


def test_wrong_logits():
    model = Vectors().eval()
    fast_exit.set_thresholds(model, [0.5, INF])
    x, state = model.exits[0](torch.tensor([[0.9, 0, 0, 0], [0.1, 0, 0, 0], [0.2, 0, 0, 0]]))
    with pytest.raises(RuntimeError, match="2 samples have no answer yet"):
        state.result()
    for bad in (torch.zeros(3, 3), torch.zeros(2, 4), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"`logits` has shape .*; wanted \[2, 3\]"):
            state.result(bad)
    assert state.result(x[:, 1:]).exit.tolist() == [0, 1, 1]


def test_train_mode_passes_everything_through():
    model = fitted()
    fast_exit.set_thresholds(model, -INF)
    model.train()
    x = images(8)
    features, state = model.exit1(features_in := torch.randn(8, 12, 8, 8, requires_grad=True))
    assert features is features_in and not state.done
    before = bits_of(model.exit1)
    out = model(x)
    assert out.exit.tolist() == [3] * 8
    nn.functional.nll_loss(out.log_probs, torch.zeros(8, dtype=torch.int64)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.base.classifier.parameters())
    assert model.base.stem[0].weight.grad.abs().sum() > 0
    assert all(same_bits(value, before[name]) for name, value in model.exit1.state_dict().items())
    assert list(model.parameters()) == list(model.base.parameters())  # nothing to be trained in an exit


def test_eval_mode_with_gradients_enabled():
    model = fitted()
    fast_exit.set_thresholds(model, thresholds(fast_exit.record(model, loader(), progress=False)))
    x = samples(40)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        expected = model(x)
    out = model(x)
    assert_same_decisions(Decisions(*(t.detach() for t in out)), expected)


def test_settings_of_an_exit():
    exit = FastExit(64, 3)
    assert exit.threshold.item() == INF and exit.threshold.dtype is torch.float32
    assert isinstance(exit.head, WhitenedMeans) and exit.head.feature_shape == (64,)
    assert FastExit((4, 2, 2), 3, head="pooled_means", threshold=0.5).threshold.item() == 0.5
    exit.threshold = 0.25
    assert exit.threshold.item() == 0.25 and "threshold" in dict(exit.named_buffers())
    exit.threshold = torch.tensor(0.75, dtype=torch.float64)
    assert exit.threshold.item() == 0.75 and exit.threshold.dtype is torch.float32
    with pytest.raises(ValueError, match="NaN"):
        exit.threshold = NAN
    assert "rule='confidence', threshold=0.75, fitted=False" in repr(exit)
    assert exit.half().threshold.dtype is torch.float32
    exit.threshold = 0.1
    assert exit.half().threshold.item() == torch.tensor(0.1).item()
    for bad in ((0,), 0, (), (0, 3), 2.5, None, "64"):
        with pytest.raises(ValueError, match="`num_features_or_shape`"):
            FastExit(bad, 3)
    for bad, kind in (("0.5", TypeError), ([0.5], TypeError), (None, TypeError), (torch.ones(2), ValueError)):
        with pytest.raises(kind, match="`threshold`"):
            exit.threshold = bad


def test_exits_made_in_inference_mode_can_be_fitted_in_it_and_outside_of_it():
    base, x = net(), samples(40)
    with torch.inference_mode():
        model = NetWithExits(base).eval()
        fast_exit.fit(model, loader(), progress=False)
        fast_exit.set_thresholds(model, 0.2)
        expected = model(x)
    fast_exit.fit(model, loader(), progress=False)
    fast_exit.set_thresholds(model, 0.2)
    assert_same_decisions(model(x), expected)
    model.load_state_dict(model.state_dict())


def test_features_of_another_shape():
    with pytest.raises(ValueError, match=r"`x` has shape \[2, 64, 8, 8\]; this exit was set up for .* \[batch, 64\]"):
        FastExit(64, 3)(torch.zeros(2, 64, 8, 8))


def test_a_threshold_from_the_constructor_waits_for_fit():
    model = NetWithExits(net(), threshold=0.12).eval()
    with pytest.raises(RuntimeError, match=r"knows no classes yet: call e2cm_ext.fast_exit.fit\(model, loader\) first"):
        model(images(2))
    fast_exit.fit(model, loader(), progress=False)
    assert model.exit2.threshold.item() == pytest.approx(0.12)
    assert (model(samples(20)).exit < 3).any()
    fast_exit.fit(model, loader(), progress=False)  # old thresholds mean nothing to new means
    assert model.exit2.threshold.item() == INF


def test_nan_images_never_leave_early():
    model = fitted()
    fast_exit.set_thresholds(model, -INF)
    x = images(5)
    x[2, 0, 3, 3] = NAN
    assert model(x).exit.tolist() == [0, 0, 3, 0, 0]


def test_an_empty_batch():
    model = fitted()
    for limit in (INF, 0.2):
        fast_exit.set_thresholds(model, limit)
        assert [tuple(t.shape) for t in model(images(0))] == [(0,), (0,), (0,), (0, CLASSES)]


def test_state_dict_and_deepcopy():
    model = fitted()
    fast_exit.set_thresholds(model, thresholds(fast_exit.record(model, loader(), progress=False)))
    x = samples(40)
    with torch.no_grad():
        expected = model(x)
        other = NetWithExits(net(seed=1), head="class_means").eval()
        other.load_state_dict(model.state_dict())
        assert_same_decisions(other(x), expected)
        third = copy.deepcopy(model)
        fast_exit.set_thresholds(model, INF)
        assert_same_decisions(third(x), expected)
        low = third.bfloat16()
        assert low.exit1.head.means.dtype is torch.float32
        assert len(low(x.bfloat16()).exit.unique()) > 1


def test_threads_and_a_fit_at_the_same_time():
    """Fitting and recording watch their own calls only, not those of other threads."""
    model = fitted()
    fast_exit.set_thresholds(model, thresholds(fast_exit.record(model, loader(), progress=False)))
    torch.set_num_threads(1)
    batches = [samples(count) for count in (10, 30, 50)]
    with torch.no_grad():
        expected = [model(x) for x in batches]
    together = threading.Barrier(4)

    def caller(x):
        torch.set_num_threads(1)
        together.wait(timeout=60)
        with torch.no_grad():
            return [model(x) for _ in range(20)]

    def recorder():
        torch.set_num_threads(1)
        together.wait(timeout=60)
        return fast_exit.record(model, loader(), progress=False)

    with ThreadPoolExecutor(4) as pool:
        answers, record = [pool.submit(caller, x) for x in batches], pool.submit(recorder)
        for several, one in zip(answers, expected, strict=True):
            for got in several.result():
                assert_same_decisions(got, one)
    assert same_bits(record.result().confidence, fast_exit.record(model, loader(), progress=False).confidence)


# ---- fit and record -------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2, 5, 7])
def test_ctrl_c_during_fit(after):
    model = NetWithExits(net(), head="class_means").eval()  # two passes
    with pytest.raises(KeyboardInterrupt):
        fast_exit.fit(model, Interrupted(loader(), after), progress=False)
    assert not model.exit1.head.fitted
    fast_exit.fit(model, loader(), progress=False)
    assert same_bits(model.exit3.head.means, fitted(head="class_means").exit3.head.means)

    fast_exit.set_thresholds(model, 0.12)
    before = bits_of(model)
    for method in (fast_exit.fit, fast_exit.record):
        with pytest.raises(KeyboardInterrupt):
            method(model, Interrupted(loader(seed=3), min(after, 2)), progress=False)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    assert (model(samples(20)).exit < 3).any()


def test_a_class_without_samples():
    model = NetWithExits(net()).eval()
    with pytest.warns(UserWarning, match=r"no sample of 3 of the 10 classes \(7, 8, 9\)") as caught:
        fast_exit.fit(model, loader(classes=7), progress=False)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast_exit.fit(model, loader(), progress=False)


def test_train_mode_is_refused():
    model = fitted()
    model.base.drop.train()
    for call in (fast_exit.fit, fast_exit.record, lambda *a, **k: fast_exit.calibrate(*a, flops=0.9, **k)):
        with pytest.raises(RuntimeError, match=r"'base.drop' is in train mode: call \.eval\(\) first"):
            call(model, loader(), progress=False)


def test_unfitted_exits_are_refused():
    model = NetWithExits(net()).eval()
    with pytest.raises(RuntimeError, match="exit 'exit1' knows no classes yet"):
        fast_exit.record(model, loader(), progress=False)
    with pytest.raises(RuntimeError, match="exit 'exit2' knows no classes yet"):
        fast_exit.set_thresholds(model, [INF, 0.5, INF])
    fast_exit.set_thresholds(model, INF)


def test_set_thresholds():
    model = fitted()
    for given, expected in (([0.5, INF, -INF], [0.5, INF, -INF]), (0.25, [0.25] * 3), (torch.ones(3), [1.0] * 3)):
        fast_exit.set_thresholds(model, given)
        assert [exit.threshold.item() for exit in (model.exit1, model.exit2, model.exit3)] == expected
    for bad in ([0.5] * 2, [0.5, NAN, 0.5]):
        with pytest.raises(ValueError, match="`thresholds`"):
            fast_exit.set_thresholds(model, bad)
    assert model.exit1.threshold.item() == 1.0


def test_records_of_another_network_are_refused():
    record = wrapped().record(loader(), progress=False)
    with pytest.raises(
        ValueError, match=r"is of another network, .* exits stem, block1, block2; wanted .* exit1, exit2"
    ):
        fast_exit.calibrate(fitted(), record, flops=0.9, progress=False)
    with pytest.raises(ValueError, match="is a Net without a FastExit in it"):
        fast_exit.record(net(), loader(), progress=False)


def test_heads_may_differ_rules_may_not():
    model = NetWithExits(net()).eval()
    model.exit2 = FastExit((12, 8, 8), CLASSES, head=PooledMeans).eval()
    fast_exit.fit(model, loader(), progress=False)
    assert fast_exit.record(model, loader(), progress=False).confidence.shape == (200, 4)
    model.exit3 = FastExit((24, 4, 4), CLASSES, rule="entropy", threshold=-0.5).eval()
    fast_exit.fit(model, loader(), progress=False)
    with pytest.raises(ValueError, match="different rules, 'confidence' and 'entropy'"):
        fast_exit.record(model, loader(), progress=False)


class Odd(nn.Module):
    """A forward() that holds its exits wrong, in the way `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how, self.block = how, Block(1)
        self.first, self.second = FastExit((1, 8, 8), CLASSES), FastExit((1, 8, 8), CLASSES)
        self.classifier = nn.Linear(64, CLASSES)

    def forward(self, x):
        x = self.block(x)
        if self.how == "swapped":
            x, state = self.second(x)
            x, state = self.first(x, state)
        elif self.how == "twice":
            x, state = self.first(x)
            x, state = self.first(x, state)
        else:
            x, state = self.first(x)
            if self.how != "left out":
                x, state = self.second(x, state)
        logits = self.classifier(x.flatten(1))
        return logits if self.how == "no result" else state.result(logits)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("swapped", "exit 'second' was called as number 0; wanted every exit once, .* up: first, second"),
        ("twice", "exit 'first' was called as number 1"),
        ("left out", r"exit 'second' was not called by the network's forward\(\)"),
    ],
)
def test_exits_must_be_called_in_order_and_once(how, message):
    model = Odd(how).eval()
    with pytest.raises(RuntimeError, match=message):
        fast_exit.fit(model, loader(), progress=False)
    assert not model.first.head.fitted


def test_the_result_must_be_asked_for():
    model = Odd("no result").eval()
    fast_exit.fit(model, loader(), progress=False)  # which needs no logits
    with pytest.raises(RuntimeError, match=r"has not called state.result\(logits\)"):
        fast_exit.record(model, loader(), progress=False)


def test_flops_of_a_network_that_looks_at_its_numbers():
    class Nosy(Odd):
        def forward(self, x):
            assert x.sum().item() == x.sum().item()
            return super().forward(x)

    model = Nosy("well").eval()
    fast_exit.fit(model, loader(), progress=False)
    record = fast_exit.record(model, loader(), progress=False)
    assert record.costs.stages == (2 * 9 * 64, 0, 2 * 64 * 10)


def test_progress_bars(capsys):
    model = NetWithExits(net(), head="class_means").eval()
    fast_exit.fit(model, loader())
    fast_exit.calibrate(model, loader(), flops=0.95)
    text = capsys.readouterr().err
    assert all(what in text for what in ("fit, pass 1 of 2", "fit, pass 2 of 2", "record", "threshold search"))
    fast_exit.fit(model, loader(), progress=False)
    fast_exit.calibrate(model, loader(), flops=0.95, progress=False)
    assert capsys.readouterr() == ("", "")
