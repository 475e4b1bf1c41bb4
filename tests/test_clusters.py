"""Clusters: their numbers, how they are judged, and fit without labels."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from support.networks import Interrupted, digits, images, loader, net, trained
from support.tensors import generator, same_bits
from torch import nn

import e2cm_ext as e2cm
from e2cm_ext import clusters
from e2cm_ext.clusters import Centres, Clustered, centres_of, k_means, matching, sample, scores

# ---- numbers --------------------------------------------------------------------------------------------------------


def test_matching_undoes_a_permutation():
    truth = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    permutation = torch.tensor([2, 3, 1, 0])
    numbers = matching(permutation[truth], truth, 4)
    assert torch.equal(numbers[permutation[truth]], truth)
    assert torch.equal(numbers, permutation.argsort())


def test_matching_is_the_best_where_the_greedy_one_is_not():
    # Table: cluster 0 has 5 of class 0 and 4 of class 1; cluster 1 has 4 of class 0, none of class 1.
    found = torch.tensor([0] * 9 + [1] * 4)
    truth = torch.tensor([0] * 5 + [1] * 4 + [0] * 4)
    assert matching(found, truth, 2).tolist() == [1, 0]  # 8 right, and not 5
    assert scores(found, truth).accuracy == pytest.approx(8 / 13)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 60), st.integers(0, 2**31))
def test_accuracy_is_that_of_the_best_of_all_renumberings(count, size, seed):
    found, truth = torch.randint(count, (2, size), generator=generator(seed))
    best = max(
        float((torch.tensor(numbers)[found] == truth).double().mean())
        for numbers in itertools.permutations(range(count))
    )
    assert scores(found, truth).accuracy == pytest.approx(best)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_scores_are_those_of_scikit_learn_and_know_no_numbers(seed):
    found, truth = torch.randint(6, (2, 80), generator=generator(seed))
    got = scores(found, truth)
    assert got.nmi == pytest.approx(metrics.normalized_mutual_info_score(truth, found))
    assert got.ari == pytest.approx(metrics.adjusted_rand_score(truth, found))
    again = scores(torch.randperm(6, generator=generator(seed))[found], truth)
    assert again == pytest.approx(got)


def test_scores_of_more_clusters_than_classes():
    assert scores(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1])).accuracy == 0.5
    assert scores(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 2, 3])).accuracy == 0.25
    assert math.isnan(scores(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)).accuracy)


def test_what_is_no_numbering():
    with pytest.raises(ValueError, match=r"`clusters` go from 0 to 4; wanted 0 to 3"):
        matching(torch.tensor([0, 4]), torch.tensor([0, 1]), 4)
    with pytest.raises(ValueError, match=r"`clusters` has shape \[3\], `truth` \[2\]"):
        scores(torch.zeros(3).long(), torch.zeros(2).long())


# ---- k-means --------------------------------------------------------------------------------------------------------


def blobs(count=300, width=5, around=6.0, seed=0):
    g = generator(seed)
    truth = torch.randint(4, (count,), generator=g)
    return around * torch.randn(4, width, generator=g)[truth] + torch.randn(count, width, generator=g), truth


def test_k_means_finds_blobs():
    rows, truth = blobs()
    means, nearest = k_means(rows, 4)
    assert scores(nearest, truth).accuracy == 1
    for k in range(4):
        torch.testing.assert_close(means[k], rows[nearest == k].mean(0))


def test_k_means_of_too_few():
    with pytest.raises(ValueError, match="`clusters` is 3; there are only 2 different samples"):
        k_means(torch.tensor([[0.0], [1.0], [1.0]]), 3)


def test_sample_is_bounded_and_fair():
    everything = torch.arange(5000.0)[:, None]
    got = sample(everything.split(64), 500)
    assert got.shape == (500, 1)
    assert len(got.unique()) == 500
    # 6 standard deviations of the mean of 500 draws without replacement
    assert abs(float(got.mean()) - 2499.5) < 6 * 5000 / math.sqrt(12 * 500)
    assert torch.equal(sample(everything.split(64), 5000).sort(0).values, everything)


def test_sample_refuses_nan():
    with pytest.raises(ValueError, match="NaN or infinity in sample 1"):
        sample([torch.tensor([[0.0], [float("nan")]])])


def test_centres_by_hand():
    # Squared distances to the centres: 1 and 9; spread 3: 1/(1+1/3) = 3/4 and 1/(1+3) = 1/4, which sum to 1.
    centres = Centres(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), 3.0)
    torch.testing.assert_close(centres(torch.tensor([[1.0, 0.0]])).exp(), torch.tensor([[0.75, 0.25]]))


def test_centres_answer_the_nearest_and_keep_their_dtype():
    rows, _ = blobs()
    means, nearest = k_means(rows, 4)
    centres = centres_of(rows, 4)
    assert torch.equal(centres(rows).argmax(1), torch.cdist(rows, centres.means).argmin(1))
    assert scores(centres(rows).argmax(1), nearest).accuracy == 1
    assert float(centres.spread) == pytest.approx(float((rows - means[nearest]).square().sum(1).mean()), rel=1e-5)
    assert centres.half().means.dtype is torch.float32


# ---- fit without labels ---------------------------------------------------------------------------------------------


def test_own_answers_take_the_place_of_labels():
    train, _, test = digits()
    model = trained()
    own = [(x, model(x).argmax(1)) for x, _ in train]
    wanted = e2cm.EarlyExit(model, train[0][0][:1]).fit(own, progress=False)
    for batches in (train, [x for x, _ in train]):
        ee = e2cm.EarlyExit(model, train[0][0][:1]).fit(batches, progress=False, labels=None)
        for mine, theirs in zip(ee.heads, wanted.heads, strict=True):
            assert same_bits(mine.weight, theirs.weight)
    wrong = [(x, (y + 1) % 10) for x, y in test]
    with torch.no_grad():
        assert torch.equal(ee.record(wrong, progress=False).label, torch.cat([model(x).argmax(1) for x, _ in test]))
    assert ee.record(wrong, progress=False).accuracy[-1] == 1
    assert ee.evaluate([x for x, _ in test], progress=False).accuracy == 1  # no exit fires
    assert not ee.labelled
    assert ee.fit(train, progress=False).labelled


def test_clusters_of_a_network_are_found_again_at_its_exits():
    """Digits, by a network that knows them: logits fall into ten clusters without names."""
    train, held_out, test = digits()
    truth = torch.cat([y for _, y in test])
    ee = e2cm.EarlyExit(trained(), train[0][0][:1])
    ee.fit([x for x, _ in train], progress=False, labels=None, clusters=10)
    whole = torch.cat([ee.predict(x).prediction for x, _ in test])
    assert scores(whole, truth).accuracy > 0.8
    point = ee.calibrate([x for x, _ in held_out], flops=0.7, progress=False)
    early = torch.cat([ee.predict(x).prediction for x, _ in test])
    assert point.flops <= 0.7
    assert (early == whole).double().mean() > 0.75  # the same numbers at all exits
    assert scores(early, truth).accuracy > scores(whole, truth).accuracy - 0.15


def test_another_number_of_clusters_than_of_logits():
    train = loader(200)
    ee = e2cm.EarlyExit(net(), images(1)).fit(train, progress=False, labels=None, clusters=3)
    assert ee.num_classes == 3
    assert ee(images(5)).shape == (5, 3)
    assert all(head.num_classes == 3 for head in ee.heads)
    assert ee.costs.heads == tuple(head.flops() for head in ee.heads)
    ee.thresholds = -math.inf
    assert ee(images(5)).shape == (5, 3)
    assert ee.predict(images(5)).log_probs.shape == (5, 3)
    few = ee.at_exits([1])
    assert few(images(5)).shape == (5, 3)
    assert not few.labelled
    # And back again.
    for each in (ee, few):
        each.fit(train, progress=False)
        assert each.num_classes == 10
        assert torch.equal(each(images(5)), net()(images(5)).log_softmax(1))


def test_features_of_a_network_without_its_classifier():
    model = net()
    model.classifier = nn.Identity().eval()
    ee = e2cm.EarlyExit(model, images(1), exits=["block1", "block2"])
    ee.fit([x for x, _ in loader(200)], progress=False, labels=None, clusters=10)
    features = model(images(50))
    nearest = torch.cdist(features, ee.stages[-1].centres.means).argmin(1)
    assert torch.equal(ee(images(50)).argmax(1), nearest)


def test_a_model_is_not_changed_by_clusters():
    model = net()
    before = copy.deepcopy(model.state_dict())
    e2cm.EarlyExit(model, images(1)).fit(loader(), progress=False, labels=None, clusters=4)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, Clustered) for module in model.modules())


def test_clusters_are_saved(tmp_path):
    ee = e2cm.EarlyExit(net(), images(1)).fit(loader(), progress=False, labels=None, clusters=4)
    ee.thresholds = 0.4
    ee.save(tmp_path / "ee")
    again = e2cm.EarlyExit.load(tmp_path / "ee", net())
    assert not again.labelled
    assert again.num_classes == 4
    for wanted, got in zip(ee.predict(images(40)), again.predict(images(40)), strict=True):
        assert same_bits(wanted, got)
    with pytest.raises(ValueError, match="another network"):
        e2cm.EarlyExit.load(tmp_path / "ee", net(1))


def test_streams_of_clusters():
    ee = e2cm.EarlyExit(net(), images(1)).fit(loader(), progress=False, labels=None, clusters=4)
    ee.thresholds = 0.4
    batches = images(60).split(16)
    got = torch.cat([decisions.prediction for decisions in ee.predict_stream(batches)])
    assert torch.equal(got, ee.predict(images(60)).prediction)


@pytest.mark.parametrize("after", [0, 2, 5])
def test_what_is_interrupted_changes_nothing(after):
    """In the pass for the clusters, and in that for the heads (four batches each)."""
    ee = e2cm.EarlyExit(net(), images(1)).fit(loader(), progress=False)
    before = copy.deepcopy(ee.state_dict())
    with pytest.raises(KeyboardInterrupt):
        ee.fit(Interrupted(loader(), after), progress=False, labels=None, clusters=4)
    assert ee.labelled
    assert ee.num_classes == 10
    assert ee.state_dict().keys() == before.keys()
    assert all(same_bits(a, before[n]) for n, a in ee.state_dict().items())


def test_what_does_not_go_together():
    ee = e2cm.EarlyExit(net(), images(1))
    with pytest.raises(TypeError, match="give labels=None"):
        ee.fit(loader(), clusters=4)
    with pytest.raises(ValueError, match="`labels` is 'mine'"):
        ee.fit(loader(), labels="mine")
    with pytest.raises(ValueError, match="`clusters` holds 0"):
        ee.fit(loader(), progress=False, labels=None, clusters=0)
    with pytest.raises(ValueError, match="all its batches are empty"):
        ee.fit([images(0)], progress=False, labels=None, clusters=2)
    with pytest.raises(TypeError, match="can be run through only once"):
        ee.fit(iter(loader()), progress=False, labels=None, clusters=4)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"clusters need sklearn, which .*e2cm_ext\[clusters\]"):
        clusters.k_means(torch.rand(20, 2), 2)


def test_numpy_is_not_needed_to_judge():
    assert isinstance(scores(torch.tensor([0, 1]), torch.tensor([1, 0])).accuracy, float)
    assert not isinstance(scores(torch.tensor([0, 1]), torch.tensor([1, 0])).nmi, np.ndarray)
