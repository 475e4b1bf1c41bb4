import itertools
import math

import pytest
import torch
from support.helpers import same_bits
from support.learned_exits import check_all_ways
from support.small import SHAPE, all_of, digits, trained

import e2cm_ext as e2cm
from e2cm_ext.methods import joined, sdn, training

NAN, INF = math.nan, math.inf
WAYS = list(itertools.product(("either", "both"), ("class", "decision")))


@pytest.fixture(scope="module")
def learned():
    ee = sdn.build(trained(), torch.zeros(1, *SHAPE), exits="blocks")
    sdn.train(ee, training.cache(ee, digits()[0], progress=False), epochs=4, lr=5e-3, progress=False)
    return ee


@pytest.fixture(scope="module")
def means(learned):
    return e2cm.EarlyExit(learned.stages, torch.zeros(1, *SHAPE), head="class_means").fit(digits()[0], progress=False)


def leaves(learned_wants, means_vote, leave):
    return learned_wants or means_vote if leave == "either" else learned_wants and means_vote


@pytest.mark.parametrize(("leave", "agree"), WAYS)
def test_truth_table(leave, agree):
    """Every case of: the learned head is sure; class means are sure; they name the same class."""
    threshold, limit = 0.7, 0.4
    for sure, means_sure, same in itertools.product((False, True), repeat=3):
        certainty = joined.joint_certainty(
            torch.tensor([0.8 if sure else 0.6]),
            torch.tensor([3]),
            torch.tensor([0.5 if means_sure else 0.3]),
            torch.tensor([3 if same else 4]),
            limit,
            leave,
            agree,
        )
        vote = means_sure and (same or agree == "decision")
        assert bool(certainty > threshold) == leaves(sure, vote, leave), (sure, means_sure, same)
        assert not certainty > INF  # an exit that is off


@pytest.mark.parametrize(("leave", "agree"), WAYS)
def test_samples_that_cannot_be_compared_stay(leave, agree):
    for confidence, theirs in ((NAN, 0.9), (NAN, NAN)):
        found = joined.joint_certainty(
            torch.tensor([confidence]), torch.tensor([0]), torch.tensor([theirs]), torch.tensor([0]), 0.1, leave, agree
        )
        assert not found > -INF
    # Without a word from the class means the learned head decides alone, or not at all.
    found = joined.joint_certainty(
        torch.tensor([0.6]), torch.tensor([0]), torch.tensor([NAN]), torch.tensor([0]), -INF, leave, agree
    )
    assert bool(found > 0.5) == (leave == "either")


@pytest.mark.parametrize(("leave", "agree"), WAYS)
def test_the_network_does_what_the_table_says(learned, means, leave, agree):
    ee = joined.join(learned, leave=leave, agree=agree).fit(digits()[0], progress=False)
    images, _ = digits()[2][0]
    with torch.no_grad():
        own = list(e2cm.runtime.cascade.scores(learned.stages, learned.heads, images))
        theirs = list(e2cm.runtime.cascade.scores(means.stages, means.heads, images))
    thresholds, limits = ([float(p.exp().amax(1).quantile(0.5)) for p in scores[:4]] for scores in (own, theirs))
    joined.set_limits(ee, limits)
    ee.thresholds = thresholds
    decisions = ee.predict(images)
    asked = voted = 0
    for i in range(len(images)):
        for j in range(4):
            wants = float(own[j][i].exp().max()) > thresholds[j]
            vote = float(theirs[j][i].exp().max()) > limits[j]
            if agree == "class":
                vote = vote and int(own[j][i].argmax()) == int(theirs[j][i].argmax())
            asked, voted = asked + 1, voted + vote
            if leaves(wants, vote, leave):
                break
        else:
            j = 4
        best = own[j] if j < 4 else max(own, key=lambda scores: float(scores[i].max()))
        assert int(decisions.exit[i]) == j
        assert int(decisions.prediction[i]) == int(best[i].argmax())
    assert 0.1 * asked < voted < 0.9 * asked
    assert len(set(decisions.exit.tolist())) > 1


@pytest.mark.parametrize(("leave", "agree"), WAYS)
def test_records_apart_tell_what_they_do_together(learned, means, leave, agree):
    """To the bit, for all limits that `options` proposes."""
    ee = joined.join(learned, leave=leave, agree=agree).fit(digits()[0], progress=False)
    apart = [each.record(digits()[1], progress=False) for each in (learned, means)]
    found = list(joined.options(*apart, ee.costs, leave, agree, budgets=(0.3, 0.7)))
    assert len(found) == (3 if agree == "class" else 2)
    for limits, expected in found:
        joined.set_limits(ee, limits)
        record = ee.record(digits()[1], progress=False)
        assert same_bits(record.confidence[:, :-1], expected.confidence[:, :-1])
        assert torch.equal(record.prediction, expected.prediction)
        assert (record.costs, record.rule) == (expected.costs, expected.rule)
    with pytest.raises(ValueError, match="of other exits or other samples"):
        joined.record(apart[0], apart[1].part(slice(50)), ee.costs, [0.0] * 4, leave, agree)


def test_means_that_are_fitted_already_are_copied(learned, means):
    ready = joined.join(learned, means)
    fitted = joined.join(learned).fit(digits()[0], progress=False)
    images, _ = digits()[2][0]
    for network in (ready, fitted):
        joined.set_limits(network, [0.11] * 4)
        network.thresholds = 0.9
    assert torch.equal(ready.predict(images).exit, fitted.predict(images).exit)
    assert ready.heads[0].means is not means.heads[0]
    few = joined.join(learned.at_exits([1, 3]), means)
    assert same_bits(few.heads[1].means.means, means.heads[3].means)
    with pytest.raises(ValueError, match="`exits` holds 'stem'"):
        joined.join(learned, means.at_exits([1, 2, 3]))


def test_costs_are_those_of_both(learned, means):
    ee = joined.join(learned)
    assert ee.costs.heads == tuple(a + b for a, b in zip(learned.costs.heads, means.costs.heads, strict=True))
    assert ee.costs.stages == learned.costs.stages


def test_fitting_is_for_the_means_and_leaves_the_learned_heads_alone(learned, means):
    ee = joined.join(learned)
    assert not any(head.fitted for head in ee.heads)
    assert all(head.learned.fitted for head in ee.heads)
    ee.fit(digits()[0], progress=False)
    for head, a, b in zip(ee.heads, learned.heads, means.heads, strict=True):
        for name, value in a.state_dict().items():
            assert same_bits(value, head.learned.state_dict()[name])
        assert same_bits(head.means.means, b.means) and same_bits(head.means.scale, b.scale)
        assert torch.equal(head.counts, b.counts)
        assert head.learned is not a
    with pytest.raises(TypeError, match="has no limit; wanted a network that `join` has made"):
        joined.set_limits(learned, [0.0] * 4)


@pytest.mark.parametrize("head", ["class_means", "whitened_means"])
def test_the_product_is_that_of_the_probabilities(learned, head):
    ee = joined.join(learned, head, multiply=True).fit(digits()[0], progress=False)
    images, _ = all_of(digits()[2])
    beside = e2cm.EarlyExit(learned.stages, torch.zeros(1, *SHAPE), head=head).fit(digits()[0], progress=False)
    with torch.no_grad():
        both, own, theirs = (
            [scores.double().exp() for scores in e2cm.runtime.cascade.scores(each.stages, each.heads, images)]
            for each in (ee, learned, beside)
        )
    for j in range(4):
        product = own[j] * theirs[j]
        torch.testing.assert_close(both[j], product / product.sum(1, keepdim=True), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("way", ["voting", "product"])
def test_all_ways(learned, tmp_path, way):
    ee = joined.join(learned, "whitened_means", multiply=way == "product").fit(digits()[0], progress=False)
    if way == "voting":
        joined.set_limits(ee, [0.2, 0.2, 0.3, 0.3])
    assert ee.combination == learned.combination
    check_all_ways(ee, digits()[1], tmp_path / "ee")
    with pytest.raises(ValueError, match="`leave` is 'all'"):
        joined.join(learned, leave="all")
    with pytest.raises(ValueError, match="`agree` is 'never'"):
        joined.join(learned, agree="never")
