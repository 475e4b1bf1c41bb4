"""A wrapped network: fit, calibrate, predict, save, load; that it stands in for the network; and what can go wrong."""

import copy
import errno
import functools
import itertools
import json
import math
import os
import pickle
import re
import resource
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from support.helpers import INF, NAN, assert_same_decisions, generator, same_bits
from support.small import (
    CLASSES,
    SHAPE,
    Interrupted,
    Net,
    Scripted,
    all_of,
    bits_of,
    by_hand,
    digits,
    example_of,
    images,
    loader,
    net,
    samples,
    trained,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from e2cm_ext import (
    ClassMeans,
    Curve,
    Decisions,
    EarlyExit,
    Head,
    OperatingPoint,
    PooledMeans,
    Record,
    Rule,
    Stages,
    checkpoint,
    cut,
)
from e2cm_ext.calibration import curves
from e2cm_ext.utils import serialization

EXITS = 4  # of the small network


def wrapped(head="class_means", fitted=True, **options) -> EarlyExit:
    if not fitted:
        return EarlyExit(net(), images(1), head=head, **options)
    if isinstance(head, str) and options.keys() <= {"rule"}:
        return copy.deepcopy(_wrapped(head, **options))
    return wrapped(head, fitted=False, **options).fit(loader(), progress=False)


@functools.cache
def _wrapped(head, **options) -> EarlyExit:
    return wrapped(head, fitted=False, **options).fit(loader(), progress=False)


def at_quantile(ee: EarlyExit, q: float, batches=None) -> EarlyExit:
    """A share 1 - q of those who come would leave at every exit."""
    confidence = ee.record(batches or loader(), progress=False).confidence
    ee.thresholds = confidence[:, :-1].nanquantile(q, dim=0)
    return ee


# ---- it stands in for the network -----------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("where", ["images", "images and weights"])
@pytest.mark.parametrize("fitted", [False, True])
def test_without_thresholds_it_is_the_network_bit_for_bit(layout, where, fitted):
    model = net().to(memory_format=layout) if "weights" in where else net()
    ee = EarlyExit(model, images(1))
    assert {head.kind for head in ee.heads} == {"whitened_means"}  # the default
    if fitted:
        ee.fit(loader(), progress=False)
    for count in (1, 2, 33):
        x = images(count, seed=count).contiguous(memory_format=layout)
        with torch.no_grad():
            expected = model(x).log_softmax(1)
        assert same_bits(ee(x), expected)
        out = ee.predict(x)
        assert same_bits(out.log_probs, expected)
        assert torch.equal(out.prediction, expected.argmax(1))
        assert out.exit.tolist() == [EXITS] * count
    ee.thresholds = 1.0 if fitted else INF  # active, but nobody is so sure
    x = images(40).contiguous(memory_format=layout)
    assert same_bits(ee(x), model(x).log_softmax(1).detach())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_torchvision_s_networks_bit_for_bit(name, layout):
    vision = pytest.importorskip("vision")
    torch.manual_seed(0)
    model = vision.torchvision.models.get_model(name, weights=None, num_classes=7).eval().to(memory_format=layout)
    x = torch.randn(3, 3, 64, 64, generator=generator(0)).contiguous(memory_format=layout)
    ee = EarlyExit(model, x[:1], head="pooled_means")
    with torch.no_grad():
        assert same_bits(ee(x), model(x).log_softmax(1))


def test_its_gradient_is_the_network_s():
    model = net()
    ee = EarlyExit(model, images(1))
    x = images(5).requires_grad_()
    expected = torch.autograd.grad(model(x).log_softmax(1)[:, 3].sum(), [x, *model.parameters()])
    got = torch.autograd.grad(ee(x)[:, 3].sum(), [x, *model.parameters()])
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_active_exits_carry_no_gradient():
    ee = at_quantile(wrapped(), 0.5)
    x = images(5).requires_grad_()
    assert not ee(x).requires_grad
    assert not ee.predict(x).log_probs.requires_grad


def strangers_loop(model, batches):
    correct = total = 0
    for x, y in batches:
        correct += (model(x).argmax(1) == y).sum().item()
        total += len(y)
    return correct / total


def top_k_accuracy(output, target, topk=(1, 5)):
    """As torchvision's references and timm compute it, from whatever the model returns."""
    maxk = max(topk)
    _, pred = output.topk(maxk, 1, True, True)
    correct = pred.t().eq(target.reshape(1, -1).expand_as(pred.t()))
    return [correct[:k].reshape(-1).float().sum(0).item() * 100.0 / target.size(0) for k in topk]


def test_a_strangers_evaluation_loop():
    fit_on, calibrate_on, test_on = digits()
    model = trained()
    ee = EarlyExit(model, fit_on[0][0][:1]).fit(fit_on, progress=False)
    assert strangers_loop(ee, test_on) == strangers_loop(model, test_on) > 0.85
    ee.calibrate(calibrate_on, flops=0.2, progress=False)
    evaluation = ee.evaluate(test_on, progress=False)
    assert strangers_loop(ee, test_on) == evaluation.accuracy > 0.8
    assert evaluation.exits[:-1].sum() > 50


def test_top_1_and_top_5_as_timm_and_torchvision_compute_them():
    fit_on, calibrate_on, test_on = digits()
    model = trained()
    ee = EarlyExit(model, fit_on[0][0][:1]).fit(fit_on, progress=False)
    x, y = all_of(test_on)
    criterion = nn.CrossEntropyLoss()
    with torch.inference_mode():
        assert top_k_accuracy(ee(x), y) == top_k_accuracy(model(x), y)
        assert criterion(ee(x), y).item() == pytest.approx(criterion(model(x), y).item(), rel=1e-5)
        ee.calibrate(calibrate_on, flops=0.2, progress=False)
        top1, top5 = top_k_accuracy(ee(x), y)
        assert top1 == pytest.approx(100 * strangers_loop(ee, [(x, y)]))
        assert 100 >= top5 > top1 > 80
        assert math.isfinite(criterion(ee(x), y))
        torch.testing.assert_close(ee(x).softmax(1).sum(1), torch.ones(len(x)))


@pytest.mark.parametrize("head", ["whitened_means", "class_means", "pooled_means"])
def test_what_was_made_in_inference_mode_can_be_fitted_in_it_and_outside_of_it(head, tmp_path):
    model, x = net(), samples(40)
    with torch.inference_mode():
        ee = EarlyExit(model, x[:1], head=head).fit(loader(), progress=False)
        ee.thresholds = 0.2
        expected = ee(x)
        few, twin = ee.at_exits([1]), copy.deepcopy(ee)
        ee.save(tmp_path / "file")
        loaded = EarlyExit.load(tmp_path / "file", model)
        few.fit(loader(), progress=False)
    for one in (ee, few, loaded):
        one.fit(loader(), progress=False)
    ee.thresholds[:] = 0.2
    assert same_bits(ee(x), expected) and same_bits(twin(x), expected)
    ee.load_state_dict(ee.state_dict())


def test_the_model_is_not_modified():
    model = net()
    hook = model.block2.register_forward_hook(lambda *_: None)
    before = bits_of(model)
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    identities = [id(p) for p in model.parameters()]
    ee = EarlyExit(model, images(1))
    ee.fit(loader(), progress=False)
    ee.calibrate(loader(), flops=0.9, progress=False)
    ee(images(3))
    after = bits_of(model)
    assert list(after) == list(before) and all(same_bits(after[name], before[name]) for name in before)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert [id(p) for p in model.parameters()] == identities
    assert not any(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert list(model.block2._forward_hooks) == [hook.id]


# ---- what it says about itself --------------------------------------------------------------------


def test_what_it_is_made_of():
    ee = wrapped(fitted=False)
    assert ee.exit_names == cut(net(), images(1)).names
    assert len(ee.exit_names) == EXITS
    assert ee.num_classes == CLASSES
    assert ee.thresholds.tolist() == [INF] * EXITS and ee.thresholds.dtype is torch.float32
    assert "thresholds" in dict(ee.named_buffers())
    # The stem's convolution, 2 * 9 per output, at 8 x 8 places and 12 channels; K (3 D - 1) for its head.
    assert ee.costs.stages[0] == 2 * 9 * 12 * 64
    assert ee.costs.heads[0] == 10 * (3 * 12 * 64 - 1)
    assert not ee.training


def test_repr_tells_what_matters():
    ee = wrapped(fitted=False)
    assert "EarlyExit(4 exits, 10 classes, rule 'confidence', not fitted yet)" in repr(ee)
    ee.fit(loader(), progress=False)
    ee.thresholds = [0.5, INF, 0.25, INF]
    text = repr(ee)
    assert "fitted)" in text and "[batch, 1, 8, 8]" in text
    for name, threshold, fraction in zip(
        ee.exit_names, ("0.5", "inf", "0.25", "inf"), ee.costs.fractions.tolist(), strict=False
    ):
        assert re.search(rf"^  {re.escape(name)} .*class_means .*threshold {threshold} .*{fraction:.4f}$", text, re.M)


@pytest.mark.parametrize("exits", ["all", 2, [0.3, 0.7], ["stem", "block3"]])
def test_exits_are_chosen_as_cut_does(exits):
    ee = EarlyExit(net(), images(1), exits=exits)
    assert ee.exit_names == cut(net(), images(1), exits).names


@pytest.mark.parametrize("head", ["pooled_means", PooledMeans, partial(PooledMeans, grid=2)])
def test_heads_are_chosen_as_build_does(head):
    ee = wrapped(head)
    assert all(isinstance(h, PooledMeans) for h in ee.heads)
    assert [h.grid for h in ee.heads] == [2 if isinstance(head, partial) else 1] * EXITS


def test_auto_heads_stay_within_memory():
    ee = EarlyExit(net(), images(1), head="auto", memory=50_000)
    assert {type(head) for head in ee.heads} == {ClassMeans, PooledMeans}


def test_num_classes_is_checked():
    assert EarlyExit(net(), images(1), num_classes=CLASSES).num_classes == CLASSES
    with pytest.raises(ValueError, match="`num_classes` is 7; the model answers with 10 logits"):
        EarlyExit(net(), images(1), num_classes=7)


def test_stages_by_hand():
    stages = by_hand()
    ee = EarlyExit(stages, images(1), head="class_means")
    assert ee.stages is stages and ee.exit_names == ("near", "far")
    at_quantile(ee.fit(loader(), progress=False), 0.6)
    x = samples(50)
    assert same_bits(
        ee.predict(x).log_probs, at_quantile(wrapped(exits=["block1", "block2"]), 0.6).predict(x).log_probs
    )
    assert EarlyExit(stages, images(1), exits=["far"]).exit_names == ("far",)


def test_a_model_that_does_not_answer_with_logits():
    with pytest.raises(ValueError, match=r"answers with shape \[1, 1, 8, 8\]; wanted logits"):
        EarlyExit(Stages([nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)]).eval(), images(1))


# ---- thresholds -----------------------------------------------------------------------------------


def test_thresholds_can_be_set_to_a_list_a_tensor_or_a_number():
    ee = wrapped()
    buffers = dict(ee.named_buffers())
    for value, expected in (
        ([0.5, 0.25, INF, -INF], [0.5, 0.25, INF, -INF]),
        (torch.tensor([1, 2, 3, 4]), [1, 2, 3, 4]),
        (torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3, 0.4]).tolist()),
        (0.75, [0.75] * 4),
        (torch.tensor(0.75), [0.75] * 4),
        (INF, [INF] * 4),
    ):
        ee.thresholds = value
        assert ee.thresholds.tolist() == expected
        assert ee.thresholds.dtype is torch.float32
        assert dict(ee.named_buffers()).keys() == buffers.keys()
    ee.thresholds[2] = -INF  # and in place
    assert (ee.predict(images(5)).exit == 2).all()


def test_thresholds_do_not_share_memory_with_what_they_were_set_to():
    ee = wrapped()
    mine = torch.tensor([0.5, 0.5, 0.5, 0.5])
    ee.thresholds = mine
    mine[0] = 0.0
    assert ee.thresholds.tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([0.5, NAN, 0.5, 0.5], ValueError, "NaN at exit 1"),
        (NAN, ValueError, "NaN"),
        ([0.5] * 3, ValueError, r"`thresholds` has shape \[3\]; wanted \[4\]"),
        ([[0.5] * 4], ValueError, r"`thresholds` has shape \[1, 4\]; wanted \[4\]"),
        ("high", TypeError, "`thresholds` is 'high'; wanted 4 numbers"),
        (None, TypeError, "`thresholds` is None"),
    ],
)
def test_wrong_thresholds(value, error, message):
    ee = wrapped()
    ee.thresholds = 0.5
    with pytest.raises(error, match=message):
        ee.thresholds = value
    assert ee.thresholds.tolist() == [0.5] * 4


def test_an_unfitted_head_cannot_have_a_finite_threshold():
    ee = wrapped(fitted=False)
    ee.thresholds = INF
    for value in (0.5, -INF, [INF, INF, INF, 0.2]):
        with pytest.raises(RuntimeError, match="knows no classes yet: call fit"):
            ee.thresholds = value
    assert ee.thresholds.tolist() == [INF] * 4
    ee.thresholds[1] = 0.5  # past the door
    for call in (ee, ee.predict):
        with pytest.raises(RuntimeError, match=rf"exit '{ee.exit_names[1]}' knows no classes yet: call fit"):
            call(images(2))
    with pytest.raises(RuntimeError, match="call fit"):
        wrapped(fitted=False).record(loader(), progress=False)


# ---- predict --------------------------------------------------------------------------------------


def test_forward_and_predict_agree():
    ee = at_quantile(wrapped(), 0.6)
    x = samples(50)
    out = ee.predict(x)
    assert isinstance(out, Decisions)
    assert len(out.exit.unique()) > 2
    assert same_bits(ee(x), out.log_probs)


def test_predict_is_what_the_record_says():
    ee = at_quantile(wrapped(), 0.6)
    record = ee.record(loader(), progress=False)
    assert isinstance(record, Record)
    assert (record.names, record.rule, record.costs) == (ee.exit_names, "confidence", ee.costs)
    x, y = all_of(loader())
    assert torch.equal(record.label, y)
    assert torch.equal(record.prediction[:, -1].long(), net()(x).argmax(1))
    # Thresholds in between two certainties: on one of them, rounding decides.
    ordered = record.confidence[:, :-1].sort(0).values
    ee.thresholds = (ordered[120] + ordered[121]) / 2
    replay = record.replay(ee.thresholds)
    got = Decisions(*map(torch.cat, zip(*(ee.predict(x) for x, _ in loader()), strict=True)))
    assert torch.equal(got.exit, replay.exit)
    assert torch.equal(got.prediction, replay.prediction)
    assert same_bits(got.confidence, replay.confidence)
    evaluation = ee.evaluate(loader(), progress=False)
    assert evaluation.accuracy == pytest.approx(replay.accuracy)
    assert evaluation.flops == pytest.approx(replay.flops)


def test_the_entropy_rule():
    ee = wrapped(rule="entropy")
    confident = wrapped()
    record = ee.record(loader(), progress=False)
    assert record.rule == "entropy" and (record.confidence <= 0).all()
    at_quantile(ee, 0.5)
    out = ee.predict(samples(50))
    assert (out.exit < EXITS).any()
    # Its own measure, not the largest probability:
    entropy = -(out.log_probs.exp() * out.log_probs).sum(1)
    early = out.exit < EXITS
    assert (-entropy[early] > ee.thresholds[out.exit[early]] - 1e-6).all()
    assert not torch.equal(out.exit, at_quantile(confident, 0.5).predict(samples(50)).exit)


def test_log_probs_have_the_dtype_of_the_logits():
    ee = wrapped()
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(ee).to(dtype)
        x = samples(20).to(dtype)
        for thresholds in (INF, 1.0, -INF, low.record(loader(), progress=False).confidence[:, :-1].median(0).values):
            low.thresholds = thresholds
            assert low(x).dtype is dtype
            assert low.predict(x).log_probs.dtype is torch.float32
        low.thresholds = INF
        assert same_bits(low(x), low.stages(x).log_softmax(1))


def test_an_empty_batch():
    ee = wrapped()
    for thresholds in (INF, 0.5, -INF):
        ee.thresholds = thresholds
        assert ee(images(0)).shape == (0, CLASSES)
        assert [tuple(t.shape) for t in ee.predict(images(0))] == [(0,), (0,), (0,), (0, CLASSES)]


def test_nan_images_never_leave_early():
    ee = wrapped()
    ee.thresholds = -INF
    x = images(6)
    x[1], x[4, 0, 2, 3] = NAN, NAN
    assert ee.predict(x).exit.tolist() == [0, EXITS, 0, 0, EXITS, 0]
    assert ee(x).isnan().all(1).tolist() == [False, True, False, False, True, False]
    record = ee.record([(x, torch.zeros(6, dtype=torch.int64))], progress=False)
    assert record.confidence.isnan().all(1).tolist() == [False, True, False, False, True, False]
    assert ee.evaluate([(x, torch.zeros(6, dtype=torch.int64))], progress=False).exits.tolist() == [4, 0, 0, 0, 2]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 1, 9, 8), r"`images` has shape \[2, 1, 9, 8\]; wanted \[batch, 1, 8, 8\], as `example_input`"),
        (torch.zeros(2, 3, 8, 8), r"wanted \[batch, 1, 8, 8\]"),
        (torch.zeros(1, 8, 8), r"is it one image without a batch\? .unsqueeze\(0\)"),
        (torch.zeros(2, 64), r"wanted \[batch, 1, 8, 8\]"),
        (torch.tensor(1.0), r"wanted \[batch, 1, 8, 8\]"),
    ],
)
def test_images_of_another_size(bad, message):
    ee = wrapped()
    for call in (ee, ee.predict):
        with pytest.raises(ValueError, match=message):
            call(bad)


def test_images_that_are_no_tensor():
    with pytest.raises(TypeError, match="`images` is a list"):
        wrapped(fitted=False)([1, 2])


def test_threads_get_the_bits_of_one():
    ee = at_quantile(wrapped(), 0.7)
    torch.set_num_threads(1)
    batches = [samples(count, seed=count) for count in (1, 3, 17, 40, 64, 90, 5, 33)]
    expected = [ee.predict(x) for x in batches]
    state = {name: value.clone() for name, value in ee.state_dict().items()}
    together = threading.Barrier(len(batches))

    def caller(x):
        torch.set_num_threads(1)
        together.wait(timeout=60)
        return [ee.predict(x) for _ in range(10)]

    with ThreadPoolExecutor(len(batches)) as pool:
        for several, one in zip(pool.map(caller, batches), expected, strict=True):
            for got in several:
                assert_same_decisions(got, one)
    assert all(same_bits(value, state[name]) for name, value in ee.state_dict().items())


def test_under_torch_compile():
    ee = at_quantile(wrapped(), 0.6)
    x = samples(20)
    with torch.no_grad():
        compiled = torch.compile(ee, backend="eager")(x)
        torch.testing.assert_close(compiled, ee(x))
    torch.compiler.reset()


# ---- modes, copies, dtypes ------------------------------------------------------------------------


def test_train_mode_is_refused_everywhere():
    with pytest.raises(RuntimeError, match=r"\.eval\(\)"):
        EarlyExit(net().train(), images(1))
    model = net()
    ee = EarlyExit(model, images(1)).fit(loader(), progress=False)
    record = ee.record(loader(), progress=False)

    def refused():
        for call in (
            lambda: ee.fit(loader(), progress=False),
            lambda: ee.record(loader(), progress=False),
            lambda: ee.curve(loader(), progress=False),
            lambda: ee.calibrate(loader(), flops=0.9, progress=False),
            lambda: ee.evaluate(loader(), progress=False),
            lambda: ee.predict(images(2)),
            lambda: ee(images(2)),
        ):
            with pytest.raises(RuntimeError, match=r"train mode: call \.eval\(\) first"):
                call()

    ee.train()
    refused()
    assert ee.eval().predict(images(2))
    model.train()  # behind its back
    refused()
    ee.calibrate(record, flops=0.9, progress=False)  # which does not run it
    model.eval()
    assert ee.predict(images(2))
    model.drop.train()
    refused()


def test_deepcopy_is_a_network_of_its_own():
    model = net()
    ee = at_quantile(EarlyExit(model, images(1)).fit(loader(), progress=False), 0.6)
    x = samples(30)
    expected = ee.predict(x)
    other = copy.deepcopy(ee)
    assert_same_decisions(other.predict(x), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.thresholds = 0.3
    other.train()
    assert_same_decisions(ee.predict(x), expected)
    assert not any(m.training for m in model.modules())
    with pytest.raises(RuntimeError, match="train mode"):
        other.predict(x)


def test_pickle():
    ee = at_quantile(wrapped(), 0.6)
    other = pickle.loads(pickle.dumps(ee))
    assert_same_decisions(other.predict(samples(30)), ee.predict(samples(30)))
    assert repr(other) == repr(ee)


def test_state_dict_holds_all_that_was_learned():
    ee = at_quantile(wrapped(), 0.6)
    x = samples(30)
    state = ee.state_dict()
    other = EarlyExit(net(seed=1), images(1), head="class_means")
    assert not torch.equal(other(x), ee(x))
    other.load_state_dict(state)
    assert_same_decisions(other.predict(x), ee.predict(x))
    with pytest.raises(RuntimeError, match="thresholds"):
        EarlyExit(net(), images(1), exits=2, head="class_means").load_state_dict(state, strict=False)


def test_half_moves_the_network_and_nothing_that_decides():
    ee = at_quantile(wrapped(), 0.6)
    before, means = ee.thresholds.clone(), ee.heads[0].means.clone()
    assert ee.half() is ee
    assert {p.dtype for p in ee.parameters()} == {torch.float16}
    assert same_bits(ee.thresholds, before)
    assert same_bits(ee.heads[0].means, means)
    out = ee.predict(samples(30).half())
    assert len(out.exit.unique()) > 1
    # The model is the same one: all of it has moved.
    model = net()
    EarlyExit(model, images(1)).to(torch.bfloat16)
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert model(images(2).bfloat16()).dtype is torch.bfloat16


def test_loaders_of_float32_serve_a_network_of_sixteen_bits():
    ee = wrapped(fitted=False).to(torch.bfloat16).fit(loader(), progress=False)
    ee.calibrate(loader(), flops=0.9, progress=False)
    assert ee.evaluate(loader(), progress=False).exits.sum() == 200


def test_channels_last_means_follow_the_features():
    x, y = all_of(loader())
    batches = [(x.contiguous(memory_format=torch.channels_last), y)]
    model = net().to(memory_format=torch.channels_last)
    ee = EarlyExit(model, images(1), head="class_means").fit(batches, progress=False)
    assert ee.heads[0].means.is_contiguous(memory_format=torch.channels_last)
    at_quantile(ee, 0.6, batches)
    usual = copy.deepcopy(ee).to(memory_format=torch.contiguous_format)
    assert usual.heads[0].means.is_contiguous()
    assert torch.equal(usual.predict(x).prediction, ee.predict(batches[0][0]).prediction)


# ---- fit ------------------------------------------------------------------------------------------


def test_fit_gives_the_class_means():
    ee = wrapped(fitted=False)
    assert ee.fit(loader(), progress=False) is ee
    x, y = all_of(loader())
    with torch.no_grad():
        features = ee.stages[1](ee.stages[0](x))
    means = torch.stack([features[y == k].double().mean(0) for k in range(CLASSES)])
    torch.testing.assert_close(ee.heads[1].means.double(), means, rtol=0, atol=1e-5)
    distances = torch.cdist(features.double().flatten(1), means.flatten(1))
    torch.testing.assert_close(ee.heads[1].scale.double(), distances.mean(0), rtol=1e-5, atol=0)


def test_fit_starts_from_zero():
    ee = wrapped()
    ee.thresholds = 0.5
    ee.fit(loader(seed=5), progress=False)
    fresh = wrapped(fitted=False).fit(loader(seed=5), progress=False)
    for a, b in zip(ee.heads, fresh.heads, strict=True):
        assert same_bits(a.means, b.means) and same_bits(a.scale, b.scale) and torch.equal(a.counts, b.counts)
    assert ee.thresholds.tolist() == [INF] * EXITS  # the old ones belonged to the old means


class Diary(ClassMeans):
    """Writes down which passes it was shown."""

    def update(self, x, labels, pass_index):
        self.turns = [*getattr(self, "turns", []), pass_index]
        super().update(x, labels, pass_index)


@pytest.mark.parametrize(
    ("late", "wanted"), [(2, [[0] * 4, [0] * 4, [0] * 4 + [1] * 4, [0] * 4 + [1] * 4]), (1, [[0] * 4] * 4)]
)
def test_heads_with_different_numbers_of_passes(late, wanted):
    """Each is shown as many passes as it wants, and the loader is run through no more often than it must."""

    class Counted(list):
        runs = 0

        def __iter__(self):
            self.runs += 1
            return super().__iter__()

    def head(num_classes, shape):
        return Diary(num_classes, shape, passes=1 if shape[0] == 12 else late)

    batches = Counted(loader())
    ee = EarlyExit(net(), images(1), head=head).fit(batches, progress=False)
    assert [head.turns for head in ee.heads] == wanted
    assert batches.runs == late


def test_fit_with_any_kind_of_loader():
    x, y = all_of(loader())
    expected = wrapped().heads[-1].means

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(x, y, strict=True))

    class Lists:
        def __iter__(self):
            return ([images, labels] for images, labels in loader())

    for batches in (
        DataLoader(TensorDataset(x, y), batch_size=50),
        DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True),
        DataLoader(Stream(), batch_size=64),
        Lists(),
    ):
        ee = wrapped(fitted=False).fit(batches, progress=False)
        torch.testing.assert_close(ee.heads[-1].means, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("after", [0, 2, 3, 5, 7])  # batches, of twice four
@pytest.mark.parametrize("head", ["class_means", partial(ClassMeans, passes=1), "mixed"])
def test_ctrl_c_during_the_first_fit(after, head):
    if head == "mixed":
        makers = itertools.cycle([partial(ClassMeans, passes=1), ClassMeans])
        head = lambda k, shape: next(makers)(k, shape)  # noqa: E731
    elif isinstance(head, partial):
        after //= 2
    ee = wrapped(head, fitted=False)
    with pytest.raises(KeyboardInterrupt):
        ee.fit(Interrupted(loader(), after), progress=False)
    assert not any(h.fitted for h in ee.heads)
    with pytest.raises(RuntimeError, match="call fit"):
        ee.thresholds = 0.5
    assert same_bits(ee(images(4)), net()(images(4)).log_softmax(1).detach())
    ee.fit(loader(), progress=False)
    expected = wrapped(ClassMeans if head == "class_means" else [partial(ClassMeans, passes=1), ClassMeans][0])
    assert same_bits(ee.heads[0].means, expected.heads[0].means)
    assert ee.heads[0].counts.tolist() == [20] * CLASSES


@pytest.mark.parametrize("after", [0, 2, 3, 5, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_ctrl_c_during_a_later_fit_leaves_everything_as_it_was(after, error):
    ee = at_quantile(wrapped(), 0.6)
    before, heads = bits_of(ee), list(ee.heads)
    expected = ee.predict(samples(30))
    with pytest.raises(error):
        ee.fit(Interrupted(loader(seed=9), after, error), progress=False)
    assert list(ee.heads) == heads
    assert all(same_bits(value, before[name]) for name, value in ee.state_dict().items())
    assert_same_decisions(ee.predict(samples(30)), expected)


@pytest.mark.parametrize("method", ["record", "curve", "calibrate", "evaluate"])
def test_ctrl_c_elsewhere_leaves_everything_as_it_was(method):
    ee = at_quantile(wrapped(), 0.6)
    before = bits_of(ee)
    options = {"flops": 0.9} if method == "calibrate" else {}
    with pytest.raises(KeyboardInterrupt):
        getattr(ee, method)(Interrupted(loader(), 2), progress=False, **options)
    assert all(same_bits(value, before[name]) for name, value in ee.state_dict().items())


def test_a_class_without_samples():
    """Warned of, never answered by an exit; the network itself may still answer with it."""
    ee = wrapped(fitted=False)
    with pytest.warns(UserWarning, match=r"no sample of 3 of the 10 classes \(7, 8, 9\)") as caught:
        ee.fit(loader(classes=7), progress=False)
    assert caught[0].filename == __file__
    ee.thresholds = -INF
    out = ee.predict(all_of(loader())[0])
    assert (out.exit == 0).all()
    assert set(out.prediction.tolist()) <= set(range(7))
    assert (out.log_probs[:, 7:] == -INF).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ee.fit(loader(), progress=False)


def test_fit_holds_statistics_and_one_batch():
    """No batch, and nothing made of it, outlives its turn."""
    import weakref

    alive = []

    class Batches:
        def __len__(self):
            return 6

        def __iter__(self):
            for seed in range(6):
                x, y = all_of(loader(64, seed=seed))
                features.clear()
                alive.append(sum(ref() is not None for ref in seen))
                seen.append(weakref.ref(x))
                yield x, y
                del x, y

    seen, features = [], []
    wrapped(fitted=False).fit(Batches(), progress=False)
    assert max(alive) <= 1  # the one that the loop still has its hands on


# ---- bad data -------------------------------------------------------------------------------------

X, Y = all_of(loader(20))
BAD_LOADERS = [
    ([X], TypeError, "without labels"),
    ([(X,)], TypeError, r"wanted \(images, labels\)"),
    ([], ValueError, "the loader gave no batch"),
    ([(X[:0], Y[:0])], ValueError, "no sample"),
    ([(X, Y + 1)], ValueError, "label 10; wanted 0 to 9"),
    ([(X, Y - 1)], ValueError, "label -1; wanted 0 to 9"),
    ([(X, Y.float())], TypeError, "whole numbers"),
    ([(X, Y[:5])], ValueError, r"wanted \[20\]"),
    ([(X[..., :6], Y)], ValueError, r"wanted \[B, 1, 8, 8\]"),
    ([(X.byte(), Y)], TypeError, "scaled and normalised"),
    (iter([]), (TypeError, ValueError), "once"),
]


@pytest.mark.parametrize("method", ["fit", "record", "calibrate", "evaluate"])
@pytest.mark.parametrize(("batches", "error", "message"), BAD_LOADERS)
def test_bad_loaders(method, batches, error, message):
    ee = at_quantile(wrapped(), 0.6)
    before = bits_of(ee)
    with pytest.raises(error, match=message):
        getattr(ee, method)(batches, progress=False, **({"flops": 0.9} if method == "calibrate" else {}))
    assert all(same_bits(value, before[name]) for name, value in ee.state_dict().items())


def test_nan_images_are_refused_by_fit():
    x = X.clone()
    x[3, 0, 0, 0] = NAN
    with pytest.raises(ValueError, match="image 3 in batch 0 holds NaN"):
        wrapped(fitted=False).fit([(x, Y)], progress=False)


def test_a_generator_cannot_be_fitted_on_twice():
    with pytest.raises(TypeError, match="run through only once; fit needs 2 passes"):
        wrapped(fitted=False).fit(iter(loader()), progress=False)
    one_pass = wrapped(partial(ClassMeans, passes=1), fitted=False)
    one_pass.fit(iter(loader()), progress=False)
    assert one_pass.record(iter(loader()), progress=False).label.shape == (200,)


# ---- calibrate ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated():
    fit_on, calibrate_on, test_on = digits()
    ee = EarlyExit(trained(), fit_on[0][0][:1], head="class_means").fit(fit_on, progress=False)
    return ee, ee.record(calibrate_on, progress=False), calibrate_on, test_on


def test_calibrate_for_flops(calibrated):
    ee, record, calibrate_on, _ = calibrated
    for flops in (0.1, 0.2, 0.4):
        point = ee.calibrate(calibrate_on, flops=flops, progress=False)
        assert isinstance(point, OperatingPoint) and point.other is None
        assert torch.equal(ee.thresholds, point.thresholds)
        replay = record.replay(point.thresholds)
        assert (replay.flops, replay.accuracy) == pytest.approx((point.flops, point.accuracy))
        assert flops / 2 < point.flops <= flops
        evaluation = ee.evaluate(calibrate_on, progress=False)
        assert (evaluation.flops, evaluation.accuracy) == pytest.approx((point.flops, point.accuracy), abs=0.006)


def test_calibrate_for_accuracy(calibrated):
    ee, record, _, _ = calibrated
    base = float(record.accuracy[-1])
    dear, cheap = (ee.calibrate(record, accuracy_drop=drop, progress=False) for drop in (0.0, 0.1))
    assert dear.accuracy >= base
    assert base - 0.1 <= cheap.accuracy < base
    assert cheap.flops < dear.flops <= 1
    assert torch.equal(ee.thresholds, cheap.thresholds)


def test_calibrate_from_loader_record_and_curve_is_the_same(calibrated):
    ee, record, calibrate_on, _ = calibrated
    curve = ee.curve(record, progress=False)
    assert isinstance(curve, Curve)
    points = [ee.calibrate(source, flops=0.7, progress=False) for source in (calibrate_on, record, curve)]
    assert all(torch.equal(point.thresholds, points[0].thresholds) for point in points)


def test_curve_by_the_other_search(calibrated, monkeypatch):
    ee, record, _, _ = calibrated
    search, asked_for = curves.curve, []

    def spy(record, *, method, progress):
        asked_for.append(method)
        return search(record, method=method, progress=progress)

    monkeypatch.setattr(curves, "curve", spy)
    paper, ours = (ee.curve(record, progress=False, method=method) for method in ("paper", "coordinate"))
    assert asked_for == ["paper", "coordinate"]
    assert all(ours.at(flops).accuracy >= paper.at(flops).accuracy for flops in (0.5, 0.6, 0.7, 0.8, 0.9))
    with pytest.raises(ValueError, match=r"`method` is 'newton'"):
        ee.curve(record, progress=False, method="newton")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "none of them"),
        ({"flops": 0.5, "accuracy_drop": 0.01}, "`flops` and `accuracy_drop`"),
        ({"latency": 0.5, "risk": (0.01, 0.05)}, "`latency` and `risk`"),
    ],
)
def test_calibrate_wants_one_target(calibrated, options, what):
    ee, _, _, _ = calibrated
    with pytest.raises(TypeError, match=rf"one of `flops` .*, `risk` .*; here are {what}"):
        ee.calibrate(None, progress=False, **options)


@pytest.mark.parametrize("bad", ["0.5", True, [0.5], (0.1, "0.5")])
@pytest.mark.parametrize("target", ["flops", "accuracy_drop", "latency", "milliseconds", "risk"])
def test_calibrate_wants_numbers(calibrated, target, bad):
    ee, record, _, _ = calibrated
    with pytest.raises(TypeError, match=f"`{target}` is |`delta` of `risk` is '0.5'; wanted a number"):
        ee.calibrate(record, **{target: bad}, progress=False)


def test_times_may_be_measured_on_images_of_numpy(calibrated):
    ee, _, calibrate_on, _ = calibrated
    arrays = [(x.numpy(), y.numpy()) for x, y in calibrate_on]
    assert ee.calibrate(arrays, latency=5.0, batch_size=2, progress=False).batch_size == 2


def test_calibrate_out_of_reach_leaves_thresholds(calibrated):
    ee, record, _, _ = calibrated
    ee.thresholds = 0.5
    with pytest.raises(ValueError, match="the cheapest there is"):
        ee.calibrate(record, flops=0.001, progress=False)
    assert ee.thresholds.tolist() == [0.5] * len(ee.exit_names)


def test_records_of_another_network_are_refused(calibrated):
    ee, record, _, _ = calibrated
    other = EarlyExit(trained(), images(1), exits=2).fit(loader(), progress=False)
    entropy = EarlyExit(trained(), images(1), rule="entropy").fit(loader(), progress=False)
    for stranger in (other, entropy):
        for source in (record, ee.curve(record, progress=False)):
            with pytest.raises(ValueError, match="is of another network, with the rule 'confidence'"):
                stranger.calibrate(source, flops=0.9, progress=False)


def test_evaluate(calibrated):
    ee, _, calibrate_on, test_on = calibrated
    model, (x, y) = trained(), all_of(test_on)
    ee.thresholds = INF
    evaluation = ee.evaluate(test_on, progress=False)
    assert evaluation.accuracy == pytest.approx((model(x).argmax(1) == y).double().mean().item())
    assert evaluation.flops == 1  # heads that are off cost nothing
    assert evaluation.exits.tolist() == [0] * len(ee.exit_names) + [len(y)]
    ee.thresholds = [INF, -INF, 0.3, INF]
    evaluation = ee.evaluate(test_on, progress=False)
    costs = ee.costs
    assert evaluation.flops == pytest.approx((costs.stages[0] + costs.stages[1] + costs.heads[1]) / costs.base)
    ee.calibrate(calibrate_on, flops=0.2, progress=False)
    text = str(ee.evaluate(test_on, progress=False))
    assert re.search(rf"accuracy 0\.\d{{4}} at FLOPs 0\.\d{{4}} on {len(y)} samples", text)
    assert all(re.search(rf"^  {re.escape(name)} +\d+ +\d+\.\d\d%", text, re.M) for name in (*ee.exit_names, "(end)"))


def test_progress_bars(capsys):
    ee = wrapped(fitted=False)
    ee.fit(loader(), progress=True)
    ee.calibrate(loader(), flops=0.95)
    ee.evaluate(loader())
    text = capsys.readouterr().err
    for what in ("fit, pass 1 of 2", "fit, pass 2 of 2", "record", "threshold search", "evaluate"):
        assert what in text
    ee.fit(loader(), progress=False)
    ee.calibrate(loader(), flops=0.95, progress=False)
    ee.evaluate(loader(), progress=False)
    assert capsys.readouterr() == ("", "")


# ---- save, load -----------------------------------------------------------------------------------


class Sums(Head):
    """A head of somebody's own, with something to configure."""

    def __init__(self, num_classes, feature_shape, factor=1.0):
        super().__init__(num_classes, feature_shape)
        self.factor = factor
        self.register_buffer("level", torch.zeros(num_classes))
        self.total = torch.zeros(num_classes)

    def update(self, x, labels, pass_index):
        super().update(x, labels, pass_index)
        self.total.index_add_(0, labels, x.flatten(1).sum(1))

    def finish(self, pass_index):
        super().finish(pass_index)
        self.level.copy_(self.total / self.counts)

    def forward(self, x):
        return (-self.factor * (x.flatten(1).sum(1, keepdim=True) - self.level).abs()).log_softmax(1)

    def flops(self):
        return 1

    def config(self):
        return super().config() | {"factor": self.factor}


class Least(Rule):
    name = "least of test_early_exit"

    def certainty(self, log_probs):
        return -log_probs.exp().amin(1)


@pytest.mark.parametrize(
    "head", ["class_means", "whitened_means", "pooled_means", partial(ClassMeans, passes=1), partial(Sums, factor=2.0)]
)
@pytest.mark.parametrize("rule", ["confidence", "entropy"])
def test_save_and_load(tmp_path, head, rule):
    ee = at_quantile(wrapped(head, rule=rule), 0.6)
    path = tmp_path / "model.e2cm"
    ee.save(path)
    assert os.listdir(tmp_path) == ["model.e2cm"]
    model = net()
    loaded = EarlyExit.load(str(path), model)
    x = samples(50)
    assert_same_decisions(loaded.predict(x), ee.predict(x))
    assert repr(loaded) == repr(ee)
    assert (loaded.costs, loaded.rule, loaded.num_classes) == (ee.costs, ee.rule, ee.num_classes)
    assert [h.config() for h in loaded.heads] == [h.config() for h in ee.heads]
    mine, theirs = ee.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs) and all(same_bits(mine[name], theirs[name]) for name in mine)
    assert next(loaded.parameters()) is next(model.parameters())
    loaded.fit(loader(), progress=False)  # and on it goes


def test_a_file_is_small_and_for_everybody(tmp_path):
    """safetensors, without the base network's weights, with the permissions of any new file."""
    from safetensors import safe_open

    ee = wrapped("pooled_means")
    ee.save(tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        about = json.loads(file.metadata()["e2cm_ext"])
        names = set(file.keys())
    assert about["exits"] == list(ee.exit_names) and about["rule"] == "confidence"
    assert names == {"thresholds"} | {f"heads.{name}" for name in ee.heads.state_dict()}
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert (tmp_path / "a").stat().st_size < 20_000


def test_channels_last_means_come_back_so(tmp_path):
    x, y = all_of(loader())
    batches = [(x.contiguous(memory_format=torch.channels_last), y)]
    model = net().to(memory_format=torch.channels_last)
    ee = EarlyExit(model, images(1), head="class_means").fit(batches, progress=False)
    ee.save(tmp_path / "a")
    loaded = EarlyExit.load(tmp_path / "a", model)
    assert [h.means.stride() for h in loaded.heads] == [h.means.stride() for h in ee.heads]
    assert loaded.heads[0].means.is_contiguous(memory_format=torch.channels_last)
    EarlyExit.load(tmp_path / "a", net())  # the memory format of the weights is not part of the network


def test_save_and_load_of_sixteen_bits_stages_and_an_unfitted_one(tmp_path):
    low = at_quantile(wrapped().half(), 0.6)
    low.save(tmp_path / "half")
    x = samples(30).half()
    assert_same_decisions(EarlyExit.load(tmp_path / "half", net().half()).predict(x), low.predict(x))
    with pytest.raises(ValueError, match="not the same weights"):
        EarlyExit.load(tmp_path / "half", net().half().bfloat16())

    parts = EarlyExit(by_hand(), images(1), exits=["far"]).fit(loader(), progress=False)
    at_quantile(parts, 0.6).save(tmp_path / "stages")
    x = samples(30)
    assert_same_decisions(EarlyExit.load(tmp_path / "stages", by_hand()).predict(x), parts.predict(x))

    wrapped(fitted=False).save(tmp_path / "empty")
    empty = EarlyExit.load(tmp_path / "empty", net())
    assert "not fitted yet" in repr(empty) and same_bits(empty(images(3)), net()(images(3)).log_softmax(1))


def test_a_rule_of_ones_own_must_be_given_again(tmp_path):
    ee = at_quantile(wrapped(rule=Least()), 0.6)
    ee.save(tmp_path / "a")
    with pytest.raises(ValueError, match="rule 'least of test_early_exit', which is not one of ours: give rule="):
        EarlyExit.load(tmp_path / "a", net())
    with pytest.raises(ValueError, match="`rule` is 'other'"):
        other = type("Other", (Least,), {"name": "other"})
        EarlyExit.load(tmp_path / "a", net(), rule=other())
    assert_same_decisions(
        EarlyExit.load(tmp_path / "a", net(), rule=Least()).predict(samples(30)), ee.predict(samples(30))
    )


def test_a_head_whose_state_cannot_be_saved(tmp_path):
    class Odd(Scripted):
        def get_extra_state(self):
            return {"not": "a tensor"}

    ee = EarlyExit(net(), images(1), head=lambda k, shape: Odd(0, k, shape))
    with pytest.raises(TypeError, match="of Odd is a dict; wanted a tensor"):
        ee.save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_another_network_is_refused(tmp_path):
    path = tmp_path / "a"
    ee = wrapped()
    ee.save(path)

    def changed(change):
        model = net()
        with torch.no_grad():
            change(model)
        return model.eval()

    others = {
        "not the same weights": [
            net(seed=1),
            changed(lambda m: m.block2.conv.weight[0, 0, 0].nextafter_(torch.tensor(9.0))),
            changed(lambda m: m.block2.norm.running_mean.add_(1)),
            net().double().float().half().float(),
        ],
        "cannot be cut as that was": [
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10)).eval(),
            changed(lambda m: setattr(m, "stem", nn.Conv2d(3, 12, 3, padding=1))),
        ],
    }
    for message, models in others.items():
        for model in models:
            with pytest.raises(ValueError, match=f"belongs to another network: .*{message}"):
                EarlyExit.load(path, model)
    with pytest.raises(RuntimeError, match="train mode"):
        EarlyExit.load(path, net().train())
    assert EarlyExit.load(path, changed(lambda m: m.block1.conv.weight.add_(0)))


def test_another_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a"
    monkeypatch.setattr(serialization, "FORMAT", serialization.FORMAT + 1)
    wrapped().save(path)
    monkeypatch.undo()
    wanted = rf"has format {serialization.FORMAT + 1} \(written by e2cm_ext \d.*\); this version reads format \d"
    with pytest.raises(ValueError, match=wanted):
        EarlyExit.load(path, net())


def test_files_of_others_are_refused(tmp_path):
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(30)}, tmp_path / "safetensors")
    torch.save({"a": torch.zeros(30)}, tmp_path / "torch")
    (tmp_path / "text").write_text("thresholds: [0.5, 0.5]\n" * 20)
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("PK")
    for name in ("safetensors", "torch", "text"):
        with pytest.raises(ValueError, match="is not a file of e2cm_ext"):
            EarlyExit.load(tmp_path / name, net())
    for name in ("empty", "short"):
        with pytest.raises(ValueError, match="is truncated"):
            EarlyExit.load(tmp_path / name, net())
    wrapped().record(loader(), progress=False).save(tmp_path / "record")
    with pytest.raises(ValueError, match="is a file of the kind 'record'; wanted 'EarlyExit'"):
        EarlyExit.load(tmp_path / "record", net())
    with pytest.raises(FileNotFoundError):
        EarlyExit.load(tmp_path / "nowhere", net())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.e2cm"
    at_quantile(wrapped("pooled_means"), 0.6).save(path)
    return path, path.read_bytes(), net()


def test_a_truncated_file_is_refused(saved, tmp_path):
    _, whole, model = saved
    path = tmp_path / "a"
    lengths = [*range(0, len(whole), 97), len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is truncated"):
            EarlyExit.load(path, model)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="is damaged"):
        EarlyExit.load(path, model)
    path.write_bytes(whole)
    assert EarlyExit.load(path, model)


def test_an_altered_file_is_refused(saved, tmp_path):
    """Every byte up to the tensors, and many of the others, with one bit or several changed."""
    _, whole, model = saved
    path = tmp_path / "a"
    header = 8 + int.from_bytes(whole[:8], "little")
    g = generator(0)
    places = [*range(header), *torch.randint(header, len(whole), (200,), generator=g).tolist()]
    says = {"damaged": 0, "truncated": 0, "not a file of": 0, "has format": 0}
    for place in places:
        one_bit, any_bits = 1 << int(torch.randint(8, (), generator=g)), int(torch.randint(1, 256, (), generator=g))
        for flip in {one_bit if place % 2 else any_bits}:
            altered = bytearray(whole)
            altered[place] ^= flip
            path.write_bytes(altered)
            with pytest.raises(ValueError) as caught:
                EarlyExit.load(path, model)
            says[next(text for text in says if text in str(caught.value))] += 1
    assert says["damaged"] > 0.9 * sum(says.values()) > 900
    assert says["has format"] <= 4  # the one digit of the version


# ---- writing --------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(tmp_path, saved):
    path = tmp_path / "a"
    path.write_bytes(saved[1])
    ee = wrapped()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            ee.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert os.listdir(tmp_path) == ["a"] and path.read_bytes() == saved[1]
    ee.save(path)
    assert EarlyExit.load(path, net()) and path.stat().st_size > 30_000


@pytest.mark.parametrize("where", ["bytes_of", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_ctrl_c_while_writing_leaves_the_old_file(tmp_path, saved, monkeypatch, where, error):
    path = tmp_path / "a"
    path.write_bytes(saved[1])
    ee = wrapped()
    countdown = itertools.count()
    real = getattr(serialization if where == "bytes_of" else os, where)

    def failing(*arguments):
        if where != "bytes_of" or next(countdown) == 3:
            raise error
        return real(*arguments)

    monkeypatch.setattr(serialization if where == "bytes_of" else os, where, failing)
    with pytest.raises(type(error)):
        ee.save(path)
    assert os.listdir(tmp_path) == ["a"] and path.read_bytes() == saved[1]


def test_saving_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "a", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    wrapped().save(link)
    assert link.is_symlink() and EarlyExit.load(target, net())


def test_the_fingerprint_is_of_names_shapes_dtypes_and_values():
    def of(*modules):
        return checkpoint.weights_sha256(Stages(list(modules)).eval())

    def linear(value=1.0, dtype=torch.float32, shape=(2, 3)):
        made = nn.Linear(shape[1], shape[0], bias=False)
        made.weight = nn.Parameter(torch.full(shape, value, dtype=dtype))
        return made

    first = of(linear(), nn.Identity())
    assert first == of(linear(), nn.Identity())
    renamed = nn.Sequential(linear())
    different = [of(linear(2.0), nn.Identity()), of(linear(shape=(3, 2)), nn.Identity()), of(renamed, nn.Identity())]
    # The same bytes, but other numbers:
    different += [of(linear(0.0, dtype), nn.Identity()) for dtype in (torch.float16, torch.bfloat16)]
    assert len({first, *different}) == 6


def test_a_network_in_double_is_refused_before_the_work():
    with pytest.raises(TypeError, match=r"`model` is torch.float64; exits take .*call model.float\(\)"):
        EarlyExit(net().double(), samples(1).double())


def test_a_network_with_exits_is_not_given_more(tmp_path):
    ee = EarlyExit(net(), samples(1)).fit(loader(), progress=False)
    with pytest.raises(TypeError, match="`model` is an EarlyExit, which has its exits; wanted the network itself"):
        EarlyExit(ee, samples(1))
    ee.save(tmp_path / "file")
    with pytest.raises(TypeError, match=r"`model` is a EarlyExit; wanted the torch\.nn\.Module that"):
        EarlyExit.load(tmp_path / "file", ee)


# ---- docs -----------------------------------------------------------------------------------------


def test_the_example_runs(capsys):
    scope = {}
    exec(example_of(EarlyExit), scope)
    assert scope["log_probs"].shape == (384, 2)
    assert 0 < (scope["decisions"].exit == 0).sum() <= 384
    assert "which left at" in capsys.readouterr().out
    assert SHAPE == (1, 8, 8) and isinstance(net(), Net)
