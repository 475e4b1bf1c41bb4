import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import generator, same_bits
from support.learned_exits import check_all_ways
from support.small import CLASSES, SHAPE, by_hand, digits, trained
from torch.nn import functional as F

import e2cm_ext as e2cm
from e2cm_ext.methods import sdn, training

NAN = math.nan


def built(exits="blocks", seed=0):
    model = trained()
    return sdn.build(model, torch.zeros(1, *SHAPE), exits=exits, seed=seed)


@pytest.fixture(scope="module")
def learned():
    ee = built()
    at_first = untrained(ee)
    sdn.train(ee, training.cache(ee, digits()[0], progress=False), epochs=8, lr=5e-3, progress=False)
    return ee, at_first


def untrained(ee):
    for head in ee.heads:
        head.fitted = True
    return ee.record(digits()[2], progress=False).accuracy


# ---- the classifier -------------------------------------------------------------------------------------------------


def test_pooling_by_hand():
    """Size 8: kernel 2; 0.25 of the maximum and 0.75 of the average of every cell."""
    head = sdn.InternalClassifier(1, (1, 8, 8))
    with torch.no_grad():
        head.alpha.fill_(0.25)
        head.linear.weight.copy_(torch.arange(16.0)[None])
        head.linear.bias.fill_(3.0)
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 0, :4] = torch.tensor([1.0, 2.0, 4.0, 8.0])  # cells 0 and 1: maxima 2 and 8, averages .75 and 3
    cell = 0.25 * 8 + 0.75 * 3
    assert float(head.logits(x).detach()) == pytest.approx(1 * cell + 3.0)


@given(st.integers(1, 33), st.integers(1, 3), st.integers(0, 1000))
def test_pooling_against_loops(size, channels, seed):
    torch.manual_seed(seed)
    head = sdn.InternalClassifier(3, (channels, size, size))
    x = torch.randn(2, channels, size, size)
    if size < 4:
        expected = x.flatten(1)
        assert not hasattr(head, "alpha")
    else:
        k = size // 4
        assert 0 <= float(head.alpha.detach()) <= 1
        cells = []
        for c in range(channels):
            for i in range(size // k):
                for j in range(size // k):
                    cell = x[:, c, i * k : (i + 1) * k, j * k : (j + 1) * k].flatten(1)
                    cells.append(head.alpha * cell.amax(1) + (1 - head.alpha) * cell.mean(1))
        expected = torch.stack(cells, 1)
    wanted = F.linear(expected, head.linear.weight, head.linear.bias)
    torch.testing.assert_close(head.logits(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head(x), wanted.log_softmax(1), rtol=1e-4, atol=1e-5)


def test_alpha_is_drawn_evenly_and_by_the_seed():
    torch.manual_seed(0)
    drawn = torch.stack([sdn.InternalClassifier(2, (1, 4, 4)).alpha.detach()[0] for _ in range(200)])
    assert drawn.min() < 0.05 and drawn.max() > 0.95 and 0.4 < drawn.mean() < 0.6
    a, b, c = (built(seed=seed).heads.state_dict() for seed in (0, 0, 1))
    assert all(same_bits(a[name], b[name]) for name in a)
    assert not all(same_bits(a[name], c[name]) for name in a)


def test_cost_is_that_of_the_linear_layer():
    assert sdn.InternalClassifier(10, (16, 32, 32)).flops() == 2 * 16 * 16 * 10


def test_exits_stand_at_the_fractions():
    ee = sdn.build(trained(), torch.zeros(1, *SHAPE), exits=(0.3, 0.7))
    spent = torch.tensor(ee.costs.stages).double().cumsum(0) / ee.costs.base
    assert (spent[:-1] - torch.tensor([0.3, 0.7])).abs().max() < 0.03


# ---- training -------------------------------------------------------------------------------------------------------


def test_tau_by_hand():
    most = (0.15, 0.3, 0.9)
    assert sdn.tau(most, 0, 100) == [0.01] * 3
    assert sdn.tau(most, 50, 100) == pytest.approx([0.085, 0.16, 0.46])
    assert sdn.tau(most, 99, 100) == pytest.approx([0.15, 0.3, 0.9])  # .1585, .307 and .901 before the minimum
    assert sdn.tau(most, 93, 100) == pytest.approx([0.1495, 0.289, 0.847])


def test_tau_rises_to_the_fraction_asked_for_or_to_where_an_exit_stands():
    ee = built()
    for fractions, expected in (
        ((0.14, 0.31, 0.44, 0.62, 0.76, 0.88), sdn.FRACTIONS),
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), None),
    ):
        spent = [int(1000 * f) for f in fractions]
        stages = [b - a for a, b in zip([0, *spent], [*spent, 1000], strict=True)]
        ee.costs = e2cm.Costs(tuple(stages), (0,) * 6, tuple("abcdef"))
        assert sdn.max_weights(ee) == pytest.approx(expected or fractions)


def test_loss_by_hand():
    half = torch.zeros(1, 2)  # log 2 each
    sure = torch.tensor([[math.log(3), 0.0]])  # 3 to 1
    labels = torch.tensor([0])
    assert float(sdn.loss([half, sure, sure], labels, None)) == pytest.approx(math.log(2) + math.log(4 / 3))
    weighted = 0.1 * math.log(2) + 0.5 * math.log(4 / 3) + math.log(4 / 3)
    assert float(sdn.loss([half, sure, sure], labels, [0.1, 0.5])) == pytest.approx(weighted)


def test_exits_learn_and_the_network_stays(learned):
    ee, at_first = learned
    accuracy = ee.record(digits()[2], progress=False).accuracy
    assert (accuracy[:-1] > at_first[:-1] + 0.4).all(), f"{at_first} {accuracy}"
    assert same_bits(ee.stages(digits()[2][0][0]), trained()(digits()[2][0][0]))


def test_no_epochs_are_none():
    ee = sdn.build(trained(), digits()[0][0][0][:1], exits=2)
    assert sdn.train(ee, digits()[0], epochs=0, progress=False) == []


def test_training_heads_alone_is_adam_on_the_sum():
    """Three steps, against torch's own, written down."""
    ee, twin = built(), built()
    batches = digits()[0][:3]
    sdn.train(ee, batches, epochs=1, progress=False)
    features = training.Features(twin)
    optimizer = torch.optim.Adam(twin.heads.parameters(), 1e-3)
    for x, y in batches:
        *squeezed, _ = features(x)
        each = (F.cross_entropy(head.outputs(z), y) for head, z in zip(twin.heads, squeezed, strict=True))
        optimizer.zero_grad()
        sum(each).backward()
        optimizer.step()
    for a, b in zip(ee.heads.parameters(), twin.heads.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_joint_training_follows_tau():
    seen = []
    ee = built(exits=(0.3, 0.7))
    original = sdn.loss
    try:
        sdn.loss = lambda outputs, labels, weights: seen.append(weights) or original(outputs, labels, weights)
        losses = sdn.train(ee, digits()[0][:2], joint=True, epochs=2, lr=0.01, progress=False)
    finally:
        sdn.loss = original
    fractions = (torch.tensor(ee.costs.stages).double().cumsum(0) / ee.costs.base)[:-1].tolist()
    expected = [[min(f, 0.01 + epoch * f / 2) for f in fractions] for epoch in (0, 1)]
    assert [seen[0], seen[2]] == [pytest.approx(each) for each in expected]
    assert len(losses) == 2
    assert not same_bits(ee.stages(digits()[2][0][0]), trained()(digits()[2][0][0]))


# ---- leaving --------------------------------------------------------------------------------------------------------


def record_of(confidence, prediction, label):
    names = tuple(f"e{j}" for j in range(len(confidence[0]) - 1))
    costs = e2cm.Costs((10,) * len(confidence[0]), (1,) * len(names), names)
    return e2cm.Record(torch.tensor(confidence), torch.tensor(prediction), torch.tensor(label), costs)


def test_a_sample_leaves_at_the_threshold_itself():
    record = record_of([[0.5, 0.9, 1.0]] * 2, [[1, 2, 3]] * 2, [1, 1])
    for confidence, exit in ((0.5, 0), (0.50001, 1), (0.9, 1), (0.95, 2)):
        assert record.replay(sdn.inclusive_thresholds(confidence, 2)).exit.tolist() == [exit] * 2
    assert record.replay([0.5, 0.5]).exit.tolist() == [1, 1]  # elsewhere: above it


def test_the_curve_has_one_threshold_for_all_exits():
    g = generator(0)
    confidence = torch.rand(300, 4, generator=g)
    prediction = torch.randint(2, (300, 4), generator=g)
    record = record_of(confidence.tolist(), prediction.tolist(), [1] * 300)
    curve = sdn.curve(record)
    assert all(len(set(row)) == 1 and row[0] < math.inf for row in curve.thresholds.tolist())
    every = torch.cat([record.confidence[:, :-1].flatten(), torch.tensor([3e38])])
    for t in every[::7].tolist():  # by brute force: nothing is better
        leaving = record.confidence[:, :-1] >= t
        exit = torch.where(leaving.any(1), leaving.int().argmax(1), 3)
        flops = float(record.flops[exit].mean())
        accuracy = float((prediction[torch.arange(300), exit] == 1).double().mean())
        assert curve.at(max(flops, float(curve.flops[0]))).accuracy >= accuracy - 0.004  # quantiles, not all values


def test_if_none_fires_the_most_confident_answers():
    """At the end only, the earlier of two that are equal; NaN is no answer to prefer."""
    p = torch.tensor(
        [
            [[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [NAN, NAN], [0.7, 0.3]],  # exit 0
            [[0.2, 0.8], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7], [NAN, NAN]],
            [[0.7, 0.3], [0.5, 0.5], [0.8, 0.2], [0.4, 0.6], [0.6, 0.4]],  # the network
        ]
    ).log()
    together = sdn.MostConfident()
    memory = None
    for exit in (0, 1):
        answer, memory = together(p[exit], memory, exit, False)
        assert same_bits(answer, p[exit])
    answer, _ = together(p[2], memory, 2, True)
    expected = torch.stack([p[1, 0], p[0, 1], p[0, 2], p[1, 3], p[0, 4]])
    assert torch.equal(answer, expected)


def test_the_network_answers_so_too(learned):
    ee, _ = learned
    images, _ = digits()[2][0]
    log_probs = torch.stack(list(e2cm.runtime.cascade.scores(ee.stages, ee.heads, images)))
    ee.thresholds = sdn.inclusive_thresholds(1.5, len(ee.heads))  # nobody is that sure
    decisions = ee.predict(images)
    surest = log_probs.amax(2).argmax(0)
    expected = log_probs[surest, torch.arange(len(images))]
    assert len(set(surest.tolist())) > 1
    torch.testing.assert_close(decisions.log_probs, expected)
    assert torch.equal(decisions.prediction, expected.argmax(1))
    assert (decisions.exit == len(ee.heads)).all()
    assert torch.equal(ee(images), decisions.log_probs)
    record = ee.record([digits()[2][0]], progress=False)
    assert torch.equal(record.prediction[:, -1], expected.argmax(1).int())
    torch.testing.assert_close(record.confidence[:, -1], expected.amax(1).exp())
    ee.thresholds = math.inf  # all exits off: the network itself
    assert same_bits(ee(images), ee.stages(images).log_softmax(1))


def test_some_leave_and_the_others_remember_their_own_answers(learned):
    ee, _ = learned
    images, _ = digits()[2][1]
    record = ee.record([digits()[2][1]], progress=False)
    limits = torch.tensor([0.9, math.inf, 0.9, 1.5])  # one exit is off: it takes no part
    ee.thresholds = limits
    decisions = ee.predict(images)
    own = torch.stack(list(e2cm.runtime.cascade.scores(ee.stages, ee.heads, images)))[[0, 2, 3, 4]]
    last = own[own.amax(2).argmax(0), torch.arange(len(images))].argmax(1)
    replay = record.replay(limits)
    assert torch.equal(decisions.exit, replay.exit)
    assert 10 < (decisions.exit == 4).sum() < len(images) - 10
    gone = decisions.exit < 4
    assert torch.equal(decisions.prediction, torch.where(gone, replay.prediction, last))
    ee.thresholds = math.inf


def test_all_ways(learned, tmp_path):
    ee, _ = learned
    check_all_ways(ee, digits()[1], tmp_path / "ee")
    point = ee.calibrate(sdn.curve(ee.record(digits()[1], progress=False)), flops=0.5)
    assert len(set(point.thresholds.tolist())) == 1
    assert ee.evaluate(digits()[2], progress=False).accuracy > 0.85
    few = ee.at_exits([1, 2])
    assert few.combination == ee.combination
    with pytest.raises(ValueError, match="answer together"):
        ee.predict_stream(digits()[1])
    ee.thresholds = math.inf


def test_stages_cut_by_hand():
    ee = sdn.build(by_hand(), torch.zeros(1, *SHAPE), exits=["near", "far"])
    sdn.train(ee, digits()[0][:2], epochs=1, progress=False)
    assert ee.record(digits()[1], progress=False).exits == 2


# ---- overthinking ---------------------------------------------------------------------------------------------------


def test_confusion_by_hand():
    ee = sdn.build(by_hand(), torch.zeros(1, *SHAPE), exits=["near", "far"])
    images, labels = digits()[2][0]
    with torch.no_grad():
        near, far, last = (s.double().exp() for s in e2cm.runtime.cascade.scores(ee.stages, ee.heads, images))
    raw = [
        sum(abs(float(last[i, k] - p[i, k])) for p in (near, far) for k in range(CLASSES)) for i in range(len(images))
    ]
    mean = sum(raw) / len(raw)
    spread = math.sqrt(sum((r - mean) ** 2 for r in raw) / len(raw))
    expected = torch.tensor([(r - mean) / spread for r in raw], dtype=torch.float64)
    found = sdn.confusion(ee, [(images[:30], labels[:30]), (images[30:], labels[30:])], progress=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no "):
        sdn.confusion(ee, [])


def test_confused_samples_are_wrong_more_often(learned):
    ee, _ = learned
    scores = sdn.confusion(ee, digits()[2], progress=False)
    record = ee.record(digits()[2], progress=False)
    wrong = ~record.correct[:, -1]
    assert scores[wrong].mean() > scores[~wrong].mean() + 0.5
