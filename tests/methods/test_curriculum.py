import math

import pytest
import torch
from support.helpers import generator
from support.small import CLASSES, SHAPE, digits, trained
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import e2cm_ext as e2cm
from e2cm_ext.methods import curriculum, sdn, training


def all_digits():
    return (torch.cat(column) for column in zip(*digits()[0], strict=True))


# ---- pacing ---------------------------------------------------------------------------------------------------------


def test_sizes_by_hand():
    """4% of 1000, 1.9 times as many after every 10 batches: 40, 76, 144.4, 274.36, 521.284, 990.4396, all."""
    sizes = [curriculum.subset_size(10 * step, 1000, 0.04, 1.9, 10) for step in range(9)]
    assert sizes == [40, 76, 144, 274, 521, 990, 1000, 1000, 1000]
    assert [curriculum.subset_size(batch, 1000, 0.04, 1.9, 10) for batch in (9, 10, 19, 20)] == [40, 76, 76, 144]
    assert curriculum.subset_size(0, 5) == 1
    assert curriculum.subset_size(10**9, 5) == 5  # 1.9 to that power is more than a float can hold
    assert curriculum.subset_size(0, 50, start=1.0) == 50


@pytest.mark.parametrize("order", ["curriculum", "anti", "random"])
def test_batches_come_from_the_part_that_the_pace_allows(order):
    difficulty = torch.rand(500, generator=generator(0))
    pacing = curriculum.Pacing(difficulty, 16, order=order, every=5, start=0.1, growth=2.0)
    ranks = {
        "curriculum": difficulty.argsort(),
        "anti": difficulty.argsort(descending=True),
        "random": pacing.order,
    }[order]
    assert torch.equal(pacing.order, ranks)
    where = ranks.argsort()  # sample -> place in the order
    batches = []
    for epoch in (0, 1):
        pacing.set_epoch(epoch)
        batches += list(pacing)
    assert len(batches) == 2 * len(pacing) == 2 * math.ceil(500 / 16)
    for number, rows in enumerate(batches):
        among = min(500, round(0.1 * 2.0 ** (number // 5) * 500))
        assert len(set(rows)) == len(rows) == 16
        assert where[rows].max() < among
    first = torch.tensor(batches[:5]).flatten()
    assert len(first.unique()) > 35  # of the 50 that there are: drawn evenly, not the first ones
    late = torch.tensor(batches[30:]).flatten()
    assert where[late].max() > 480


def test_orders_are_what_they_say():
    difficulty = torch.arange(100.0)
    assert curriculum.Pacing(difficulty).order[:3].tolist() == [0, 1, 2]
    assert curriculum.Pacing(difficulty, order="anti").order[:3].tolist() == [99, 98, 97]
    random = curriculum.Pacing(difficulty, order="random", seed=1).order
    assert torch.equal(random.sort().values, torch.arange(100)) and random[:20].double().mean() > 25
    assert torch.equal(random, curriculum.Pacing(difficulty, order="random", seed=1).order)


def test_the_same_seed_and_epoch_give_the_same_batches():
    pacing = curriculum.Pacing(torch.rand(100), 8)
    assert list(pacing) == list(pacing)
    again = list(pacing)
    pacing.set_epoch(1)
    assert list(pacing) != again


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(start=0.0), "start=0.0"),
        (dict(start=1.5), "start=1.5"),
        (dict(growth=1.0), "growth=1.0"),
        (dict(every=0), "every=0"),
        (dict(order="hard"), "'curriculum', 'anti' or 'random'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        curriculum.Pacing(torch.rand(10), **options)
    with pytest.raises(ValueError, match="`difficulty`"):
        curriculum.Pacing(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="holds 3 numbers; the data 4 samples"):
        curriculum.paced(TensorDataset(torch.zeros(4), torch.zeros(4)), torch.rand(3))


# ---- difficulty -----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_network_s_own():
    model = trained()
    found = curriculum.loss_of(model, digits()[0], progress=False)
    x, y = all_digits()
    with torch.no_grad():
        probabilities = model(x).double().softmax(1)
    expected = -probabilities[torch.arange(len(y)), y].log()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


class Line(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(2, classes)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_transfer_score_is_minus_the_margin(classes):
    """Clusters on a line: who is near another class is difficult, who is beyond it is more so."""
    pytest.importorskip("sklearn")
    g = generator(0)
    labels = torch.arange(240) % classes
    x = torch.stack([4.0 * labels + torch.randn(240, generator=g), torch.randn(240, generator=g)], 1)
    model = Line(classes).eval()
    found = curriculum.transfer_of(model, list(zip(x.split(50), labels.split(50), strict=True)), progress=False)
    assert found.shape == (240,)
    first = labels == 0
    ranks = torch.stack([found[first].argsort().argsort(), x[first, 0].argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.9  # the further to the right, the nearer to the next class
    middle = (x[:, 0] - 4.0 * labels).abs() < 0.5
    assert found[middle].max() < found.max() and found.max() > 0
    with pytest.raises(ValueError, match=r"without a torch.nn.Linear"):
        curriculum.transfer_of(nn.Identity().eval(), [])


def test_both_scores_find_the_same_samples_difficult():
    pytest.importorskip("sklearn")
    model = trained()
    by_loss = curriculum.loss_of(model, digits()[0], progress=False)
    by_transfer = curriculum.transfer_of(model, digits()[0], progress=False)
    ranks = torch.stack([score.argsort().argsort().double() for score in (by_loss, by_transfer)])
    assert torch.corrcoef(ranks)[0, 1] > 0.3
    with torch.no_grad():
        x, y = all_digits()
        wrong = model(x).argmax(1) != y
    for score in (by_loss, by_transfer):
        assert score[wrong].mean() > score[~wrong].mean()


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
def test_any_training_takes_it(kept):
    model = trained()
    ee = sdn.build(model, torch.zeros(1, *SHAPE), exits="blocks")
    for head in ee.heads:
        head.fitted = True
    at_first = ee.record(digits()[2], progress=False).accuracy
    difficulty = curriculum.loss_of(model, digits()[0], progress=False)
    x, y = all_digits()
    data = training.cache(ee, digits()[0], progress=False) if kept else TensorDataset(x, y)
    loader = curriculum.paced(data, difficulty, 64, every=5)
    losses = sdn.train(ee, loader, epochs=4, lr=1e-2, progress=False)
    accuracy = ee.record(digits()[2], progress=False).accuracy
    assert (accuracy[:-1] > at_first[:-1] + 0.4).all(), f"{at_first} {accuracy}"
    assert len(losses) == 4


def test_the_same_batches_from_images_and_from_kept_features():
    x, y = all_digits()
    difficulty = F.cross_entropy(torch.randn(len(y), CLASSES, generator=generator(1)), y, reduction="none")
    ee = sdn.build(trained(), torch.zeros(1, *SHAPE), exits="blocks")
    cached = training.cache(ee, digits()[0], progress=False)
    of_images = curriculum.paced(TensorDataset(x, y), difficulty, 64)
    of_features = curriculum.paced(cached, difficulty, 64)
    assert len(of_images) == len(of_features)
    for epoch in (0, 1):
        of_images.batch_sampler.set_epoch(epoch)
        of_features.set_epoch(epoch)
        for (images, labels), (features, truth) in zip(of_images, of_features, strict=True):
            assert torch.equal(labels, truth)
            with torch.no_grad():
                torch.testing.assert_close(features[-1], ee.stages(images), rtol=1e-3, atol=1e-4)


def test_the_name_is_not_on_the_face():
    """Methods are imported from e2cm_ext.methods, one by one."""
    assert not hasattr(e2cm, "curriculum")
