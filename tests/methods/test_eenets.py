"""EENets: the recursion by hand and against independent stops, placement, gates, and training."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import generator
from support.learned_exits import check_all_ways
from support.small import Net, bits_of, digits, images, loader, net, trained

from e2cm_ext import EarlyExit
from e2cm_ext.methods import eenets, training

NUMBERS = st.integers(0, 10**6)


def logit(p: float) -> torch.Tensor:
    return torch.tensor([math.log(p / (1 - p))], dtype=torch.float64)


def logs(*p: float) -> list[torch.Tensor]:
    return [torch.tensor([each], dtype=torch.float64).log() for each in p]


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_recursion_by_hand():
    """Two exits: Y'_2 = .9, Y'_1 = .25 * .6 + .75 * .9 = .825, Y'_0 = .5 * .2 + .5 * .825 = .5125."""
    answers, costs = eenets.expectation(logs(0.2, 0.6, 0.9), [logit(0.5), logit(0.25)], [0.3, 0.5, 1.1])
    assert answers.exp()[:, 0].tolist() == pytest.approx([0.5125, 0.825, 0.9])
    # C'_1 = .25 * .5 + .75 * 1.1 = .95, C'_0 = .5 * .3 + .5 * .95 = .625.
    assert costs[:, 0].tolist() == pytest.approx([0.625, 0.95, 1.1])


def test_the_loss_by_hand():
    """The same numbers; class 1 of 2 is the true one."""
    log_probs = [torch.tensor([[1 - p, p]], dtype=torch.float64).log() for p in (0.2, 0.6, 0.9)]
    found = [
        float(eenets.loss(log_probs, [logit(0.5), logit(0.25)], torch.tensor([1]), [0.3, 0.5, 1.1], 2.0, over))
        for over in ("all", "first")
    ]
    terms = [-math.log(0.5125) + 2 * 0.625, -math.log(0.825) + 2 * 0.95, -math.log(0.9) + 2 * 1.1]
    assert found == pytest.approx([sum(terms), terms[0]])


def random_outputs(exits: int, rows: int, seed: int):
    g = generator(seed)
    log_probs = [(4 * torch.randn(rows, 5, generator=g).double()).log_softmax(1) for _ in range(exits + 1)]
    gates = [3 * torch.randn(rows, generator=g).double() for _ in range(exits)]
    costs = torch.rand(exits + 1, generator=g).cumsum(0).tolist()
    return log_probs, gates, torch.randint(5, (rows,), generator=g), costs


@given(st.integers(1, 5), st.integers(1, 6), NUMBERS)
def test_the_loss_is_what_independent_stops_expect(exits, rows, seed):
    """From exit i on, the probability of stopping at j is h_j times that of having passed i ... j-1."""
    log_probs, gates, labels, costs = random_outputs(exits, rows, seed)
    expected = []
    for i in range(exits + 1):
        nll, spent = 0.0, 0.0
        for row in range(rows):
            passing, answer = 1.0, 0.0
            for j in range(i, exits + 1):
                h = 1 / (1 + math.exp(-float(gates[j][row]))) if j < exits else 1.0
                answer += passing * h * math.exp(float(log_probs[j][row, labels[row]]))
                spent += passing * h * costs[j] / rows
                passing *= 1 - h
            nll -= math.log(answer) / rows
        expected.append(nll + 0.7 * spent)
    found = eenets.loss(log_probs, gates, labels, costs, 0.7)
    assert float(found) == pytest.approx(sum(expected), rel=1e-9)
    assert float(eenets.loss(log_probs, gates, labels, costs, 0.7, "first")) == pytest.approx(expected[0], rel=1e-9)


def test_certain_gates_and_impossible_classes_have_finite_losses_and_gradients():
    """In float32 sigmoid(200) is 1 and exp(-300) is 0, whose logarithms would be -inf and NaN."""
    log_probs = [torch.tensor([[0.0, -300.0]], requires_grad=True) for _ in range(3)]
    gates = [torch.tensor([200.0], requires_grad=True), torch.tensor([-200.0], requires_grad=True)]
    found = eenets.loss(log_probs, gates, torch.tensor([1]), [0.2, 0.4, 1.0])
    assert found.item() == pytest.approx(3 * 300 + 0.2 + 1.0 + 1.0)
    found.backward()
    assert all(tensor.grad.isfinite().all() for tensor in (*log_probs, *gates))


def test_a_gate_learns_to_leave_where_the_exit_is_as_good_and_to_stay_where_it_is_not():
    """Its gradient: down the loss, h rises for an exit as good as what follows, and falls for a bad one."""
    gate = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    here = torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64).log()
    end = torch.tensor([[0.1, 0.9], [0.1, 0.9]], dtype=torch.float64).log()
    eenets.loss([here, end], [gate], torch.tensor([1, 1]), [0.3, 1.0], over="first").backward()
    assert gate.grad[0] < 0 < gate.grad[1]


# ---- placement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fractions"),
    [
        ("linear", [0.25, 0.5, 0.75]),
        ("pareto", [0.2, 0.36, 0.488]),
        ("fine", [0.05, 0.0975, 0.142625]),
        ("golden", [0.2360680, 0.3819660, 0.6180340]),
    ],
)
def test_placements_by_hand(kind, fractions):
    assert eenets.placements(kind, 3) == pytest.approx(fractions, abs=1e-7)


def deep() -> torch.nn.Sequential:
    """Ten convolutions of 6 channels, random weights."""
    convolutions = [torch.nn.Conv2d(6 if j else 1, 6, 3, padding=1) for j in range(10)]
    with torch.no_grad():
        for seed, each in enumerate(convolutions):
            each.weight.normal_(0, 0.2, generator=generator(seed))
            each.bias.normal_(0, 0.3, generator=generator(seed + 100))
    layers = [layer for each in convolutions for layer in (each, torch.nn.ReLU())]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 3)).eval()


@pytest.mark.parametrize("kind", ["linear", "pareto"])
def test_exits_stand_where_they_ought_to(kind):
    """At the place nearest to the FLOPs that were asked for, each taken once."""
    ee = eenets.build(deep(), images(1), exits=2, placement=kind)
    every = EarlyExit(deep(), images(1), exits="all").costs
    places = (torch.tensor(every.stages).cumsum(0) / every.base)[:-1].tolist()
    nearest = [min(places, key=lambda place, f=f: abs(place - f)) for f in eenets.placements(kind, 2)]
    assert len(set(nearest)) == 2
    assert (torch.tensor(ee.costs.stages).cumsum(0) / ee.costs.base)[:-1].tolist() == pytest.approx(nearest)


# ---- the exit block --------------------------------------------------------------------------------------------------


def test_both_branches_by_their_definition():
    block, x = eenets.ExitBlock(3, (4, 2, 2)).eval(), torch.randn(5, 4, 2, 2, generator=generator(0))
    log_probs, h = block.gate(x)
    pooled = x.double().sum((2, 3)) / 4
    y = (pooled @ block.classifier.weight.double().T + block.classifier.bias).exp()
    torch.testing.assert_close(log_probs.exp().double(), y / y.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert torch.equal(block(x), log_probs)
    stay = (-(pooled @ block.confidence.weight[0].double() + block.confidence.bias)).exp()
    torch.testing.assert_close(h.double(), 1 / (1 + stay), rtol=1e-5, atol=1e-6)


def test_the_norm_is_of_the_map():
    """Over the pixels of the batch, and only then averaged: with a scale and no shift all averages are of numbers with
    mean 0 and variance 1."""
    block = eenets.ExitBlock(3, (4, 2, 2), norm=True).train()
    x = 5 + 3 * torch.randn(50, 4, 2, 2, generator=generator(1))
    normal = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0)
    logits, _ = block.outputs(block.squeeze(x))
    torch.testing.assert_close(logits, block.classifier(normal.mean((2, 3))), rtol=1e-3, atol=1e-4)
    assert block.config()["norm"]


@pytest.mark.parametrize("shape", [(6,), (5, 6), (6, 2, 3)])
def test_vectors_tokens_and_maps(shape):
    block = eenets.ExitBlock(3, shape)
    assert block(torch.randn(2, *shape)).shape == (2, 3)
    assert block.flops() == 2 * 6 * (3 + 1)


def test_a_sample_leaves_at_the_first_exit_whose_gate_is_above_one_half():
    """The gate of exit j is made to open for the 15 of 60 samples whose channel 0 is largest there."""
    ee = training.finish(eenets.build(deep(), images(1), exits=3, placement="linear"))
    ee.thresholds = 0.5
    x = images(60)
    expected, features = torch.full((60,), 3), x
    with torch.no_grad():
        for j, head in enumerate(ee.heads):
            features = ee.stages[j](features)
            size = features.mean((2, 3))[:, 0]
            low, high = size.sort().values[44:46]
            head.confidence.weight.zero_()[0, 0] = 1.0
            head.confidence.bias.fill_(-(low + high) / 2)
            expected[(size >= high) & (expected == 3)] = j
    found = ee.predict(x)
    assert torch.equal(found.exit, expected)
    assert set(expected.tolist()) == {0, 1, 2, 3}
    with torch.no_grad():
        for head in ee.heads:
            head.confidence.weight.zero_()
            head.confidence.bias.zero_()
    assert (ee.predict(x).exit == 3).all()  # h = 0.5 is not above it


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_uses_these_losses():
    """Nothing is learned at a learning rate of 0: every epoch gives the loss of the same outputs, by its own stage."""
    ee = eenets.build(net(), images(1), exits=["block1", "block3"])
    (x, y) = loader(40, 40)[0]
    learners, features = training.ExitHeads(ee), training.Features(ee)(x)
    with torch.no_grad():
        (first, g1), (second, g2), logits = learners(features)
    log_probs = [each.log_softmax(1) for each in (first, second, logits)]
    plain = sum(float(torch.nn.functional.cross_entropy(each, y)) for each in (first, second, logits))
    costs = ee.costs.fractions.tolist()
    assert costs[-1] > 1.0  # the exits on the way are paid for
    for over in ("all", "first"):
        found = eenets.train(
            ee,
            [(x, y)],
            epochs=2,
            joint=False,
            price=3.0,
            over=over,
            warm_up=1,
            lr=0.0,
            weight_decay=0.0,
            progress=False,
        )
        expected = float(eenets.loss(log_probs, [g1, g2], y, costs, 3.0, over))
        assert found == pytest.approx([plain, expected], rel=1e-5)
    assert ee.thresholds.tolist() == [0.5, 0.5]


def test_digits(tmp_path):
    """From random weights, network and exits together, in two stages: 90% of new digits, at least .7 more than before,
    for less than .8 of the FLOPs."""
    fit, _, test = digits()
    torch.manual_seed(0)
    ee = training.finish(eenets.build(Net().eval(), fit[0][0][:1], exits=2, placement="linear"))
    ee.thresholds = 0.5
    before = ee.evaluate(test, progress=False)
    losses = eenets.train(ee, fit, epochs=12, lr=4e-3, over="first", warm_up=6, progress=False)
    assert losses[5] < losses[0] / 1.5
    after = ee.evaluate(test, progress=False)
    assert after.accuracy > 0.9
    assert after.accuracy > before.accuracy + 0.7
    assert after.flops < 0.8
    check_all_ways(ee, test, tmp_path / "eenets.e2cm")


def test_exits_of_a_finished_network():
    """joint=False: not a bit of it changes."""
    fit, _, test = digits()
    model = trained()
    before = bits_of(model)
    ee = training.finish(eenets.build(model, fit[0][0][:1], exits=["block3"]))
    untrained = float(ee.record(test, progress=False).accuracy[0])
    eenets.train(ee, fit, epochs=12, joint=False, lr=1e-2, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert float(ee.record(test, progress=False).accuracy[0]) > untrained + 0.4


def test_two_processes_may_leave_the_gates_for_later(tmp_path):
    """In the first stage nothing is learned about the gates, which processes that add up gradients must be told."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
            import torch
            import torch.distributed as dist
            from support.small import images, loader, net
            from e2cm_ext.methods import eenets, training
            dist.init_process_group("gloo")
            torch.set_num_threads(1)
            own, _ = training.rank_and_world_size()
            ee = eenets.build(net(), images(1), exits=["block1", "block3"])
            start = {{name: value.clone() for name, value in ee.heads.state_dict().items()}}
            x, y = loader(40, 40)[0]
            share = [(x[own::2], y[own::2])] * 2
            eenets.train(ee, share, epochs=1, joint=False, warm_up=1, progress=False)
            untouched = all(torch.equal(v, start[n]) for n, v in ee.heads.state_dict().items() if "confidence" in n)
            eenets.train(ee, share, epochs=2, joint=False, warm_up=1, progress=False)
            torch.save([untouched, start, ee.heads.state_dict()], {str(tmp_path)!r} + f"/end{{own}}")
            dist.destroy_process_group()
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command, env=dict(os.environ, OMP_NUM_THREADS="1"), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (untouched, start, end), (_, _, other) = (torch.load(tmp_path / f"end{own}", weights_only=True) for own in (0, 1))
    assert untouched
    # The heads' extra states say that they are trained.
    assert all(torch.equal(value, other[name]) for name, value in end.items())
    assert not torch.equal(end["0.confidence.weight"], start["0.confidence.weight"])


def test_errors():
    with pytest.raises(ValueError, match="`placement` is 'golder'; wanted one of 'linear', 'pareto', 'fine', 'golden'"):
        eenets.build(net(), images(1), placement="golder")
    with pytest.raises(ValueError, match="`exits` is 0; wanted at least 1"):
        eenets.build(net(), images(1), exits=0)
    with pytest.raises(ValueError, match=r"`norm` is for maps \[C, H, W\]; these features are \[6\]"):
        eenets.ExitBlock(3, (6,), norm=True)
    ee = eenets.build(net(), images(1), exits=["block1"])
    with pytest.raises(ValueError, match="`over` is 'last'; wanted 'all' or 'first'"):
        eenets.train(ee, loader(), over="last", progress=False)
    other = EarlyExit(net(), images(1), exits=["block1"])
    with pytest.raises(TypeError, match="learns by gradients"):
        eenets.train(other, loader(), progress=False)
