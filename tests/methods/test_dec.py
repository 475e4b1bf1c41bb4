"""DEC with early exits: formulas, what learns and what does not, when it ends, and digits that nobody has labelled."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from support.helpers import generator, same_bits
from support.small import digits
from torch import nn
from torch.nn import functional as F

import e2cm_ext as e2cm
from e2cm_ext import ops
from e2cm_ext.clusters import scores
from e2cm_ext.methods import dec
from e2cm_ext.methods.dec.run import TrainingRun

SMALL = dec.Schedule(
    layer_epochs=1, epochs=1, exit_epochs=1, k_means_starts=1, target_interval=3, max_targets=2, batch_size=32
)
WIDTHS = (12, 14, 16)


def images(count=200, seed=0):
    """Four kinds of them."""
    g = generator(seed)
    kinds = torch.rand(4, 1, 4, 4, generator=generator(99))
    return (kinds[torch.arange(count) % 4] + 0.1 * torch.randn(count, 1, 4, 4, generator=g)).clamp(min=0)


def built(seed=0):
    return dec.build(images(1), clusters=4, widths=WIDTHS, code=3, seed=seed)


def train(ee, rows, **options):
    return dec.train(ee, [rows], **{"schedule": SMALL, "progress": False, **options})


# ---- formulas -------------------------------------------------------------------------------------------------------


def test_soft_assignment_by_hand():
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    # Squares of distances 0 and 9: 1 and 1/10. Then 1 and 4: 1/2 and 1/5.
    q = dec.soft_assignment(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), centres)
    torch.testing.assert_close(q, torch.tensor([[10 / 11, 1 / 11], [5 / 7, 2 / 7]]))


def test_target_by_hand():
    q = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    # f = 1.2, 0.8; q^2 / f: 8/15, 1/20 and 2/15, 9/20.
    wanted = torch.tensor([[32 / 35, 3 / 35], [8 / 35, 27 / 35]])
    torch.testing.assert_close(dec.target(q), wanted)


def test_divergence_is_that_of_torch_and_knows_zero():
    p, q = torch.rand(2, 20, 5, generator=generator(0)).softmax(2).unbind()
    torch.testing.assert_close(dec.divergence(p, q), F.kl_div(q.log(), p, reduction="batchmean"))
    assert dec.divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])) == pytest.approx(math.log(2))


def test_gradients_are_those_of_the_paper():
    """Xie et al., equations 4 and 5, with alpha = 1; ours is the mean over the samples, theirs the sum."""
    codes = torch.randn(7, 3, generator=generator(0), dtype=torch.float64, requires_grad=True)
    centres = torch.randn(4, 3, generator=generator(1), dtype=torch.float64, requires_grad=True)
    q = dec.soft_assignment(codes, centres)
    p = dec.target(q.detach())
    (7 * dec.divergence(p, q)).backward()
    with torch.no_grad():
        between = codes[:, None] - centres
        mean_shrinkage = 2 * ((p - q) / (1 + between.square().sum(2)))[:, :, None] * between
    torch.testing.assert_close(codes.grad, mean_shrinkage.sum(1))
    torch.testing.assert_close(centres.grad, -mean_shrinkage.sum(0))


def test_a_step_brings_a_code_nearer_to_its_centre():
    codes = torch.tensor([[1.0, 0.0], [0.2, 0.1], [3.1, 0.0]], requires_grad=True)
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    q = dec.soft_assignment(codes, centres)
    dec.divergence(dec.target(q.detach()), q).backward()
    assert (codes - 0.1 * codes.grad)[0].norm() < codes[0].norm()


# ---- the network ----------------------------------------------------------------------------------------------------


def test_the_encoders_of_the_paper():
    ee = dec.build(torch.zeros(1, 1, 28, 28))
    assert ee.exit_names == ("small", "middle")
    layers = [784 * 500, 500 * 500, 500 * 2000 + 2000 * 10]
    assert ee.costs.stages == tuple(2 * size for size in layers)
    assert ee.costs.heads == (2 * 500 * 10 + 290,) * 2  # K (3 D - 1) = 10 * 29
    small, middle, end = ee.costs.fractions.tolist()
    base = 2 * sum(layers)
    assert small == (2 * (392_000 + 5000) + 290) / base
    assert middle == (2 * (392_000 + 250_000 + 10_000) + 580) / base
    assert end == (base + 20_580) / base


def test_answers_are_those_of_the_large_encoder():
    ee = built()
    train(ee, images())
    x = images(50, seed=1)
    first, second, last = ee.stages
    codes = last.network(second(first(x)))
    q = dec.soft_assignment(codes, last.centres.means)
    torch.testing.assert_close(ee(x).exp(), q, rtol=1e-4, atol=1e-6)


def test_exits_are_class_means_of_their_codes():
    """Equations 4 and 5 of E2CM: distances over their average in the training data, softmax of what is below 0."""
    ee, rows = built(), images()
    train(ee, rows)
    x = rows
    for stage, head in zip(ee.stages, ee.heads, strict=False):
        x = stage(x)
        codes = head.encoder(x)
        distances = torch.cdist(codes.double(), head.means.double())
        torch.testing.assert_close(head.scale.double(), distances.mean(0), rtol=1e-5, atol=0)
        wanted = (-distances / distances.mean(0)).log_softmax(1)
        torch.testing.assert_close(head(x).double(), wanted, rtol=1e-4, atol=1e-5)


def test_code_means_can_be_fitted_like_any_head():
    head = dec.CodeMeans(3, (5,), code=2)
    x, labels = torch.randn(60, 5, generator=generator(0)), torch.arange(60) % 3
    for pass_index in range(2):
        head.update(x, labels, pass_index)
        head.finish(pass_index)
    codes = head.encoder(x).detach()
    for k in range(3):
        torch.testing.assert_close(head.means[k], codes[labels == k].mean(0))
    assert same_bits(e2cm.heads.from_config(head.config()).eval().to(x.device).means, torch.zeros(3, 2))


# ---- training -------------------------------------------------------------------------------------------------------


def test_frozen_layers_are_frozen():
    """What the exits learn leaves the large encoder as it was, bit for bit."""
    ee, rows = built(), images()
    run = TrainingRun(ee, rows, None, SMALL, 0, None, False)
    torch.manual_seed(0)
    for step, which in run.steps()[:3]:
        step(which)
    before = {name: value.clone() for name, value in ee.stages.state_dict().items()}
    encoders = [head.encoder.weight.clone() for head in ee.heads]
    assert any(not same_bits(value, built().stages.state_dict()[name]) for name, value in before.items())
    for step, which in run.steps()[3:]:
        step(which)
    assert all(same_bits(value, before[name]) for name, value in ee.stages.state_dict().items())
    assert not any(same_bits(head.encoder.weight, old) for head, old in zip(ee.heads, encoders, strict=True))


def test_it_ends_when_hardly_anything_changes():
    rows = images()
    ends = train(built(), rows, schedule=replace(SMALL, max_targets=50, tolerance=0.9)).changed
    assert [len(each) for each in ends] == [2, 2, 2]  # not at the first target, which nothing has been learned from
    goes_on = train(built(), rows, schedule=replace(SMALL, max_targets=7, tolerance=0.0)).changed
    assert [len(each) for each in goes_on] == [7, 7, 7]
    for each in train(built(), rows, schedule=replace(SMALL, max_targets=50, tolerance=0.02)).changed:
        assert each[-1] < 0.02 or len(each) == 50
        assert all(share >= 0.02 for share in each[1:-1])


def test_clusters_have_the_same_numbers_at_all_exits():
    ee, rows = built(), images()
    found = train(ee, rows)
    record = ee.record([rows], progress=False)
    assert torch.equal(record.label, found.assignment[0])
    for which, exit in ((1, 1), (2, 0)):
        x = rows
        for stage in list(ee.stages)[: exit + 1]:
            x = stage(x)
        codes, means = ee.heads[exit].encoder(x), ee.heads[exit].means
        assert torch.equal(ops.class_distances(codes, means).argmin(1), found.assignment[which])
        agree = (found.assignment[which] == found.assignment[0]).double().mean()
        assert agree == pytest.approx(scores(found.assignment[which], found.assignment[0]).accuracy)


def test_no_label_is_looked_at(tmp_path):
    rows = images()
    one, other = built(), built()
    a = train(one, rows)
    b = dec.train(other, [(rows, torch.full((200,), 10**6))], schedule=SMALL, progress=False)
    assert all(torch.equal(x, y) for x, y in zip(a.assignment, b.assignment, strict=True))
    assert same_bits(one(rows), other(rows))


def test_it_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    rows, path = images(), tmp_path / "dec"
    whole = built()
    wanted = train(whole, rows, seed=3)
    fine_tune = TrainingRun._fine_tune

    def interrupted(run, which):
        if which == 1:
            raise KeyboardInterrupt
        fine_tune(run, which)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingRun, "_fine_tune", interrupted)
        train(built(), rows, seed=3, checkpoint=path)
    again = built(seed=1)
    got = train(again, rows, seed=3, checkpoint=path)
    assert got.changed == wanted.changed
    assert all(torch.equal(x, y) for x, y in zip(got.assignment, wanted.assignment, strict=True))
    for (name, value), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert same_bits(value, other), name
    with pytest.raises(ValueError, match="of another training"):
        train(built(), rows, seed=4, checkpoint=path)


def test_random_numbers_are_left_as_they_were():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(built(), images(100))
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_and_distortion_train_too():
    ee = built()
    train(ee, images(), precision=torch.bfloat16, distort=functools.partial(dec.shifted, pixels=1))
    assert ee(images()).isfinite().all()
    assert all(head.fitted for head in ee.heads)


def test_shifted_images():
    x = torch.zeros(64, 1, 9, 9)
    x[:, :, 4, 4] = 1
    moved = dec.shifted(x, pixels=2, degrees=0)
    rows, columns = (torch.arange(9.0) for _ in range(2))
    mass = moved.sum((1, 2, 3))
    down = (moved.sum((1, 3)) * rows).sum(1) / mass - 4
    right = (moved.sum((1, 2)) * columns).sum(1) / mass - 4
    for way in (down, right):
        assert way.abs().max() <= 2
        assert way.max() > 1
        assert way.min() < -1
    torch.testing.assert_close(dec.shifted(x, pixels=0, degrees=0), x)
    assert same_bits(x, x.clone())


def test_what_cannot_be_trained():
    with pytest.raises(TypeError, match=r"not what dec\.build makes"):
        ee = e2cm.EarlyExit(e2cm.Stages([nn.Linear(4, 4), nn.Linear(4, 2)]).eval(), torch.zeros(1, 4))
        dec.train(ee, [torch.zeros(9, 4)], progress=False)
    with pytest.raises(ValueError, match="NaN or infinity"):
        train(built(), images().fill_(math.nan))
    with pytest.raises(ValueError, match="there are only 1 different samples"):
        train(built(), torch.ones(50, 1, 4, 4))
    with pytest.raises(ValueError, match="`widths` is"):
        dec.build(images(1), widths=(5,))


# ---- digits ---------------------------------------------------------------------------------------------------------


def trained_on_digits(seed):
    """The network, the images that it has seen, and others with what they show."""
    train_on, held_out, test = digits()
    x = torch.cat([images for images, _ in [*train_on, *held_out]]) * 0.38 + 0.3  # from 0 to 1
    unseen = torch.cat([images for images, _ in test]) * 0.38 + 0.3, torch.cat([labels for _, labels in test])
    ee = dec.build(x[:1], widths=(100, 100, 400), seed=seed)
    schedule = dec.Schedule(
        layer_epochs=40,
        epochs=30,
        exit_epochs=2,
        k_means_starts=5,
        lr=2e-3,
        cluster_lr=5e-4,
        target_interval=10,
        max_targets=10,
    )
    dec.train(ee, [x], schedule=schedule, seed=seed, progress=False)
    return ee, x, unseen


@pytest.fixture(scope="module")
def of_digits():
    return trained_on_digits(0)


def accuracy(ee, unseen):
    x, y = unseen
    return scores(ee.predict(x).prediction, y).accuracy


def test_digits_fall_into_their_classes(of_digits):
    """How well they do depends on where pretraining ends, and that on how a machine rounds: the best of three runs."""
    ee, _, unseen = of_digits
    found = [accuracy(ee, unseen)]
    while found[-1] < 0.75 and len(found) < 3:
        ee, _, unseen = trained_on_digits(len(found))
        found.append(accuracy(ee, unseen))
    assert max(found) >= 0.75, found


def test_most_digits_can_leave_early(of_digits):
    ee, seen, (x, y) = of_digits
    whole = scores(ee(x).argmax(1), y).accuracy
    curve = ee.curve([seen], method="paper", progress=False)
    middle = (curve.front.flops[0] + 1) / 2
    for flops, loss in ((middle, 0.12), (1.0, 0.03)):
        ee.thresholds = curve.best_within(float(flops)).thresholds
        assert ee.evaluate([x], progress=False).flops < flops + 0.1
        assert scores(ee.predict(x).prediction, y).accuracy > whole - loss


def test_clusters_can_be_kept(of_digits, tmp_path):
    ee, _, (x, _) = of_digits
    ee.thresholds = 0.15
    ee.save(tmp_path / "dec")
    again = e2cm.EarlyExit.load(tmp_path / "dec", ee.stages)
    assert not again.labelled
    assert same_bits(again.predict(x).prediction, ee.predict(x).prediction)
