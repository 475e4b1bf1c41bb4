"""Rules: certainties by hand, and the same decisions as the ops make."""

import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from scipy.stats import entropy
from support.helpers import INF, NAN, clusters, generator

from e2cm_ext import Decisions, ops
from e2cm_ext.heads.rules import Confidence, Entropy, Rule, as_rule

LOG_PROBS = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1, 0], [NAN, NAN]]).log()


def test_confidence_by_hand():
    certainty = as_rule("confidence").certainty(LOG_PROBS)
    assert certainty.dtype is torch.float32
    assert certainty[:3].tolist() == pytest.approx([0.5, 0.75, 1])
    assert certainty[3].isnan()


def test_entropy_by_hand():
    certainty = as_rule("entropy").certainty(LOG_PROBS)
    assert certainty.dtype is torch.float32
    assert certainty[:3].tolist() == pytest.approx([-math.log(2), 0.75 * math.log(0.75) + 0.25 * math.log(0.25), 0])
    assert certainty[3].isnan()


def test_entropy_against_scipy():
    log_probs = torch.randn(50, 30, generator=generator(0)).mul(5).log_softmax(1)
    expected = -entropy(log_probs.double().exp().numpy(), axis=1)
    torch.testing.assert_close(
        as_rule("entropy").certainty(log_probs).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["confidence", "entropy"])
def test_certainties_of_16_bit_log_probabilities_are_float32(name):
    certainty = as_rule(name).certainty(LOG_PROBS.bfloat16())
    assert certainty.dtype is torch.float32
    assert torch.equal(certainty[:3], as_rule(name).certainty(LOG_PROBS.bfloat16().float())[:3])


@pytest.mark.parametrize("name", ["confidence", "entropy"])
def test_a_certainty_above_the_threshold_is_what_makes_the_ops_let_go(name):
    x, means, scale = clusters(200, 16, 10)
    x[7] = NAN
    the_rule = as_rule(name)
    certainty = the_rule.certainty(ops.class_scores(x, means, scale).log_probs)
    finite = certainty[certainty.isfinite()].sort().values
    # Between two values that occur, where the last place of neither matters; and where nobody and everybody leaves.
    middles = ((finite[1:] + finite[:-1]) / 2)[finite.diff() > 1e-5]
    assert len(middles) > 100
    for threshold in (*middles[::9].tolist(), INF, -INF):
        out = Decisions.empty(200)
        ops.exit_step(x, means, scale, the_rule.limit(threshold), torch.arange(200), out, rule=the_rule.name)
        assert torch.equal(out.exit >= 0, certainty > threshold)


def test_limits():
    assert as_rule("confidence").limit(0.7) == 0.7
    assert as_rule("entropy").limit(-0.7) == 0.7
    assert as_rule("entropy").limit(INF) == -INF
    assert torch.equal(as_rule("entropy").limit(torch.tensor(0.25)), torch.tensor(-0.25))


def test_rules_by_name_and_as_they_are():
    assert as_rule("confidence") == Confidence()
    assert as_rule("entropy") == Entropy()
    assert as_rule("confidence") != as_rule("entropy")
    assert [as_rule(name).name for name in ("confidence", "entropy")] == ["confidence", "entropy"]
    mine = Entropy()
    assert as_rule(mine) is mine
    assert pickle.loads(pickle.dumps(mine)) == copy.deepcopy(mine) == mine


def test_a_rule_of_ones_own():
    @dataclass(frozen=True)
    class Margin(Rule):
        name = "margin"
        over: int = 1

        def certainty(self, log_probs):
            best = log_probs.exp().topk(self.over + 1, dim=1).values
            return best[:, 0] - best[:, self.over]

    assert as_rule(Margin()).certainty(LOG_PROBS)[:3].tolist() == pytest.approx([0, 0.5, 1])
    assert as_rule(Margin()).limit(0.3) == 0.3
    assert Margin(1) == Margin() != Margin(2)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [("margin", ValueError), ("", ValueError), (Confidence, TypeError), (None, TypeError), (3, TypeError)],
)
def test_what_is_no_rule_is_named(wrong, kind):
    with pytest.raises(kind, match=r"`rule` is .*wanted 'confidence', 'entropy', 'gate' or an object of a Rule class"):
        as_rule(wrong)


def test_the_base_has_no_certainty():
    with pytest.raises(TypeError, match="abstract"):
        Rule()
