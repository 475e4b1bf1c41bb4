import math

import pytest
import torch
from support.learned_exits import check_all_ways
from support.networks import SHAPE, Net, digits, net, net_in_stages
from support.tensors import entropy_of, same_bits
from torch import nn
from torch.nn import functional as F

import e2cm_ext as e2cm
from e2cm_ext.methods import branchynet, training


@pytest.fixture(scope="module")
def learned():
    ee = branchynet.build(Net().eval(), torch.zeros(1, *SHAPE))
    for head in ee.heads:
        head.fitted = True
    at_first = ee.record(digits()[2], progress=False).accuracy
    branchynet.train(ee, digits()[0], epochs=6, lr=0.1, progress=False)
    return ee, at_first


def test_branches_stand_behind_the_stem_and_at_a_third():
    ee = branchynet.build(net(), torch.zeros(1, *SHAPE))
    assert ee.exit_names == ("stem", "block1")  # .02, and .28 of .28, .70, .98
    assert branchynet.build(net_in_stages(), torch.zeros(1, *SHAPE)).exit_names == ("near", "far")
    assert ee.rule.name == "entropy"
    assert branchynet.build(net(), torch.zeros(1, *SHAPE), exits=["block2"]).exit_names == ("block2",)


def test_a_branch_by_torch_functions():
    torch.manual_seed(0)
    head = branchynet.Branch(5, (3, 6, 10)).eval()
    conv, norm, *_, linear = head.layers
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 6, 10)
    y = F.conv2d(x, conv.weight, padding=1)
    shift, spread = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    y = F.adaptive_avg_pool2d(((y - shift) / (spread + 1e-5).sqrt()).clamp(min=0), 4).flatten(1)
    torch.testing.assert_close(head.logits(x), y @ linear.weight.T + linear.bias, rtol=1e-4, atol=1e-5)
    assert head.flops() == 2 * (9 * 3 * 3 * 60 + 3 * 16 * 5)
    assert branchynet.Branch(5, (3, 2, 9)).logits(torch.randn(1, 3, 2, 9)).shape == (1, 5)
    with pytest.raises(ValueError, match="a branch needs maps"):
        branchynet.Branch(5, (64,))


def test_loss_by_hand():
    half, sure = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    expected = math.log(2) / 6 + math.log(4 / 3) / 4 + math.log(4 / 3)
    found = branchynet.loss([half, sure, sure], torch.tensor([0]), branchynet.WEIGHTS)
    assert float(found) == pytest.approx(expected)


def test_training_is_sgd_on_the_weighted_sum():
    """Two steps, network and batch normalisation included, against torch's own, written down."""
    ee, twin = (branchynet.build(net(), torch.zeros(1, *SHAPE)) for _ in range(2))
    for module in [*ee.modules(), *twin.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    branchynet.train(ee, digits()[0][:2], epochs=1, lr=0.01, weights=(0.5, 0.25, 1), progress=False)
    joint = training.Joint(twin).train()
    optimizer = torch.optim.SGD(joint.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    for x, y in digits()[0][:2]:
        first, second, last = joint(x.clone())
        optimizer.zero_grad()
        (0.5 * F.cross_entropy(first, y) + 0.25 * F.cross_entropy(second, y) + F.cross_entropy(last, y)).backward()
        optimizer.step()
    for (name, a), b in zip(ee.state_dict().items(), twin.state_dict().values(), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    with pytest.raises(ValueError, match="`weights` has length 2; wanted 3"):
        branchynet.train(ee, [], weights=(1, 1))


def test_network_and_branches_learn(learned):
    ee, at_first = learned
    accuracy = ee.record(digits()[2], progress=False).accuracy
    assert (accuracy > at_first + 0.3).all(), f"{at_first} {accuracy}"
    assert accuracy[-1] > 0.8


def test_a_sample_leaves_where_the_entropy_is_low(learned):
    ee, _ = learned
    images, _ = digits()[2][0]
    limits = [1.2, 0.8]
    ee.thresholds = [-limit for limit in limits]
    decisions = ee.predict(images)
    entropies = [entropy_of(scores) for scores in e2cm.runtime.cascade.scores(ee.stages, ee.heads, images)]
    near = [(entropy - limit).abs().min() for entropy, limit in zip(entropies, limits, strict=False)]
    assert min(near) > 1e-5  # no decision is a matter of rounding
    expected = torch.where(entropies[0] < limits[0], 0, torch.where(entropies[1] < limits[1], 1, 2))
    assert torch.equal(decisions.exit, expected)
    assert len(set(expected.tolist())) > 1
    ee.thresholds = math.inf


def test_all_ways_to_run_the_network_agree(learned, tmp_path):
    ee, _ = learned
    check_all_ways(ee, digits()[1], tmp_path / "ee", flops=0.9)
    ee.thresholds = math.inf
    assert same_bits(ee(digits()[1][0][0]), ee.stages(digits()[1][0][0]).log_softmax(1))
