"""Compiled stages: the same answers, for any batch size without compiling anew, and nothing else has changed."""

import copy
import pickle

import pytest
import torch
from support.networks import bits_of, digits, net, samples, trained
from support.tensors import assert_same_decisions, same_bits
from torch import nn

from e2cm_ext import EarlyExit, Stages, cut
from e2cm_ext.stages.compiled import folded


def wrapped(model=None):
    fit_on, calibrate_on, _ = digits()
    ee = EarlyExit(model or trained(), fit_on[0][0][:1]).fit(fit_on[:4], progress=False)
    ee.calibrate(calibrate_on, flops=0.7, progress=False)
    return ee


IMAGES = torch.cat([x for x, _ in digits()[2][:2]])


class Counting:
    """A backend that compiles nothing, and counts the graphs that it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def assert_close(got, expected):
    """Folding rounds otherwise."""
    same = got.exit == expected.exit
    assert same.float().mean() > 0.97
    torch.testing.assert_close(got.log_probs[same], expected.log_probs[same], rtol=0, atol=1e-3)


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("sizes", [(7, 1, 64, 2, 33, 5, 1), (1, 2, 3, 150)])
def test_one_graph_for_any_batch_and_one_for_one_sample(sizes):
    ee = wrapped()
    expected = [ee.predict(IMAGES[:size]) for size in sizes]
    ee.thresholds = ee.thresholds.clamp(max=1e30)  # every head is asked
    counting = Counting()
    assert ee.compile(backend=counting) is ee
    for size, decisions in zip(sizes, expected, strict=True):
        assert_same_decisions(ee.predict(IMAGES[:size]), decisions)
    # torch takes other kernels for few samples than for many, if it runs on one thread.
    assert len(ee.stages) < counting.graphs <= 3 * len(ee.stages)
    before = counting.graphs
    for size in (9, 21, 1, 50):
        assert ee(IMAGES[:size]).shape == (size, 10)
    assert counting.graphs <= before + len(ee.stages)
    assert ee(IMAGES[:0]).shape == (0, 10)


def test_stages_that_share_their_code_are_not_compiled_over_and_over():
    """torch gives up on a function after eight variants."""
    torch.manual_seed(0)
    stages = Stages([*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(12)), nn.Linear(4, 3)]).eval()
    ee = EarlyExit(stages, torch.randn(2, 4), head="class_means")
    counting = Counting()
    ee.compile(backend=counting)
    x = torch.randn(6, 4)
    assert same_bits(ee(x), stages(x).log_softmax(1))
    assert counting.graphs == 13


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"fold": True}, {"fold": True, "channels_last": True}])
def test_everything_that_runs_the_network_runs_what_was_compiled(options):
    ee, plain, counting = wrapped(), wrapped(), Counting()
    before = bits_of(ee)
    ee.compile(backend=counting, **options)
    assert_close(ee.predict(IMAGES), plain.predict(IMAGES))
    assert counting.graphs > 0
    (streamed,) = ee.predict_stream([IMAGES])
    assert_close(streamed, plain.predict(IMAGES))
    record = ee.record(digits()[2][:1], progress=False)
    torch.testing.assert_close(
        record.confidence, plain.record(digits()[2][:1], progress=False).confidence, rtol=0, atol=1e-3
    )
    for name, bits in bits_of(ee).items():
        assert same_bits(bits, before[name]), name
    assert list(ee.state_dict()) == list(plain.state_dict())
    assert ee.profile(IMAGES[:4], 4, repeats=1, progress=False).names == ee.exit_names


def test_copies_and_files(tmp_path):
    model = trained()
    ee = wrapped(model)
    expected = ee.predict(IMAGES)
    ee.compile(backend="eager", fold=True)
    for other in (copy.deepcopy(ee), pickle.loads(pickle.dumps(ee))):
        assert other._compiled is None
        assert_same_decisions(other.predict(IMAGES), expected)
    ee.save(tmp_path / "digits.e2cm")  # of the model itself, not of what was made of it
    assert_same_decisions(EarlyExit.load(tmp_path / "digits.e2cm", model).predict(IMAGES), expected)
    few = ee.at_exits([1])
    assert few._compiled is None and few(IMAGES[:3]).shape == (3, 10)


def test_the_copies_move_with_the_network():
    ee = wrapped()
    ee.thresholds = torch.inf
    ee.compile(backend="eager", fold=True, channels_last=True)
    ee.to(torch.bfloat16)
    got = ee(IMAGES.bfloat16())
    assert got.dtype is torch.bfloat16
    assert all(p.dtype is torch.bfloat16 for p in ee._compiled.own.parameters())


def test_train_mode_is_refused():
    ee = wrapped()
    ee.stages[0].train()
    with pytest.raises(RuntimeError, match="compile needs a network in eval mode"):
        ee.compile()


@pytest.mark.slow
def test_with_the_compiler_itself():
    """Of two stages, since it is slow: the rest is the same for any backend."""
    ee, plain = wrapped().at_exits([1]), wrapped().at_exits([1])
    ee.thresholds = plain.thresholds = 0.9
    ee.compile(fold=True)
    for images in (IMAGES[:40], IMAGES[:1]):
        assert_close(ee.predict(images), plain.predict(images))


# ---- folding --------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One convolution in front of two normalisations, and one whose output is needed besides."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(1, affine=affine) for affine in (True, False, True))
        self.other = nn.Conv2d(1, 1, 1)
        self.without = nn.BatchNorm2d(1, track_running_stats=False)

    def forward(self, x):
        x = self.norms[1](self.conv(self.norms[0](self.conv(x))))
        y = self.other(x)
        return self.without(self.norms[2](y) + y)


def randomised(model):
    g = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=g) if "var" in name else tensor.normal_(generator=g)
    return model.eval()


def norms_in(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_folding_is_the_same_function():
    stages = cut(net(), samples(1))
    before = bits_of(stages)
    other = folded(stages)
    x = samples(20)
    expected = stages(x)
    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert norms_in(stages) == 4 and norms_in(other) == 0
    assert other.names == stages.names
    for name, bits in bits_of(stages).items():
        assert same_bits(bits, before[name])


def test_what_cannot_be_folded_is_left():
    class Opaque(nn.Module):
        def forward(self, x):
            return x if x.sum() > 1e9 else x + 1

    with torch.no_grad():
        stages = Stages([randomised(Twice()), Opaque(), nn.Sequential(randomised(Twice()), nn.Flatten())]).eval()
        other = folded(stages)
        x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(other(x), stages(x), rtol=1e-4, atol=1e-4)
    assert norms_in(other) == norms_in(stages) == 8
