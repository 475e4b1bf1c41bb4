"""Cascades in fixed shapes: the same answers as the cascade whose batches shrink, in either mode, at any size."""

import math

import pytest
import torch
from support.networks import Scripted, Watched
from support.tensors import INF, NAN

from e2cm_ext import Stages
from e2cm_ext.heads.rules import Confidence, Entropy, Rule
from e2cm_ext.runtime import cascade
from e2cm_ext.runtime.cuda_graphs import FixedCascade


class Logits(Watched):
    def forward(self, x):
        return super().forward(x)[:, 1:]


def scripted(*adds):
    """Stages that raise the first feature, heads that answer with it as probability, and logits behind it."""
    stages = Stages([*(Watched(add) for add in adds), Logits()]).eval()
    return stages, [Scripted(j % 3) for j in range(len(adds))]


def samples(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(rows, 1, generator=g) * 0.6, torch.randn(rows, 3, generator=g)], 1)


class Margin(Rule):
    name = "margin"

    def certainty(self, log_probs):
        first, second = log_probs.exp().topk(2, dim=1).values.unbind(1)
        return first - second


@pytest.mark.parametrize("mode", ["bucket", "masked"])
@pytest.mark.parametrize(
    ("rule", "thresholds"),
    [
        (Confidence(), [0.6, 0.6, 0.65]),
        (Confidence(), [INF, 0.5, INF]),
        (Confidence(), [INF, INF, INF]),
        (Confidence(), [-INF, 0.5, 0.5]),
        (Entropy(), [-0.9, -0.8, -0.9]),
        (Margin(), [0.3, 0.4, 0.5]),
    ],
)
def test_the_answers_of_a_cascade(mode, rule, thresholds):
    stages, heads = scripted(0.1, 0.1, 0.1)
    fixed = FixedCascade(stages, heads, rule, thresholds, samples(1), 3, sizes=[16, 4, 1], mode=mode)
    for rows in (5, 16, 1, 0, 3, 13):  # of one size after another: what is left in memory is not taken for samples
        x = samples(rows, seed=rows)
        expected = cascade.run(stages, heads, rule, thresholds, x.clone(), 3)
        got = fixed(x.clone())
        assert torch.equal(got.prediction, expected.prediction)
        assert torch.equal(got.exit, expected.exit)
        torch.testing.assert_close(got.confidence, expected.confidence)
        torch.testing.assert_close(got.log_probs, expected.log_probs)


def test_a_sample_that_is_not_finite_goes_to_the_end():
    stages, heads = scripted(0.1, 0.1)
    x = samples(4)
    x[2, 0] = NAN
    for mode in ("bucket", "masked"):
        out = FixedCascade(stages, heads, Confidence(), [-INF, -INF], x, 3, sizes=[4], mode=mode)(x)
        assert out.exit.tolist() == [0, 0, 2, 0]


def test_stages_run_at_the_given_sizes_and_not_on_empty_batches():
    stages, heads = scripted(0.0, 0.0)
    x = samples(7)
    x[:, 0] = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9])
    fixed = FixedCascade(stages, heads, Confidence(), [0.8, -INF], x, 3, sizes=[4, 8])
    assert fixed(x).exit.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert [len(seen) for stage in stages for seen in stage.seen] == [8, 4]


def test_feature_maps_in_either_order():
    stages = Stages([torch.nn.Conv2d(3, 4, 3), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))]).eval()
    heads = [pointwise_head()]
    x = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        middle = float(heads[0].score(stages[0](x), Confidence())[0].sort().values[2:4].mean())  # of random features
    for form in (torch.contiguous_format, torch.channels_last):
        some = x.contiguous(memory_format=form)
        for mode in ("bucket", "masked"):
            expected = cascade.run(stages, heads, Confidence(), [middle], some, 3)
            got = FixedCascade(stages, heads, Confidence(), [middle], some, 3, sizes=[4, 8], mode=mode)(some)
            assert torch.equal(got.exit, expected.exit)
            torch.testing.assert_close(got.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
        assert 0 < int((expected.exit == 0).sum()) < 6


def pointwise_head():
    from e2cm_ext import ClassMeans

    head = ClassMeans(3, (4, 4, 4))
    g = torch.Generator().manual_seed(1)
    for pass_index in (0, 1):
        for _ in range(2):
            head.update(torch.randn(12, 4, 4, 4, generator=g), torch.arange(12) % 3, pass_index)
        head.finish(pass_index)
    head.scale.copy_(head.scale / 8)
    return head


def test_wrong_arguments():
    stages, heads = scripted(0.1)
    make = lambda **k: FixedCascade(stages, heads, Confidence(), [0.5], samples(1), 3, **k)  # noqa: E731
    with pytest.raises(ValueError, match=r"`mode` is 'exact'; wanted one of 'bucket', 'masked'"):
        make(mode="exact")
    with pytest.raises(ValueError, match=r"`sizes` is \[\]; wanted batch sizes of 1 or more"):
        make(sizes=[])
    with pytest.raises(ValueError, match=r"`thresholds` has 2 numbers and `heads` 1 heads, for 1 exits"):
        FixedCascade(stages, heads, Confidence(), [0.5, 0.5], samples(1), 3)
    fixed = make(sizes=[2])
    with pytest.raises(ValueError, match=r"`x` has 3 samples; wanted at most 2"):
        fixed(samples(3))
    with pytest.raises(ValueError, match=r"`x` has samples of shape \[5\] on cpu; wanted those of `example`, \[4\]"):
        fixed(torch.zeros(1, 5))
    assert math.isfinite(float(fixed(samples(2)).confidence.sum()))
