"""AEP: weights and answers by hand, the ensemble against its definition, pruning that makes smaller, and training."""

import io
import math
import time

import pytest
import torch
from support.helpers import INF
from support.learned_exits import check_all_ways
from support.small import Net, all_of, by_hand, digits, images, net
from torch import nn

from e2cm_ext import EarlyExit, Record
from e2cm_ext.methods import aep, training
from e2cm_ext.stages.flops import count_flops

ON = torch.finfo(torch.float32).max  # on, and never fires


def logs(*p: float) -> torch.Tensor:
    return torch.tensor([p]).log()


def random_exits(weighting: str = "rising", seed: int = 0) -> EarlyExit:
    """Heads and network with random weights; all exits on."""
    ee = training.finish(aep.build(net(seed), images(1), weighting=weighting, seed=seed))
    ee.thresholds = ON
    return ee


def sums(ee: EarlyExit, x: torch.Tensor, answering) -> list[torch.Tensor]:
    """What the ensemble says at each exit and at the end, by its definition, in float64."""
    total, found = 0.0, []
    for stage, head, weight in zip(ee.stages, [*ee.heads, nn.LogSoftmax(1)], answering, strict=True):
        x = stage(x)
        total = total + weight * head(x).double().exp()
        found.append(total / total.sum(1, keepdim=True))
    return found


# ---- weights, loss and answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weighting", "learning", "answering"),
    [
        ("uniform", [1 / 3] * 3, [1 / 3] * 3),
        ("rising", [1 / 6, 2 / 6, 3 / 6], [1 / 6, 2 / 6, 3 / 6]),
        ("falling", [3 / 6, 2 / 6, 1 / 6], [3 / 6, 2 / 6, 1 / 6]),
        ("hybrid", [3 / 6, 2 / 6, 1 / 6], [1 / 6, 2 / 6, 3 / 6]),
    ],
)
def test_weights_by_hand(weighting, learning, answering):
    found = aep.weights(weighting, 3)
    assert found[0] == pytest.approx(learning)
    assert found[1] == pytest.approx(answering)


def test_the_loss_by_hand():
    """Two samples, of classes 0 and 1; probabilities of these .5 and .25 at the exit, .8 and .1 at the end."""
    exit, end = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log(), torch.tensor([[0.8, 0.2], [0.9, 0.1]]).log()
    expected = 0.3 * -(math.log(0.5) + math.log(0.25)) / 2 + 2 * -(math.log(0.8) + math.log(0.1)) / 2
    # Logits may be shifted.
    found = aep.loss([exit + 7, end - 3], torch.tensor([0, 1]), [0.3, 2.0])
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_answers_by_hand():
    """.2 * (.9 .1) + .3 * (.4 .6) = (.30 .20); + .5 * (.1 .9) = (.35 .65)."""
    ensemble = aep.Ensemble((1, 1, 1), (0.2, 0.3, 0.5))
    first, memory = ensemble(logs(0.9, 0.1), None, 0, False)
    second, memory = ensemble(logs(0.4, 0.6), memory, 1, False)
    third, _ = ensemble(logs(0.1, 0.9), memory, 2, True)
    for answer, expected in ((first, [0.9, 0.1]), (second, [0.6, 0.4]), (third, [0.35, 0.65])):
        assert answer.exp()[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_an_exit_may_be_certain_and_weigh_nothing():
    ensemble = aep.Ensemble((1, 1, 1), (1.0, 0.0, 1.0))
    first, memory = ensemble(logs(1.0, 0.0), None, 0, False)
    second, memory = ensemble(logs(0.0, 1.0), memory, 1, False)
    third, _ = ensemble(logs(0.5, 0.5), memory, 2, True)
    for answer, expected in ((first, [1, 0]), (second, [1, 0]), (third, [0.75, 0.25])):
        assert answer.exp()[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("weighting", ["uniform", "hybrid"])
def test_the_network_answers_with_the_ensemble_of_all_exits_so_far(weighting):
    ee = random_exits(weighting)
    x, answering = images(40), aep.weights(weighting, 5)[1]
    expected = sums(ee, x, answering)
    torch.testing.assert_close(ee(x).exp().double(), expected[-1], rtol=1e-4, atol=1e-6)
    record = ee.record([(x, torch.zeros(40, dtype=torch.int64))], progress=False)
    for j, answer in enumerate(expected):
        assert torch.equal(record.prediction[:, j].long(), answer.argmax(1))
        torch.testing.assert_close(record.confidence[:, j].double(), answer.amax(1), rtol=1e-4, atol=1e-6)
    ee.thresholds = [ON, ON, -INF, ON]
    decisions = ee.predict(x)
    assert (decisions.exit == 2).all()
    torch.testing.assert_close(decisions.log_probs.exp().double(), expected[2], rtol=1e-4, atol=1e-6)


def test_exits_that_are_off_take_no_part():
    ee = random_exits()
    x = images(20)
    ee.thresholds = [INF, ON, INF, ON]
    answering = list(aep.weights("rising", 5)[1])
    answering[0] = answering[2] = 0.0
    torch.testing.assert_close(ee(x).exp().double(), sums(ee, x, answering)[-1], rtol=1e-4, atol=1e-6)


def test_fewer_exits_keep_their_weights():
    ensemble = aep.Ensemble((1, 2, 3, 4), (5, 6, 7, 8)).at_exits([0, 2])
    assert (ensemble.loss_weights, ensemble.prediction_weights) == ((1, 3, 4), (5, 7, 8))
    ee = random_exits()
    x, few = images(20), ee.at_exits(["block1", "block3"])
    few.thresholds = ON
    ee.thresholds = [INF, ON, INF, ON]
    torch.testing.assert_close(few(x), ee(x))


# ---- pruning ---------------------------------------------------------------------------------------------------------


def record_of(ee: EarlyExit, right: list[int], rows: int = 10) -> Record:
    """Of so many right answers at each exit and at the end."""
    prediction = torch.ones(rows, len(right), dtype=torch.int64)
    for j, count in enumerate(right):
        prediction[:count, j] = 0
    confidence = torch.full((rows, len(right)), 0.5)
    return Record(confidence, prediction, torch.zeros(rows, dtype=torch.int64), ee.costs)


@pytest.mark.parametrize(
    ("right", "drop", "stages"),
    [
        ([3, 8, 9, 7, 8], 0.0, 3),  # the best is not the last
        ([3, 9, 9, 9, 9], 0.0, 2),  # of equals the shortest
        ([3, 4, 5, 6, 7], 0.0, 5),
        ([3, 8, 9, 7, 8], 0.1, 2),
        ([3, 8, 9, 7, 8], 1.0, 1),
    ],
)
def test_the_best_prefix_is_kept(right, drop, stages):
    ee = random_exits()
    assert len(aep.prune(ee, record_of(ee, right), drop).stages) == stages


def test_pruned_answers_are_those_of_the_ensemble():
    ee, x = random_exits("hybrid"), images(30)
    for j, expected in enumerate(sums(ee, x, aep.weights("hybrid", 5)[1])):
        right = [0] * 5
        right[j] = 1
        pruned = aep.prune(ee, record_of(ee, right))
        torch.testing.assert_close(pruned(x).exp().double(), expected, rtol=1e-4, atol=1e-6)


def seconds(one, other, x: torch.Tensor) -> tuple[float, float]:
    """The fastest of many, in turns: what else the machine does only adds."""
    took = ([], [])
    with torch.no_grad():
        for _ in range(40):
            for model, times in zip((one, other), took, strict=True):
                start = time.perf_counter()
                model(x)
                times.append(time.perf_counter() - start)
    return min(took[0]), min(took[1])


def test_parameters_flops_and_latency_fall():
    """Of the whole ensemble, and of the network without any exit."""
    ee, x = random_exits(), images(256)
    pruned = aep.prune(ee, record_of(ee, [1, 2, 1, 1, 1]))
    whole = aep.prune(ee, record_of(ee, [1, 1, 1, 1, 2]))
    counts = [sum(p.numel() for p in module.parameters()) for module in (pruned, ee.stages, whole)]
    # stem: 12 * 9 + 12 and 24; block1: 12 * 12 * 9 + 12 and 24; two heads 12 * 10 + 10
    assert counts[0] == 120 + 24 + 1308 + 24 + 2 * 130
    assert counts[0] < counts[1] < counts[2]
    flops = [count_flops(module, x) for module in (pruned, ee.stages, whole)]
    assert flops[0] == pytest.approx(ee.costs.fractions[1] * ee.costs.base)
    assert flops[0] < flops[1] < flops[2]
    short, long = seconds(pruned, ee.stages, x)
    assert short < 0.9 * long


def test_a_pruned_network_stands_alone(tmp_path):
    """It holds copies; it can be saved whole or by its state, and exported for batches of any size."""
    ee, x = random_exits(), images(6)
    pruned = aep.prune(ee, record_of(ee, [1, 1, 2, 1, 1]))
    expected = pruned(x)
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    other = random_exits(seed=1)
    again = aep.prune(other, record_of(other, [1, 1, 2, 1, 1]))
    assert not torch.equal(again(x), expected)
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(x), expected)
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(pruned, (x,), dynamic_shapes=({0: batch},)), tmp_path / "pruned.pt2")
    exported = torch.export.load(tmp_path / "pruned.pt2").module()
    for rows in (1, 6):
        torch.testing.assert_close(exported(x[:rows]), pruned(x[:rows]))
    with torch.no_grad():
        for parameter in ee.parameters():
            parameter.zero_()
    assert torch.equal(pruned(x), expected)


def test_stages_by_hand_can_be_pruned():
    ee = training.finish(aep.build(by_hand(), images(1)))
    pruned, x = aep.prune(ee, record_of(ee, [1, 2, 1])), images(5)
    expected = sums(ee, x, aep.weights("hybrid", 3)[1])[1]
    torch.testing.assert_close(pruned(x).exp().double(), expected, rtol=1e-4, atol=1e-6)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [True, False])
def test_the_loss_of_training_is_the_weighted_one(joint):
    """Nothing is learned at a learning rate of 0; joint, batch normalisation sees the batch."""
    ee, (x, y) = training.finish(aep.build(by_hand(), images(1))), all_of(digits()[0][:2])
    answers, features = [], x
    with torch.no_grad():
        for stage, head in zip(ee.stages.train(joint), [*ee.heads, None], strict=True):
            features = stage(features)
            answers.append(features if head is None else head.logits(features))
    ee.eval()
    expected = sum(
        weight * float(nn.functional.cross_entropy(each, y))
        for weight, each in zip([3 / 6, 2 / 6, 1 / 6], answers, strict=True)
    )
    assert aep.train(ee, [(x, y)], epochs=1, joint=joint, lr=0.0, progress=False) == pytest.approx([expected])


def test_digits(tmp_path):
    """From random weights, network and exits together: 90% of new digits, at least .7 more than before."""
    fit, held_out, test = digits()
    torch.manual_seed(0)
    model = Net().eval()
    ee = training.finish(aep.build(model, fit[0][0][:1]))
    ee.thresholds = ON
    before = ee.evaluate(test, progress=False).accuracy
    losses = aep.train(ee, fit, epochs=7, lr=4e-3, progress=False)
    assert losses[-1] < losses[0] / 1.3
    after = ee.evaluate(test, progress=False).accuracy
    assert after > 0.9
    assert after > before + 0.7
    pruned = aep.prune(ee, held_out, accuracy_drop=0.01, progress=False)
    assert len(pruned.stages) < 5
    x, y = all_of(test)
    with torch.no_grad():
        assert (pruned(x).argmax(1) == y).double().mean() > after - 0.03
    check_all_ways(ee, test, tmp_path / "aep.e2cm")


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def test_errors():
    ee = random_exits()
    record = record_of(ee, [1, 1, 2, 1, 1])
    with pytest.raises(ValueError, match="`weighting` is 'steep'; wanted one of 'uniform', 'rising'"):
        aep.build(net(), images(1), weighting="steep")
    for weights in ((1.0, -1.0), (INF, 1.0), (1.0, math.nan)):
        with pytest.raises(ValueError, match="wanted weights, from 0 on"):
            aep.Ensemble((1.0, 1.0), weights)
    for weights in ((0.0, 1.0), ()):
        with pytest.raises(ValueError, match="more than 0 for the first exit"):
            aep.Ensemble((0.0, 1.0), weights)
    with pytest.raises(ValueError, match="2 `loss_weights` and 3 `prediction_weights`"):
        aep.Ensemble((1, 1), (1, 1, 1))
    for drop in (-0.1, math.nan):
        with pytest.raises(ValueError, match="`accuracy_drop` is"):
            aep.prune(ee, record, drop)
    with pytest.raises(ValueError, match="holds no samples"):
        aep.prune(ee, record.part([]))
    with pytest.raises(ValueError, match=r"answer together \(aep\).*at_exits"):
        ee.select(record, 2)
    other = aep.build(by_hand(), images(1))
    with pytest.raises(ValueError, match="another network"):
        aep.prune(other, record)
    ee.combination = aep.Ensemble((1, 1), (1, 1))
    with pytest.raises(ValueError, match="2 weights; wanted 5, one per exit"):
        aep.train(ee, digits()[0], progress=False)
    ee.combination = None
    with pytest.raises(TypeError, match=r"aep\.build"):
        aep.prune(ee, record)
