"""The cascade: which samples leave where, that nothing is computed in vain, and a slow loop with the same answers."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.networks import CLASSES, SHAPE, Scripted, Watched, images, loader, net, pointwise
from support.tensors import INF, NAN, assert_same_decisions, generator, same_bits
from torch import nn

from e2cm_ext import ClassMeans, Decisions, Head, PooledMeans, Rule, Stages, WhitenedMeans, cut
from e2cm_ext.heads.rules import Confidence, Entropy
from e2cm_ext.ops import reference
from e2cm_ext.runtime import cascade
from e2cm_ext.runtime.compaction_policy import CompactionPolicy

CONFIDENCE, ENTROPY = Confidence(), Entropy()


class Logits(Watched):
    """The last stage: features are the logits."""

    def forward(self, x):
        return super().forward(x)[:, 1:]


def scripted(*adds, answers=(0, 1, 2)):
    """Stages that raise the first feature, heads that answer with it as probability, and logits behind it."""
    stages = Stages([*(Watched(add) for add in adds), Logits()]).eval()
    return stages, [Scripted(answers[j % len(answers)]) for j in range(len(adds))]


def rows(*first):
    """Samples whose first feature is given; behind it logits that favour class 2."""
    return torch.tensor([[p, 0.0, 1.0, 3.0] for p in first])


# ---- by hand -------------------------------------------------------------------------------------


def test_exits_and_answers_of_five_samples_by_hand():
    """Certainties rise by 0.1 at every exit; thresholds 0.8, 0.7, 0.6."""
    stages, heads = scripted(0.1, 0.1, 0.1)
    x = rows(0.2, 0.75, 0.55, 0.1, 0.35)
    out = cascade.run(stages, heads, CONFIDENCE, [0.8, 0.7, 0.6], x, 3)
    # .85 leaves at 0; .55 + .2 = .75 at 1; .35 + .3 = .65 at 2; .2 and .1 reach .5 and .4 and go to the end.
    assert out.exit.tolist() == [3, 0, 1, 3, 2]
    assert out.prediction.tolist() == [2, 0, 1, 2, 2]
    end = math.exp(3) / (1 + math.e + math.exp(3))
    assert out.confidence.tolist() == pytest.approx([end, 0.85, 0.75, end, 0.65])
    assert out.log_probs[1].exp().tolist() == pytest.approx([0.85, 0.075, 0.075])
    assert out.log_probs[0].tolist() == pytest.approx([math.log(end) - 3, math.log(end) - 2, math.log(end)])
    assert [len(stage.seen[0]) for stage in stages] == [5, 4, 3, 2]
    assert [len(head.seen[0]) for head in heads] == [5, 4, 3]
    # In their old order, each with what belongs to it.
    assert stages[3].seen[0][:, 0].tolist() == pytest.approx([0.5, 0.4])


def test_the_threshold_is_strict():
    stages, heads = scripted(0.0)
    out = cascade.run(stages, heads, CONFIDENCE, [0.5], rows(0.5, 0.50001), 3)
    assert out.exit.tolist() == [1, 0]


def test_exits_that_are_off_are_not_computed():
    stages, heads = scripted(0.1, 0.1, 0.1)
    out = cascade.run(stages, heads, CONFIDENCE, [INF, 0.7, INF], rows(0.9, 0.1), 3)
    assert [len(head.seen) for head in heads] == [0, 1, 0]
    assert out.exit.tolist() == [1, 3]  # exits keep their numbers


def test_no_stage_runs_when_all_samples_have_left():
    stages, heads = scripted(0.1, 0.1, 0.1)
    out = cascade.run(stages, heads, CONFIDENCE, [0.8, 0.5, 0.5], rows(0.75, 0.5, 0.9), 3)
    assert out.exit.tolist() == [0, 1, 0]
    assert [len(stage.seen) for stage in stages] == [1, 1, 0, 0]


def test_minus_infinity_lets_all_leave_but_nan():
    stages, heads = scripted(0.0, 0.0)
    x = rows(0.1, NAN, 0.9)
    out = cascade.run(stages, heads, CONFIDENCE, [-INF, -INF], x, 3)
    assert out.exit.tolist() == [0, 2, 0]
    assert out.log_probs.isnan().any(1).tolist() == [False, False, False]  # its logits are fine


def test_the_entropy_rule_counts_in_certainties():
    """A threshold of the rule is a certainty, minus the entropy; the op wants the entropy."""
    stages, heads = scripted(0.0)
    p = torch.tensor([0.9, 0.05, 0.05])
    certainty = float((p * p.log()).sum())
    for threshold, exit in ((certainty - 1e-3, 0), (certainty + 1e-3, 1), (-INF, 0)):
        assert cascade.run(stages, heads, ENTROPY, [threshold], rows(0.9), 3).exit.tolist() == [exit]


def test_a_rule_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class Margin(Rule):
        name = "margin of test_cascade"

        def certainty(self, log_probs):
            first, second = log_probs.exp().topk(2, dim=1).values.unbind(1)
            return first - second

    stages, heads = scripted(0.0)
    # .8 against .1: .7; .6 against .2: .4
    assert cascade.run(stages, heads, Margin(), [0.5], rows(0.8, 0.6), 3).exit.tolist() == [0, 1]


def test_heads_and_thresholds_must_be_as_many_as_exits():
    stages, heads = scripted(0.1, 0.1)
    with pytest.raises(ValueError, match="zip"):
        cascade.run(stages, heads, CONFIDENCE, [0.5], rows(0.1), 3)
    with pytest.raises(ValueError, match="zip"):
        cascade.run(stages, heads[:1], CONFIDENCE, [0.5, 0.5], rows(0.1), 3)


# ---- the network's own answer ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_without_active_exits_it_is_the_network_bit_for_bit(layout):
    model = net()
    stages = cut(model, images(1))
    x = images(33).contiguous(memory_format=layout)
    heads = [ClassMeans(CLASSES, (1,)) for _ in stages.names]  # of no use at all: never asked
    out = cascade.run(stages, heads, CONFIDENCE, [INF] * len(heads), x, CLASSES)
    expected = model(x).log_softmax(1)
    assert same_bits(out.log_probs, expected)
    assert torch.equal(out.prediction, model(x).argmax(1))
    assert same_bits(out.confidence, expected.amax(1).exp())
    assert out.exit.tolist() == [len(heads)] * 33
    assert out.log_probs.requires_grad and not out.confidence.requires_grad


def test_no_copy_of_the_network_s_answer():
    """As much memory as log_softmax itself takes: whose result is handed on."""
    stages = Stages([nn.Identity(), nn.Identity()]).eval()
    gone = cascade.run_cascade(stages, [Scripted()], CONFIDENCE, [INF], rows(0.1), 4)
    assert gone.log_probs() is gone.result().log_probs


def test_the_prediction_is_that_of_the_logits():
    """Rounding makes many log-probabilities equal that were different as logits."""
    logits = torch.zeros(1, 1000, dtype=torch.float16)
    logits[0, 700], logits[0, 800] = 0.001, 0.0011
    assert logits.log_softmax(1).argmax() != 800
    stages = Stages([nn.Identity(), nn.Identity()]).eval()
    out = cascade.run(stages, [Scripted()], CONFIDENCE, [INF], logits, 1000)
    assert out.prediction.tolist() == [800]


@pytest.mark.parametrize("threshold", [INF, 0.5, 0.99, -INF])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_16_bits(dtype, threshold):
    """Answers are stored in float32; log_probs() gives back the dtype of the logits, and the network's own bits."""
    stages, heads = scripted(0.0)
    x = rows(0.9, 0.1, 0.2).to(dtype)
    gone = cascade.run_cascade(stages, heads, CONFIDENCE, [threshold], x, 3)
    out = gone.result()
    assert (out.confidence.dtype, out.log_probs.dtype) == (torch.float32, torch.float32)
    assert gone.log_probs().dtype is dtype
    at_end = out.exit == 1
    assert (
        at_end.tolist() == {INF: [True] * 3, 0.5: [False, True, True], 0.99: [True] * 3, -INF: [False] * 3}[threshold]
    )
    assert same_bits(gone.log_probs()[at_end], x[at_end][:, 1:].log_softmax(1))


@pytest.mark.parametrize("threshold", [INF, 0.5, -INF])
def test_autocast(threshold):
    """The dtype is that of the network's own log_softmax, also where no sample reaches it and features are float32."""
    torch.manual_seed(0)
    stages = Stages([nn.Identity(), nn.Linear(4, 3)]).eval()
    x = rows(0.9, 0.1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        gone = cascade.run_cascade(stages, [Scripted()], CONFIDENCE, [threshold], x, 3)
        expected = stages(x).log_softmax(1)
    assert gone.log_probs().dtype is expected.dtype is torch.bfloat16
    at_end = gone.result().exit == 1
    assert same_bits(gone.log_probs()[at_end], expected[at_end])


@pytest.mark.parametrize("thresholds", [[INF, INF], [0.5, INF], [-INF, 0.5]])
def test_an_empty_batch(thresholds):
    stages, heads = scripted(0.1, 0.1)
    gone = cascade.run_cascade(stages, heads, CONFIDENCE, thresholds, rows(0.1)[:0], 3)
    assert [tuple(t.shape) for t in gone.result()] == [(0,), (0,), (0,), (0, 3)]
    assert gone.log_probs().dtype is torch.float32


def test_no_answer_yet():
    with pytest.raises(RuntimeError, match="all samples have no answer yet"):
        cascade.Cascade(3).result()


# ---- scores ---------------------------------------------------------------------------------------


def test_scores_of_all_exits():
    """Also where the next stage overwrites the features that a head was shown."""

    class Overwrites(nn.Module):
        def forward(self, x):
            return x.mul_(0.5)

    stages = Stages([nn.Identity(), Overwrites(), nn.Identity()]).eval()
    heads = [Scripted(0), Scripted(1)]
    x = rows(0.8, 0.4)
    first, second, last = cascade.scores(stages, heads, x.clone())
    assert first.exp()[:, 0].tolist() == pytest.approx([0.8, 0.4])
    assert second.exp()[:, 1].tolist() == pytest.approx([0.4, 0.2])
    assert same_bits(last, (x / 2).log_softmax(1))


# ---- the slow twin --------------------------------------------------------------------------------


def fitted_heads(stages, batches, kind, classes=CLASSES):
    heads = []
    x = torch.cat([x for x, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    with torch.no_grad():
        for stage in list(stages)[:-1]:
            x = stage(x)
            head = kind(classes, x.shape[1:])
            for pass_index in range(head.passes):
                head.update(x, labels, pass_index)
                head.finish(pass_index)
            heads.append(head)
            x = x.clone()
    return heads


def log_probs_at(head, x):
    """By the reference, for one sample."""
    if isinstance(head, PooledMeans):
        x = x.mean((2, 3))
    return reference.log_probabilities(reference.class_distances(x, head.means), head.scale)


def twin(stages, heads, rule, thresholds, x):
    """One sample after the other, one stage after the other; also how near to a threshold each has come."""
    answers, nearest = [], []
    for sample in x:
        h, margin = sample[None].clone(), INF
        for j, stage in enumerate(stages):
            h = stage(h)
            if j == len(heads):
                log_probs = reference.log_softmax(h)
                break
            log_probs = log_probs_at(heads[j], h.clone())
            confidence, _ = reference.best(log_probs)
            p = log_probs.exp()
            certainty = confidence if rule is CONFIDENCE else torch.where(p > 0, p * log_probs, p).sum(1)
            if not math.isinf(thresholds[j]):
                margin = min(margin, abs(certainty.item() - thresholds[j]))
            if certainty.item() > thresholds[j]:
                break
        answers.append((*reference.best(log_probs), j, log_probs))
        nearest.append(margin)
    confidence, prediction, exit, log_probs = zip(*answers, strict=True)
    out = Decisions(torch.cat(prediction), torch.cat(confidence), torch.tensor(exit), torch.cat(log_probs))
    return out, torch.tensor(nearest)


STAGES = cut(net(), images(1), "all")
HEADS = {kind: fitted_heads(STAGES, loader(), kind) for kind in (ClassMeans, PooledMeans)}


@pytest.mark.parametrize("kind", [ClassMeans, PooledMeans])
@pytest.mark.parametrize("rule", [CONFIDENCE, ENTROPY])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_answers_are_those_of_a_loop_over_stages(kind, rule, layout):
    torch.set_num_threads(1)
    heads = HEADS[kind]
    g = generator(5)
    left_early = 0
    for trial in range(6):
        x = torch.cat([x for x, _ in loader(40, 40, seed=trial)])
        if trial == 5:
            x[3], x[20, 0, 4, 4] = NAN, NAN
        with torch.no_grad():
            certainties = [rule.certainty(s) for s in cascade.scores(STAGES, heads, x)][:-1]
            quantiles = torch.rand(len(heads), generator=g)
            thresholds = [c.nanquantile(0.5 + q.item() / 2).item() for c, q in zip(certainties, quantiles, strict=True)]
            thresholds[trial % len(heads)] = INF
            if trial == 4:
                thresholds[2] = -INF
            expected, nearest = twin(STAGES, heads, rule, thresholds, x)
            got = cascade.run(STAGES, heads, rule, thresholds, x.contiguous(memory_format=layout), CLASSES)
        clear = nearest > 1e-5  # a batch of one goes through other convolution kernels
        assert clear.sum() > 30
        assert torch.equal(got.exit[clear], expected.exit[clear])
        finite = clear & ~expected.log_probs.isnan().any(1)
        assert torch.equal(got.prediction[finite], expected.prediction[finite])
        torch.testing.assert_close(got.log_probs[clear], expected.log_probs[clear], rtol=0, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(got.confidence[clear], expected.confidence[clear], rtol=0, atol=1e-5, equal_nan=True)
        left_early += int((got.exit < len(heads)).sum())
        if trial == 5:
            assert got.exit[[3, 20]].tolist() == [len(heads)] * 2
    assert 60 < left_early < 6 * 40  # the trials were neither all nor nothing


# ---- batch mates ----------------------------------------------------------------------------------

POINTWISE = pointwise()
_g = generator(3)
PATTERNS = torch.randn(3, 3, 4, 5, generator=_g)
SAMPLES = PATTERNS[torch.arange(24) % 3] + 0.8 * torch.randn(24, 3, 4, 5, generator=_g)
POINTWISE_HEADS = fitted_heads(POINTWISE, [(SAMPLES, torch.arange(24) % 3)], ClassMeans, 3)


@given(
    st.lists(st.integers(0, 23), min_size=1, max_size=24, unique=True),
    st.lists(st.sampled_from([INF, -INF, 0.34, 0.4, 0.45, 0.5]), min_size=5, max_size=5),
    st.sampled_from([1, 2]),
)
def test_an_answer_is_the_same_bits_in_any_batch(chosen, thresholds, threads):
    """With stages whose arithmetic is the same for every batch, so is the whole."""
    with torch.no_grad():
        alone = cascade.run(POINTWISE, POINTWISE_HEADS, CONFIDENCE, thresholds, SAMPLES, 3)
        torch.set_num_threads(threads)
        some = cascade.run(POINTWISE, POINTWISE_HEADS, CONFIDENCE, thresholds, SAMPLES[chosen], 3)
    assert_same_decisions(some, Decisions(*(t[chosen] for t in alone)))


def test_in_company_with_real_convolutions():
    x = torch.cat([x for x, _ in loader(60, 60)])
    heads = HEADS[ClassMeans]
    with torch.no_grad():
        certainties = [CONFIDENCE.certainty(s) for s in cascade.scores(STAGES, heads, x)][:-1]
        thresholds = [c.quantile(0.8).item() for c in certainties]
        whole = cascade.run(STAGES, heads, CONFIDENCE, thresholds, x, CLASSES)
        _, nearest = twin(STAGES, heads, CONFIDENCE, thresholds, x)
        few = cascade.run(STAGES, heads, CONFIDENCE, thresholds, x[7:20], CLASSES)
    clear = nearest[7:20] > 1e-5
    assert torch.equal(few.exit[clear], whole.exit[7:20][clear])
    assert torch.equal(few.prediction[clear], whole.prediction[7:20][clear])
    torch.testing.assert_close(few.log_probs[clear], whole.log_probs[7:20][clear], rtol=0, atol=1e-5)
    assert len(whole.exit.unique()) > 2
    assert x.shape[1:] == SHAPE


# ---- carrying leavers along -----------------------------------------------------------------------


def tables(seed: int, exits: int, rows: int, scale: float) -> CompactionPolicy:
    g = generator(seed)
    passed = torch.rand(exits + 1, rows + 1, generator=g).cumsum(0).cumsum(1)
    moving = scale * torch.rand(exits, rows + 1, generator=g).cumsum(1)
    return CompactionPolicy(tuple(map(tuple, passed.tolist())), tuple(map(tuple, moving.tolist())))


class Moving(ClassMeans):
    """Has no `decide` of its own: survivors move at its exit."""

    def step(self, *args, **options):
        return super().step(*args, **options)


@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from([INF, -INF, 0.34, 0.4, 0.45, 0.5]), min_size=5, max_size=5),
    st.sampled_from([0.0, 0.3, 2.0, 1e9]),
    st.sampled_from([CONFIDENCE, ENTROPY]),
    st.sampled_from([0, 1, 2, 24]),
    st.booleans(),
)
def test_exited_rows_that_stay_in_the_batch_change_nothing(seed, thresholds, scale, rule, count, mixed):
    """Whatever moving costs, and also where a NaN turns up in an exited row."""
    x = SAMPLES[:count].clone()
    x[1::5, 0, 0, 0] = NAN
    if rule is ENTROPY:
        thresholds = [t if math.isinf(t) else 2.2 * t - 1.8 for t in thresholds]
    heads = list(POINTWISE_HEADS)
    if mixed:
        heads[2] = copy.deepcopy(heads[2])
        heads[2].__class__ = Moving
    with torch.no_grad():
        expected = cascade.run(POINTWISE, heads, rule, thresholds, x, 3)
        carried = tables(seed, 5, 24, scale)
        got = cascade.run(POINTWISE, heads, rule, thresholds, x, 3, compaction=carried)
    assert_same_decisions(got, expected)
    assert all(column._base is None and column.untyped_storage().size() == column.nbytes for column in got)


def test_exited_rows_are_dropped_when_that_pays_by_hand():
    """Moving costs 3.5, a sample 1 per stage: one leaver is carried past exits 1 and 2 and dropped at exit 3, for what
    was paid; its later output, which would leave again with another answer, is discarded."""
    stages, heads = scripted(0.0, 0.0, 0.0, 0.0, 0.0)
    heads = [Carries(head.answer) for head in heads]
    costs = CompactionPolicy(tuple((0.0, float(j)) for j in range(1, 7)), ((3.5,) * 4,) * 5)
    x = rows(0.9, 0.1, 0.2)
    out = cascade.run(stages, heads, CONFIDENCE, [0.8, 0.7, INF, 0.6, 0.6], x, 3, compaction=costs)
    assert [len(stage.seen[0]) for stage in stages] == [3, 3, 3, 3, 2, 2]
    assert out.exit.tolist() == [0, 5, 5] and out.prediction[0] == 0
    assert_same_decisions(out, cascade.run(stages, heads, CONFIDENCE, [0.8, 0.7, INF, 0.6, 0.6], x, 3))


class Carries(Scripted):
    def decide(self, x, threshold, ids, out, *, rule, exit):
        return super().decide(x, threshold, ids, out, rule=rule, exit=exit)


@pytest.mark.parametrize("kind", [ClassMeans, PooledMeans, WhitenedMeans])
@pytest.mark.parametrize("rule", [CONFIDENCE, ENTROPY])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_to_decide_is_a_step_without_moving(kind, rule, layout):
    x, labels = next(iter(loader(200, 200)))
    x = x.repeat(1, 4, 1, 1).contiguous(memory_format=layout)
    x += 4 * torch.randn(x.shape, generator=generator(2))  # or all are sure
    head = kind(CLASSES, x.shape[1:])
    for pass_index in range(head.passes):
        head.update(x, labels, pass_index)
        head.finish(pass_index)
    x[3, 0, 0, 0], x[5, 1, 2, 2], x[9] = NAN, INF, 1e30
    certainty, _ = head.score(x, rule)
    for threshold in (certainty.nanmedian().item(), -INF):
        moved, alone = Decisions.empty(210, CLASSES), Decisions.empty(210, CLASSES)
        ids = torch.randperm(210, generator=generator(1))[:200]
        _, kept = head.step(x, threshold, ids, moved, rule=rule, exit=2)
        assert torch.equal(head.decide(x, threshold, ids, alone, rule=rule, exit=2), kept)
        assert_same_decisions(alone, moved)
        assert 0 < len(kept) < 200


def test_a_step_of_ones_own_is_not_passed_over():
    """The inherited way to decide would not know of it."""
    assert Moving.decide is Head.decide and WhitenedMeans.decide is not Head.decide
