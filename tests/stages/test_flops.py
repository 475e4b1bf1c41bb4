"""FLOPs against published figures and against formulas worked out by hand; the table of costs."""

import pytest
import torch
from support import vision
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from e2cm_ext.stages import Stages, cut, stage_flops
from e2cm_ext.stages.flops import Costs, count_flops

pytestmark = pytest.mark.vision

# ---- counting -----------------------------------------------------------------------------------


# Multiply-adds at 224 x 224 as the papers and model zoos give them, to the digits that they give.
@pytest.mark.parametrize(
    ("name", "multiply_adds", "digit"),
    [
        ("torchvision/resnet18", 1.81e9, 0.01e9),
        ("torchvision/resnet50", 4.09e9, 0.01e9),
        ("torchvision/mobilenet_v2", 0.30e9, 0.01e9),
        ("torchvision/mobilenet_v3_large", 0.217e9, 0.001e9),
        ("torchvision/efficientnet_b0", 0.39e9, 0.01e9),
        ("torchvision/densenet121", 2.83e9, 0.01e9),
        ("timm/vit_tiny_patch16_224", 1.3e9, 0.1e9),
    ],
)
def test_published_figures(name, multiply_adds, digit):
    assert count_flops(vision.network(name, size=224), vision.images(1, 224)) / 2 == pytest.approx(
        multiply_adds, abs=digit
    )


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 8 x 8 out of 16 x 16
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 10),
    ).eval()


BY_HAND = (2 * 8 * 8 * 8 * 27, 2 * 8 * 8 * 8 * 2 * 9, 2 * 128 * 10)  # first convolution, grouped one, matrix


def test_flops_of_a_small_network_by_hand():
    assert count_flops(small(), torch.zeros(1, 3, 16, 16)) == sum(BY_HAND)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_of_one_sample_whatever_the_batch(batch):
    assert count_flops(small(), torch.zeros(batch, 3, 16, 16)) == sum(BY_HAND)


def test_stages_by_hand():
    stages = cut(small(), torch.zeros(2, 3, 16, 16), ["2", "4"])
    assert stage_flops(stages, torch.zeros(2, 3, 16, 16)) == BY_HAND


def test_stages_made_by_hand():
    layers = small()
    stages = Stages([layers[:3], layers[3:4], layers[4:]]).eval()
    assert stage_flops(stages, torch.zeros(2, 3, 16, 16)) == BY_HAND


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/vit_tiny_patch16_224"])
def test_stages_add_up(name):
    model = vision.network(name)
    each = stage_flops(cut(model, vision.images(2)), vision.images(1))
    assert sum(each) == count_flops(model, vision.images(1))
    assert min(each) > 0


class Looking(nn.Module):
    """Looks at the numbers, so that it does not run on the meta device."""

    def forward(self, x):
        return x if x.isfinite().all() else x * 0


REAL_OR_NOT = pytest.mark.parametrize("first", [nn.Identity, Looking])


@REAL_OR_NOT
def test_attention_is_counted(first):
    """In eval mode it takes a fast path that the counter cannot look into."""
    tokens, width = 5, 8
    layer = nn.TransformerEncoderLayer(width, nhead=2, dim_feedforward=16, batch_first=True)
    projections = 2 * tokens * width * (3 * width + width)
    attention = 2 * 2 * tokens * tokens * width
    feedforward = 2 * 2 * tokens * width * 16
    model = nn.Sequential(first(), layer).eval()
    assert count_flops(model, torch.randn(1, tokens, width)) == projections + attention + feedforward
    assert torch.backends.mha.get_fastpath_enabled()


@REAL_OR_NOT
@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_function(first, masked):
    """On the CPU it takes a kernel that the counter does not know."""

    class Attention(nn.Module):
        def forward(self, x):
            mask = x[:, :, :3, :1] > 0 if masked else None
            return F.scaled_dot_product_attention(x[:, :, :3, :4], x[:, :, :, :4], x[..., : 6 if masked else 4], mask)

    # 2 heads, 3 queries, 5 keys, products over 4 and values of 6 (of 4: the kernel wants them of one size)
    assert count_flops(nn.Sequential(first(), Attention()), torch.randn(1, 2, 5, 6)) == 2 * 2 * 3 * 5 * (
        4 + (6 if masked else 4)
    )


class Undecided(nn.Module):
    """Looks at the numbers: there are none on the meta device."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x.add_(1)
        return self.linear(x) if x.sum() > 0 else x


def test_control_flow_runs_a_real_sample():
    x = torch.ones(3, 4)
    assert count_flops(Undecided().eval(), x) == 2 * 16
    assert count_flops(Undecided().eval(), -2 * x) == 0
    assert torch.equal(x, torch.ones(3, 4))


def test_nothing_is_computed():
    class Noticing(nn.Linear):
        def forward(self, x):
            seen.extend([x.device.type, self.weight.device.type])
            return super().forward(x)

    seen = []
    assert count_flops(nn.Sequential(nn.ReLU(), Noticing(4, 4)), torch.randn(8, 4)) == 2 * 16
    assert seen == ["meta", "meta"]


def test_a_network_without_memory():
    with torch.device("meta"):
        huge = nn.Linear(10**6, 10**6)
        assert count_flops(huge, torch.empty(1, 10**6)) == 2 * 10**12


def test_buffers_and_input_stay():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = -torch.ones(8, 4)
    model[1].eval()
    assert count_flops(model, x) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(x, -torch.ones(8, 4))


def test_errors_come_through():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        count_flops(nn.Linear(4, 4), torch.zeros(1, 5))


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.tensor(1.0), [1, 2]])
def test_an_input_without_a_sample_is_refused(x):
    with pytest.raises(ValueError, match=r"`x` .* with at least one sample"):
        count_flops(nn.Linear(3, 3), x)


# ---- what is left out ---------------------------------------------------------------------------

PER_ELEMENT = {
    "native_batch_norm": 2, "relu": 1, "relu_": 1, "silu_": 5, "sigmoid": 4, "hardswish_": 4, "hardsigmoid": 3,
    "add": 1, "add_": 1, "mul": 1, "max_pool2d_with_indices": 9,
}  # fmt: skip


class Elementwise(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "mean":
            self.total += args[0].numel()
        elif name in PER_ELEMENT:
            self.total += PER_ELEMENT[name] * (result[0] if isinstance(result, tuple) else result).numel()
        else:
            assert name in ("convolution", "addmm", "view", "t", "empty"), name
        return result


@pytest.mark.parametrize(
    ("name", "share", "shift"),
    [
        ("torchvision/resnet50", 0.005, 0.002),
        ("torchvision/mobilenet_v3_large", 0.043, 0.009),
        ("torchvision/efficientnet_b0", 0.064, 0.023),
    ],
)
def test_what_is_left_out(name, share, shift):
    """The figures that the module's text states."""
    x = vision.images(1, 224)
    stages = cut(vision.network(name, size=224), x)
    counted, left_out = torch.tensor(stage_flops(stages, x)), []
    with torch.no_grad():
        for stage in stages:
            with Elementwise() as elementwise:
                x = stage(x)
            left_out.append(elementwise.total)
    both = counted + torch.tensor(left_out)
    assert both.sum() / counted.sum() - 1 == pytest.approx(share, abs=0.0005)
    rise = both.cumsum(0) / both.sum() - counted.cumsum(0) / counted.sum()
    assert shift - 0.001 < rise.max() <= shift and rise.min() > -0.0001


# ---- the table ----------------------------------------------------------------------------------

COSTS = Costs(stages=(100, 300, 600), heads=(10, 20), names=("stem", "block"))


def test_fractions_by_hand():
    assert COSTS.base == 1000
    assert COSTS.fractions.dtype == torch.float64
    # 100 + 10; and 300 + 20; and 600 without a head behind it
    assert COSTS.fractions.tolist() == [0.11, 0.43, 1.03]


def test_some_of_the_exits():
    costs = Costs((1, 2, 4, 8), (10, 20, 30), ("stem", "block", "tail"))
    assert costs.numbers(["tail", 0, "stem"]) == [0, 2]
    assert costs.at_exits([0, 2]) == Costs((1, 6, 8), (10, 30), ("stem", "tail"))
    assert costs.at_exits([]) == Costs((15,), (), ())
    for strange in ("nowhere", 3, -1, True, 0.5):
        with pytest.raises(ValueError, match=r"`exits` holds .*; wanted names or numbers \(0 to 2\) of exits: stem"):
            costs.numbers([0, strange])
    with pytest.raises(TypeError, match="`exits` is the string 'stem'"):
        costs.numbers("stem")


def test_costs_print_as_a_table():
    assert str(COSTS).splitlines() == [
        "exit   stage FLOPs  head FLOPs  leaving here",
        "stem           100          10        0.1100",
        "block          300          20        0.4300",
        "(end)          600           -        1.0300",
        "base network: 1 k FLOPs = 1",
    ]
    large = Costs((4_089_184_256, 2_500_000), (1_234,), ("layer1",))
    assert "4.089 G" in str(large) and "2.5 M" in str(large) and "1.234 k" in str(large)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (((1, 2), (1,), ("a", "b")), "2 `names` need 3 `stages` and 2 `heads`; here are 2 and 1"),
        (((1, 2, 3), (1,), ("a", "b")), "here are 3 and 1"),
        (((0, 0), (1,), ("a",)), "`stages` cost 0 FLOPs in all; wanted more than 0"),
    ],
)
def test_costs_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Costs(*fields)
