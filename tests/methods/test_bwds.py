"""BWDS: labels and weights by hand, the best of all policies where it is known, the sweep, and training."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import INF, NAN, generator
from support.learned_exits import check_all_ways
from support.small import all_of, bits_of, by_hand, digits, images, loader, net, trained

from e2cm_ext import EarlyExit, Record
from e2cm_ext.methods import bwds, training
from e2cm_ext.utils import distributed

NUMBERS = st.integers(0, 10**6)


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_labels_and_weights_by_hand():
    """Here .4 has been spent, where they would leave .7, .7, 1 and .7; an error is worth half the network."""
    here, behind = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    leave, weight = bwds.exit_labels(here, behind, 0.4, torch.tensor([0.7, 0.7, 1.0, 0.7]), price=0.5)
    # .5 * 0 <= .3 by .3;  .5 * 1 <= .3 not, by .2;  .5 * 1 <= .6 by .1;  .5 * 0 <= .3 by .3
    assert leave.tolist() == [True, False, True, True]
    assert weight.tolist() == pytest.approx([0.3, 0.2, 0.1, 0.3])


def test_a_tie_leaves():
    """lambda * (excess loss) <= extra cost."""
    leave, weight = bwds.exit_labels(torch.ones(1), torch.zeros(1), 0.25, torch.tensor([0.75]), price=0.5)
    assert (leave.tolist(), weight.tolist()) == ([True], [0.0])


def test_what_is_behind_has_been_decided_already():
    """Three samples, two exits. At exit 1 (cost .5, end 1): the first is right and leaves; the second errs there, and
    right at the end, goes on; the third errs in both, and leaves. So at exit 0 (cost .2) going on costs .3, .8, .3."""
    seen = []

    def decide(inputs, leave, weight):
        seen.append((leave.tolist(), weight.tolist()))
        return bwds.fit_decision(inputs, leave, weight)

    cells, all_samples = torch.eye(3), torch.ones(3, dtype=torch.bool)
    losses = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1]])
    left = [all_samples, all_samples]
    bwds.learn_at_price([cells, cells], losses, [0.2, 0.5, 1.0], 2.0, left, decide)
    (last, last_weight), (first, first_weight) = seen
    assert last == [True, False, True]
    assert last_weight == pytest.approx([0.5, 2 - 0.5, 0.5])
    assert first == [False, False, True]
    assert first_weight == pytest.approx([2 - 0.3, 2 - 0.8, 0.3])
    assert [each.tolist() for each in left] == [[False, False, True], [True, False, True]]


def test_who_has_stayed_at_a_lower_price_stays():
    """Whatever the decision says now: the second sample goes on at exit 1, to the end."""
    seen = []

    def leave_all(inputs, leave, weight):
        seen.append(weight.tolist())
        return torch.tensor([0.0, 1.0])

    left = [torch.tensor([True, True]), torch.tensor([True, False])]
    losses = torch.tensor([[1.0, 0, 0], [1, 0, 1]])
    bwds.learn_at_price([torch.zeros(2, 1)] * 2, losses, [0.2, 0.5, 1.0], 3.0, left, leave_all)
    assert [each.tolist() for each in left] == [[True, True], [True, False]]
    # At exit 0, going on costs .3 and gets it right, or .8 for the same error.
    assert seen[1] == pytest.approx([3 - 0.3, 0.8])


def worth(policy, cells, losses, costs, price):
    """The mean of price * loss + cost under a policy: at each exit, whether the samples in each cell leave."""
    total = 0.0
    for row in range(len(losses)):
        at = next((j for j, leaves in enumerate(policy) if leaves[cells[j][row]]), len(policy))
        total += price * float(losses[row, at]) + costs[at]
    return total / len(losses)


@settings(max_examples=10)
@given(NUMBERS)
def test_the_best_of_all_policies_is_found_at_every_price(seed):
    """What an exit sees is the cell that a sample lies in, and later cells are parts of earlier ones: then nobody who
    decides backward could do better by looking ahead. There are 2^(2+4) policies of two exits. That whoever stays at a
    price stays at higher ones costs nothing, either."""
    g = generator(seed)
    fine = torch.randint(4, (40,), generator=g)
    cells = [(fine // 2).tolist(), fine.tolist()]
    wrong = torch.rand(40, 3, generator=g) < torch.rand(4, 3, generator=g)[fine]
    costs, prices = [0.2, 0.5, 1.0], [0.3, 1.0, 2.0, 4.0]
    inputs = [torch.eye(2)[cells[0]], torch.eye(4)[cells[1]]]
    decisions = bwds.sweep(inputs, wrong.double(), costs, prices)
    assert [list(each.shape) for each in decisions] == [[4, 3], [4, 5]]
    leaves = [
        torch.stack([bwds.decision_score(torch.eye(each.shape[1] - 1), one) > 0 for one in each]) for each in decisions
    ]
    nested = [each.int().cumprod(0).bool() for each in leaves]
    policies = itertools.product(itertools.product([False, True], repeat=2), itertools.product([False, True], repeat=4))
    worths = [[worth(policy, cells, wrong.double(), costs, price) for price in prices] for policy in policies]
    for p, price in enumerate(prices):
        found = worth([each[p].tolist() for each in nested], cells, wrong.double(), costs, price)
        assert found == pytest.approx(min(each[p] for each in worths), abs=1e-9)


def test_weights_decide_where_labels_differ():
    """Of samples that look alike, those that matter more win, not those that are more."""
    inputs, leave = torch.zeros(5, 1), torch.tensor([True, True, True, True, False])
    few = bwds.fit_decision(inputs, leave, torch.tensor([1.0, 1, 1, 1, 9]))
    many = bwds.fit_decision(inputs, leave, torch.tensor([1.0, 1, 1, 1, 3]))
    assert bwds.decision_score(inputs, few)[0] < 0 < bwds.decision_score(inputs, many)[0]


def test_a_decision_function_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    g = generator(1)
    x = torch.randn(400, 3, generator=g) * torch.tensor([1.0, 50, 0.01]) + torch.tensor([0.0, 300, 1])
    leave = (x[:, 0] + (x[:, 1] - 300) / 50 + 0.8 * torch.randn(400, generator=g)) > 0.3
    weight = torch.rand(400, generator=g)
    standardised = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    oracle = LogisticRegression(C=1e6, tol=1e-8, max_iter=1000).fit(standardised, leave, weight)
    expected = torch.from_numpy(oracle.decision_function(standardised))
    found = bwds.decision_score(x.double(), bwds.fit_decision(x.double(), leave, weight))
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


# ---- the head --------------------------------------------------------------------------------------------------------


def test_what_decisions_go_by_by_hand():
    found = bwds.classifier_scores(torch.tensor([[0.7, 0.2, 0.1]]).log())
    entropy = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert found[0].tolist() == pytest.approx([0.7, 0.5, math.log(3.5), entropy, 0.7, 0.2, 0.1], rel=1e-5)
    certain = bwds.classifier_scores(torch.tensor([[0.0, -INF, -INF]]))
    assert certain[0].tolist() == [1, 1, 50, 0, 1, 0, 0]


def test_certainty_is_the_price_below_which_a_sample_leaves():
    """Decisions at the prices 1, 2 and 4, by the sign of three features."""
    head = bwds.Decider(2, (3,), prices=(1, 2, 4), inputs="features")
    head.decisions[:, :3] = torch.eye(3)
    x = torch.tensor(
        [[-1.0, -1, -1], [1, -1, -1], [1, 1, -1], [1, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 0, 1], [NAN, 1, 1]]
    )
    log_probs, certainty = head.gate(x)
    assert certainty[:-1].tolist() == [1, 2, 4, 8, 1, 2, 2]
    assert certainty[-1].isnan()
    assert torch.equal(log_probs[:-1], head(x)[:-1])
    # Who leaves at a threshold of so much: strictly above.
    assert [(certainty > price).tolist().count(True) for price in (1, 2, 4)] == [5, 2, 1]


@pytest.mark.parametrize("shape", [(6,), (5, 6), (6, 2, 3)])
def test_vectors_tokens_and_maps(shape):
    head = bwds.Decider(3, shape, prices=(1, 2))
    assert head.gate(torch.randn(2, *shape))[1].tolist() == [1, 1]
    assert head.flops() == 2 * 6 * 3 + 2 * 2 * (4 + 3)
    assert bwds.Decider(3, shape, prices=(1, 2), inputs="features").flops() == 2 * 6 * 3 + 2 * 2 * 6


# ---- training --------------------------------------------------------------------------------------------------------

PRICES = (0.5, 2.0, 8.0, 32.0)


def untrained(inputs: str = "scores") -> EarlyExit:
    model = trained()
    return training.finish(bwds.build(model, digits()[0][0][0][:1], exits="blocks", prices=PRICES, inputs=inputs))


def test_digits(tmp_path):
    """At half of the FLOPs more than 85% of new digits, at least .2 more than before; and no bit of the network has
    changed."""
    fit, held_out, test = digits()
    ee = untrained()
    before, model = bwds.curve(ee, test, progress=False).at(0.5).accuracy, bits_of(ee.stages)
    features = training.cache(ee, fit, progress=False, batch_size=100)
    losses = bwds.train(ee, features, decide_on=held_out, epochs=20, lr=2e-2, progress=False)
    assert losses[-1] < losses[0] / 1.5
    assert (ee.thresholds == INF).all()
    curve = bwds.curve(ee, test, progress=False)
    assert curve.at(0.5).accuracy > 0.85
    assert curve.at(0.5).accuracy > before + 0.2
    assert all(torch.equal(value, model[name]) for name, value in ee.stages.state_dict().items())
    # Thresholds are prices.
    record = ee.record(test, progress=False)
    found = []
    for price in PRICES:
        ee.thresholds = price
        found.append(ee.evaluate(test, progress=False))
        replay = record.replay([price] * 4)
        assert (found[-1].accuracy, found[-1].flops) == pytest.approx((replay.accuracy, replay.flops), abs=0.01)
    assert [each.flops for each in found] == sorted(each.flops for each in found)
    assert found[0].accuracy < found[-1].accuracy - 0.1
    check_all_ways(ee, test, tmp_path / "bwds.e2cm", flops=0.5)


@pytest.mark.parametrize("inputs", ["scores", "features"])
def test_decisions_are_better_than_any_that_are_the_same_for_all(inputs):
    """On the samples that they were learned on: than the best single exit for everybody; at any one price they may lose
    a hundredth to it, since a logistic loss is not what is counted."""
    ee, (x, y) = untrained(inputs), all_of(digits()[0])
    training.run(
        training.ExitHeads(ee),
        [(x, y)],
        lambda outputs, labels, _: sum(torch.nn.functional.cross_entropy(each, labels) for each in outputs[:-1]),
        epochs=40,
        optimizer=torch.optim.Adam(ee.heads.parameters(), 0.05),
        prepare=training.Features(ee),
        progress=False,
    )
    bwds.decide(ee, [(x, y)], progress=False)
    record = ee.record([(x, y)], progress=False)
    better = 0.0
    for price in PRICES:
        replay = record.replay([price] * 4)
        found = price * (1 - replay.accuracy) + replay.flops
        best = float((price * (1 - record.accuracy) + record.flops).min())
        assert found <= 1.01 * best
        better += best - found
    assert better > 0.15


def test_every_process_decides_from_the_samples_of_all(monkeypatch):
    """Of two processes with a half of the samples each, the first: the other's answers are put into its hands."""
    first, second = loader(80, 40)
    ee = training.finish(bwds.build(net(), images(1), exits=["block1", "block3"], prices=(1.0,)))
    bwds.decide(ee, [first, second], progress=False)
    expected = [head.decisions.clone() for head in ee.heads]
    seen = []

    def collect(rows):
        seen.append(rows)
        return [rows]

    monkeypatch.setattr(distributed, "all_gather_objects", collect)
    bwds.decide(ee, [second], progress=False)
    monkeypatch.setattr(distributed, "all_gather_objects", lambda rows: [rows, seen.pop(0)])
    bwds.decide(ee, [first], progress=False)
    assert all(torch.equal(head.decisions, each) for head, each in zip(ee.heads, expected, strict=True))
    assert not seen


def test_the_curve_is_that_of_the_prices_and_no_other():
    """Certainties between 1 and 8 at two exits: with the prices 1, 2 and 4 there are five policies."""
    ee = training.finish(bwds.build(by_hand(), images(1), exits="all", prices=(1, 2, 4)))
    g = generator(3)
    certainty = torch.tensor([1.0, 2, 4, 8])[torch.randint(4, (200, 3), generator=g)]
    prediction = (torch.rand(200, 3, generator=g) < torch.tensor([0.7, 0.5, 0.1])).long()
    record = Record(certainty, prediction, torch.zeros(200, dtype=torch.int64), ee.costs, "gate")
    every = [record.replay(vector) for vector in ([-INF, INF], [1, 1], [2, 2], [4, 4], [INF, INF])]
    curve = bwds.curve(ee, record)
    possible = {(round(each.flops, 9), round(each.accuracy, 9)) for each in every}
    front = {
        (round(f, 9), round(a, 9))
        for f, a in zip(curve.front.flops.tolist(), curve.front.accuracy.tolist(), strict=True)
    }
    assert front <= possible
    assert max(a for _, a in possible) == float(curve.accuracy[-1])
    assert min(f for f, _ in possible) == pytest.approx(float(curve.flops[0]))


def test_errors():
    for prices in ((), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, INF)):
        with pytest.raises(ValueError, match="wanted rising numbers above 0"):
            bwds.Decider(3, (4,), prices=prices)
    with pytest.raises(ValueError, match="`inputs` is 'logits'; wanted one of 'scores', 'features'"):
        bwds.build(net(), images(1), exits="blocks", inputs="logits")
    other = EarlyExit(net(), images(1))
    for call in (
        lambda: bwds.decide(other, loader(), progress=False),
        lambda: bwds.curve(other, loader(), progress=False),
    ):
        with pytest.raises(TypeError, match=r"learn no decisions: make it with bwds\.build"):
            call()
    ee = training.finish(bwds.build(net(), images(1), exits="blocks", prices=(1.0,)))
    with pytest.raises(ValueError, match="the loader gave no"):
        bwds.decide(ee, [], progress=False)
