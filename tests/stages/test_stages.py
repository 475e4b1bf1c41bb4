"""Cutting networks: the zoo of torchvision and timm, small networks made for one question each, and what must fail."""

import copy
import io
import itertools
import linecache
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from support import vision
from torch import nn
from torch.nn import functional as F

from e2cm_ext.stages import CutError, Stages, cut, flops, stage_flops

pytestmark = pytest.mark.vision

FORMATS = [torch.contiguous_format, torch.channels_last]
LARGE = ("torchvision/resnet152", "torchvision/wide_resnet101_2")
QUICK = ("torchvision/resnet18", "torchvision/mobilenet_v3_small", "timm/vit_tiny_patch16_224")


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---- the zoo ------------------------------------------------------------------------------------


class Case:
    def __init__(self, name):
        self.name = name
        self.model = vision.network(name)
        self.before = snapshot(self.model)
        self.stages = cut(self.model, vision.images(2))
        self.blocks = vision.ZOO[name]


def snapshot(model):
    """All that a module knows of itself, by identity; of its tensors the values too."""
    state = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            state[name, key] = (id(value), [*map(id, value.values())] if isinstance(value, dict) else None)
    return state, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in vision.ZOO],
)
def case(request):
    with torch.no_grad():
        return Case(request.param)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_zoo_same_answers(case, memory_format):
    x = vision.images(3).to(memory_format=memory_format)
    for batch in (1, 3):  # the example had 2
        wanted, found = case.model(x[:batch]), case.stages(x[:batch])
        assert same(found, wanted) and found.isfinite().all()
    assert wanted.std() > 0


def test_zoo_empty_batch(case):
    assert same(case.stages(vision.images(0)), case.model(vision.images(0)))


def test_zoo_number_of_blocks(case):
    assert len(case.stages.names) == 1 + case.blocks
    assert len(case.stages) == len(list(case.stages)) == 2 + case.blocks


def test_zoo_features_are_those_of_the_modules(case):
    """What crosses a cut is what the module of that name returns when the model runs."""
    seen = {}

    def note(name):
        return lambda module, args, result: seen.__setitem__(name, result.clone())

    x = vision.images(2, seed=1)
    hooks = [case.model.get_submodule(name).register_forward_hook(note(name)) for name in case.stages.names]
    case.model(x.clone())
    for hook in hooks:
        hook.remove()
    assert list(seen) == list(case.stages.names)
    for name, stage in zip(case.stages.names, case.stages, strict=False):
        x = stage(x)
        assert same(x, seen[name]), name


def test_zoo_weights_are_shared(case):
    own = dict(case.model.named_parameters())
    found = {}
    for part in case.stages:
        assert set(part.state_dict()) <= set(case.model.state_dict())
        for name, parameter in part.named_parameters():
            assert parameter is own[name]
            found[name] = parameter
    assert found.keys() == own.keys()


def test_zoo_model_is_untouched(case):
    (attributes, tensors), (attributes_now, tensors_now) = case.before, snapshot(case.model)
    assert attributes == attributes_now
    assert all(torch.equal(tensors[name], tensors_now[name]) for name in tensors)


def test_zoo_copies(case):
    if case.name in LARGE:
        pytest.skip("slow, and nothing in it that is not in resnet50")
    x = vision.images(2)
    wanted = case.model(x)
    for other in (copy.deepcopy(case.stages), saved_and_loaded(case.stages)):
        assert same(other(x), wanted)
        assert other.names == case.stages.names
        assert not {id(p) for p in other.parameters()} & {id(p) for p in case.stages.parameters()}
        assert not any(module.training for module in other.modules())


def test_zoo_bfloat16(case):
    if case.name in LARGE:
        pytest.skip("slow, and nothing in it that is not in resnet50")
    model, stages = copy.deepcopy((case.model, case.stages))  # together: they share their weights
    model.to(torch.bfloat16, memory_format=torch.channels_last)
    x = vision.images(1).to(torch.bfloat16, memory_format=torch.channels_last)
    assert all(p.dtype is torch.bfloat16 for p in stages.parameters())
    assert same(stages(x), model(x))


def test_zoo_all_contains_the_blocks(case):
    if case.name in LARGE:
        pytest.skip("slow, and nothing in it that is not in resnet50")
    stages = cut(case.model, vision.images(2), "all")
    assert set(case.stages.names) <= set(stages.names)
    assert min(stage_flops(stages, vision.images(1))) > 0
    assert same(stages(vision.images(3)), case.model(vision.images(3)))


# ---- names of the exits, by hand ------------------------------------------------------------------


def test_names_of_resnet18():
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert cut(vision.network("torchvision/resnet18"), vision.images(1)).names == ("maxpool", *blocks)


def test_names_of_mobilenet_v2():
    assert cut(vision.network("torchvision/mobilenet_v2"), vision.images(1)).names == tuple(
        f"features.{i}" for i in range(18)
    )


def test_names_of_efficientnet_of_timm():
    """Its first block is of another class than the others, and has no shortcut."""
    counts = (1, 2, 2, 3, 3, 4, 1)
    blocks = [f"blocks.{i}.{j}" for i, count in enumerate(counts) for j in range(count)]
    assert cut(vision.network("timm/efficientnet_b0"), vision.images(1)).names == ("bn1", *blocks)


def test_names_of_densenet121():
    model = vision.network("torchvision/densenet121")
    dense = [f"features.denseblock{i}" for i in (1, 2, 3, 4)]
    assert cut(model, vision.images(1)).names == ("features.pool0", *dense)
    between = [f"features.transition{i}" for i in (1, 2, 3)]
    everywhere = [name for pair in itertools.zip_longest(dense, between) for name in pair if name]
    assert cut(model, vision.images(1), "all").names == ("features.pool0", *everywhere)


def test_names_of_vit():
    assert cut(vision.network("timm/vit_tiny_patch16_224"), vision.images(1)).names == (
        "pos_drop",
        *(f"blocks.{i}" for i in range(12)),
    )


# ---- small networks of one's own ------------------------------------------------------------------


class Basic(nn.Module):
    """A block whose shortcut has no parameters: every second pixel, and zeros for the new channels."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.widen, self.stride = (outputs - inputs) // 2, stride

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.widen, self.widen))
        return F.relu(x + y)


class CifarNet(nn.Module):
    """6n + 2 layers, written with functions: the stem ends in F.relu."""

    def __init__(self, n):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Basic(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(*(Basic(32 if i else 16, 32, 1 if i else 2) for i in range(n)))
        self.layer3 = nn.Sequential(*(Basic(64 if i else 32, 64, 1 if i else 2) for i in range(n)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Inverted(nn.Module):
    """With a gate and a shortcut, or with neither of them."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        wide = 2 * inputs
        self.conv1, self.conv2 = nn.Conv2d(inputs, wide, 1), nn.Conv2d(wide, wide, 3, stride, 1, groups=wide)
        self.conv3, self.bn = nn.Conv2d(wide, outputs, 1), nn.BatchNorm2d(outputs)
        self.fc1, self.fc2 = nn.Conv2d(outputs, 4, 1), nn.Conv2d(4, outputs, 1)
        self.shortcut = nn.Sequential() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.stride = stride

    def forward(self, x):
        y = self.bn(self.conv3(F.hardswish(self.conv2(F.hardswish(self.conv1(x))))))
        if self.stride > 1:
            return y
        return y * torch.sigmoid(self.fc2(F.hardswish(self.fc1(F.adaptive_avg_pool2d(y, 1))))) + self.shortcut(x)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1)
        shapes = ((8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 16, 1), (16, 24, 2), (24, 24, 1))
        self.layers = nn.Sequential(*(Inverted(*shape) for shape in shapes))
        self.linear = nn.Linear(24, 10)

    def forward(self, x):
        x = self.conv1(x)
        x = self.layers(x * torch.sigmoid(x))  # a gate of its own, which is no block
        return self.linear(x.mean((2, 3)))


def made(model, seed=0):
    torch.manual_seed(seed)
    vision.scramble(model)
    return model.eval()


def assert_same(model, stages, size=32, batches=(0, 1, 3)):
    for batch, memory_format in itertools.product(batches, FORMATS):
        x = vision.images(batch, size).to(memory_format=memory_format)
        assert same(stages(x.clone()), model(x.clone()))


@pytest.mark.parametrize("n", [1, 3, 9])
def test_cifar_resnet(n):
    model = made(CifarNet(n))
    stages = cut(model, vision.images(4, 32))
    assert stages.names == ("relu", *(f"layer{i}.{j}" for i in (1, 2, 3) for j in range(n)))
    assert_same(model, stages)
    assert cut(model, vision.images(4, 32), "all").names == stages.names


def test_mobile_network():
    model = made(MobileNet())
    stages = cut(model, vision.images(2, 32))
    assert stages.names == ("mul", *(f"layers.{i}" for i in range(6)))
    assert_same(model, stages)
    # In the two blocks without a shortcut there are cuts, too: behind their first and their second convolution.
    inside = [name for name in cut(model, vision.images(2, 32), "all").names if name not in stages.names]
    assert [name.rpartition(".")[0] for name in inside] == ["layers.1"] * 2 + ["layers.4"] * 2


def test_another_image_size_than_the_example():
    model = made(CifarNet(1))
    assert_same(model, cut(model, vision.images(1, 32)), size=48)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(16 * 8 * 8, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def test_network_without_blocks():
    """An exit between every two layers: behind the pooling if there is one, not before the classifier's last layer."""
    model = made(Plain())
    stages = cut(model, vision.images(2, 32))
    assert stages.names == ("features.2", "features.5", "flatten")
    assert stages.names == cut(model, vision.images(2, 32), "all").names
    assert_same(model, stages)


def test_the_smallest_features_between_two_layers():
    """And none before the first layer."""
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.UpsamplingNearest2d(scale_factor=2)]
    model = made(nn.Sequential(*layers, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 12 * 12, 5)))
    assert cut(model, vision.images(2, 16), "all").names == ("3",)
    assert cut(model, vision.images(2, 16), ["0", "4"]).names == ("0", "4")  # for who wants them


class Written(nn.Module):
    """Shortcuts in the network's own forward(), in no module."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for first, second in zip(self.convs[::2], self.convs[1::2], strict=True):
            x = F.relu(x + second(F.relu(first(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.Sequential(nn.Identity(), model)])
def test_blocks_without_a_module(wrap):
    model = made(wrap(Written()))
    stages = cut(model, vision.images(2, 16))
    assert len(stages.names) == 4  # each behind its activation
    x = vision.images(2, 16)
    for name, stage in zip(stages.names, stages, strict=False):
        x = stage(x)
        assert "relu" in name and x.min() == 0
    assert_same(model, stages, 16)


class Dense(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(inputs + i * growth, growth, 3, padding=1) for i in range(3))

    def forward(self, x):
        features = [x]
        for conv in self.convs:
            features.append(F.relu(conv(torch.cat(features, 1))))
        return torch.cat(features, 1)


def test_dense_blocks():
    parts = [nn.Conv2d(3, 8, 3), nn.ReLU(), Dense(8, 4), nn.Conv2d(20, 8, 1), nn.MaxPool2d(2), Dense(8, 4)]
    model = made(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)))
    stages = cut(model, vision.images(2, 16))
    assert stages.names == ("1", "2", "5")
    assert cut(model, vision.images(2, 16), "all").names == ("1", "2", "4", "5")
    assert_same(model, stages, 16)


def test_layers_of_torch_are_blocks_too():
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)]
    model = made(nn.Sequential(nn.Linear(6, 8), *layers, nn.Flatten(), nn.Linear(40, 3)))
    stages = cut(model, torch.randn(2, 5, 6))
    assert stages.names == ("0", "1", "2", "3")
    x = torch.randn(4, 5, 6)
    assert same(stages(x), model(x))


# ---- where no cut is possible ---------------------------------------------------------------------


class BatchKept(nn.Module):
    """Asks for the batch size at the start, and needs it at the end."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(4 * 8 * 8, 5)

    def forward(self, x):
        batch = x.shape[0]
        x = self.conv2(self.conv1(x))
        return self.linear(x.view(batch, -1) if self.keep else x.flatten(1))


def test_no_cut_while_the_batch_size_is_alive():
    assert cut(made(BatchKept(keep=False)), vision.images(2, 8)).names == ("conv1",)
    with pytest.raises(CutError, match="there is no place for an exit"):
        cut(made(BatchKept(keep=True)), vision.images(2, 8))
    with pytest.raises(ValueError, match=r"'conv1'.*it still needs a value \(a size, say\) of getitem"):
        cut(made(BatchKept(keep=True)), vision.images(2, 8), ["conv1"])


class Transposed(nn.Module):
    """Between its layers the batch is the second dimension, or part of the first."""

    def __init__(self, fold):
        super().__init__()
        self.fold = fold
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        y = self.first(x)
        y = self.second(y.flatten(0, 1) if self.fold else y.transpose(0, 1))
        y = y.unflatten(0, (-1, 7)) if self.fold else y.transpose(0, 1)
        return self.third(y.relu()).mean(1)


@pytest.mark.parametrize("tokens", [7])
@pytest.mark.parametrize("fold", [True, False])
def test_no_cut_where_the_first_dimension_is_not_the_batch(tokens, fold):
    model = made(Transposed(fold))
    stages = cut(model, torch.randn(2, tokens, 6), "all")
    assert stages.names == ("first",)
    with pytest.raises(ValueError, match=r"'second'.*returns no tensor \[batch, ...\]"):
        cut(model, torch.randn(2, tokens, 6), ["second"])


def test_first_dimension_that_happens_to_be_the_batch():
    """Two tokens, as many as the example has samples: still not the batch."""
    model = made(Transposed(fold=False))
    assert cut(model, torch.randn(2, 2, 6), "all").names == ("first",)


# ---- what to cut: numbers, fractions, names -------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    with torch.no_grad():
        return made(CifarNet(3))


X = vision.images(2, 32)


def fractions(stages):
    spent = torch.tensor(stage_flops(stages, X)).double()
    return (spent.cumsum(0) / spent.sum()).tolist()[:-1]


def best_by_trying_all(everywhere, wanted):
    return min(
        itertools.combinations(everywhere, len(wanted)),
        key=lambda some: sum(abs(a - b) for a, b in zip(some, wanted, strict=True)),
    )


@pytest.mark.parametrize("count", [1, 2, 3, 6, 9, 10])
def test_a_number_of_exits(resnet, count):
    everywhere = fractions(cut(resnet, X, "all"))
    assert len(everywhere) == 10
    wanted = [(j + 1) / (count + 1) for j in range(count)]
    stages = cut(resnet, X, count)
    assert fractions(stages) == pytest.approx(best_by_trying_all(everywhere, wanted))
    assert_same(resnet, stages)


@pytest.mark.parametrize("wanted", [[0.5], [0.1, 0.9], [0.9, 0.1], [0.5, 0.5, 0.5], [0.99, 0.999], [0.001, 0.01, 0.3]])
def test_fractions_of_the_flops(resnet, wanted):
    everywhere = fractions(cut(resnet, X, "all"))
    found = fractions(cut(resnet, X, wanted))
    assert found == pytest.approx(best_by_trying_all(everywhere, sorted(wanted)))
    assert len(set(found)) == len(wanted)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["layer2.1"], ["layer2.1"]),
        (["layer2", "layer1"], ["layer1", "layer2"]),
        (["layer1", "layer1.2", "layer1"], ["layer1"]),  # all the same place
        (["layer*.1"], ["layer1.1", "layer2.1", "layer3.1"]),
        (["layer[12].?"], [f"layer{i}.{j}" for i in (1, 2) for j in range(3)]),
        (["layer*"], ["layer1", "layer2", "layer3"]),
        (["relu", "layer3.*"], ["relu", "layer3.0", "layer3.1", "layer3.2"]),
        (["conv1", "bn1"], ["conv1", "bn1"]),
        (("layer2.0",), ["layer2.0"]),
    ],
)
def test_exits_chosen_by_names_and_patterns(resnet, wanted, names):
    stages = cut(resnet, X, wanted)
    assert stages.names == tuple(names)
    assert_same(resnet, stages)


def test_names_that_were_shown_can_be_asked_for(resnet):
    for exits in ("blocks", "all", 4):
        stages = cut(resnet, X, exits)
        assert cut(resnet, X, stages.names).names == stages.names


@pytest.mark.parametrize(
    ("exits", "error", "message"),
    [
        ("block", ValueError, '`exits` is \'block\'; wanted "blocks", "all", a number'),
        (0, ValueError, "`exits` is 0; wanted 1 to 10"),
        (11, ValueError, "`exits` is 11; wanted 1 to 10, as many as there are places"),
        (-1, ValueError, "`exits` is -1"),
        (True, TypeError, "`exits` is True; wanted"),
        (0.5, TypeError, "`exits` is 0.5; wanted"),
        (None, TypeError, "`exits` is None; wanted"),
        ([], TypeError, "`exits` is []; wanted"),
        ([1, 2], TypeError, "`exits` is [1, 2]; wanted"),
        (["relu", 0.5], TypeError, 'wanted "blocks"'),
        ([0.5, 1.0], ValueError, "`exits` holds 1.0; wanted fractions of the FLOPs, between 0 and 1"),
        ([0.0], ValueError, "`exits` holds 0.0"),
        ([float("nan")], ValueError, "`exits` holds nan"),
        ([j / 12 for j in range(1, 12)], ValueError, "`exits` holds 11 fractions; there are 10 places"),
        (
            ["layer9"],
            ValueError,
            "`exits` holds 'layer9': there is no such module, or none that the network can be cut",
        ),
        (["layer4.*"], ValueError, "`exits` holds 'layer4.*'"),
        (["layer1.0.conv1"], ValueError, "behind this module, because there it still needs the output of relu"),
        (["layer1.0.bn2"], ValueError, "because there it still needs the output of relu"),
        (["layer2.0.bn2"], ValueError, "because there it still needs the output of layer1"),
        (["linear"], ValueError, "returns no tensor [batch, ...] that later ones go on from"),
    ],
)
def test_exits_that_cannot_be(resnet, exits, error, message):
    with pytest.raises(error, match=re.escape(message)):
        cut(resnet, X, exits)


def test_a_shortcut_that_hands_its_input_on():
    """What an identity in a block returns is what the block was given, but the place of that is not in the block."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shortcut = nn.Conv2d(4, 4, 3, padding=1), nn.Identity()

        def forward(self, x):
            return self.conv(x) + self.shortcut(x)

    layers = [nn.Conv2d(3, 4, 3), Block(), Block(), Block()]
    model = made(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 30 * 30, 5)))
    assert cut(model, X).names == ("0", "1", "2", "3")
    with pytest.raises(ValueError, match=r"'2.shortcut'.* it still needs the output of 2.conv"):
        cut(model, X, ["2.shortcut"])


def test_an_unknown_name_is_answered_with_names_like_it(resnet):
    with pytest.raises(ValueError, match=r"there are .*layer1\.1"):
        cut(resnet, X, ["layer1_1"])


# ---- what may be inside ---------------------------------------------------------------------------


class Twice(nn.Module):
    """One module in two places, one parameter in two places, and names that functions and modules could share."""

    def __init__(self):
        super().__init__()
        self.conv, self.same = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        x = self.relu(self.conv(x))
        x = self.relu(self.conv(F.relu(self.same(x))))
        x = F.linear(self.linear(x.mean((2, 3))), self.linear.weight)
        return self.linear(x)


def test_one_module_in_two_places():
    model = made(Twice())
    stages = cut(model, X, ["conv", "relu@2", "linear"])
    assert_same(model, stages)
    assert stages[0].conv is stages[1].conv is model.conv
    assert stages[3].linear.weight is stages[2].linear.weight is model.linear.weight
    assert_same(model, copy.deepcopy(stages))
    assert cut(model, X, "all").names == ("relu", "relu_0", "mean", "linear")


class Loose(nn.Module):
    """Parameters, buffers and tensors that no layer holds, and some that are made on the way."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(1, 3, 1, 1))
        self.register_buffer("shift", torch.randn(1, 3, 1, 1))
        self.register_buffer("hidden", torch.randn(3), persistent=False)
        self.plain = torch.randn(3, 1, 1)
        self.body = nn.ModuleDict({"a-b": nn.Conv2d(3, 3, 3)})
        self.linear = nn.Linear(3, 4)

    def forward(self, x, factor=2.0, *rest, mask=None, **options):
        if mask is not None:
            raise AssertionError("no mask was given")
        x = self.body["a-b"](x * self.scale + self.shift * factor)
        x = (x + self.plain).mean((2, 3)) * torch.tensor([1.0, 2.0, 3.0]) + self.hidden
        return self.linear(x[:, : self.hidden.shape[0]]) + self.scale.sum()


def test_tensors_of_its_own():
    model = made(Loose())
    stages = cut(model, X, ["body.a-b"])
    assert_same(model, stages)
    assert set(stages[0].state_dict()) == {"scale", "shift", "body.a-b.weight", "body.a-b.bias"}
    assert set(stages[1].state_dict()) == {"scale", "linear.weight", "linear.bias"}
    assert stages[0].scale is stages[1].scale is model.scale
    model.scale.data += 1
    model.shift += 1
    assert_same(model, stages)
    assert_same(model, saved_and_loaded(copy.deepcopy(stages)))
    assert all(t.dtype == torch.float64 for t in copy.deepcopy(stages).double().state_dict().values())


def test_features_in_place():
    """A stage may overwrite its input, as the model does: the answer is the same, the input is not."""
    model = made(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 30 * 30, 3)))
    stages = cut(model, X, ["0"])
    features = stages[0](X)
    kept = features.clone()
    assert kept.min() < 0
    answer = stages[1](features)
    assert same(answer, model(X))
    assert same(features, kept.relu())  # overwritten


class InPlace(nn.Module):
    """Statements whose result is not used, on a tensor that crosses the cut."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x)
        x[:, 0].mul_(2)
        x.add_(1)
        y = x.mean((2, 3))
        y[:, 1:] += 5
        return self.linear(y)


def test_results_that_are_not_used():
    model = made(InPlace())
    stages = cut(model, X, ["conv"])
    assert_same(model, stages)
    assert same(stages[0](X), (model.conv(X) * torch.tensor([2.0, 1, 1, 1]).view(4, 1, 1)) + 1)


class Choosy(nn.Module):
    """Cannot be traced: looks at the numbers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv1(x)
        return x + (self.conv2(y) if y.mean() > 0 else y)


def test_untraceable_blocks_stay_whole():
    layers = [nn.Conv2d(3, 8, 3), Choosy(), Choosy(), Choosy(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    model = made(nn.Sequential(*layers))
    stages = cut(model, X)
    assert stages.names == ("0", "1", "2", "3")
    assert_same(model, stages, batches=(1, 3))
    assert sum(stage_flops(stages, X)) == flops.count_flops(model, X)  # nothing runs twice
    with pytest.raises(ValueError, match=r"'1' around it is called as a whole, since .*if y.mean\(\) > 0"):
        cut(model, X, ["1.conv2"])


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Choosy()
        self.stem, self.linear = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(self.body(self.stem(x)).mean((2, 3)))


def test_untraceable_body():
    with pytest.warns(UserWarning, match=r"'body' \(Choosy\) holds most of the FLOPs.*Way out: .*Stages\("):
        stages = cut(made(Deep()), X)
    assert stages.names == ("stem", "body")


def test_untraceable_network_and_the_way_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.linear = nn.Conv2d(3, 8, 3), Choosy(), nn.Linear(8, 5)

        def forward(self, x):
            x = self.stem(x)
            if x.abs().max() > 1e6:
                x = x / 2
            return self.linear(self.body(x).mean((2, 3)))

    model = made(Net())
    with pytest.raises(CutError) as error:
        cut(model, X)
    assert isinstance(error.value, ValueError)
    assert re.search(
        r"the model \(Net\) cannot be traced: .*control flow.*test_stages.py, line \d+: if x.abs\(\).max\(\) > 1e6.*"
        r"Way out: make the slices yourself.*e2cm_ext.stages.Stages\(\[first, second, \.\.\., last\]\)",
        str(error.value),
    )

    class Last(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x.mean((2, 3)))

    stages = Stages([model.stem, model.body, Last(model.linear)]).eval()
    assert cut(stages, X) is stages
    assert_same(model, stages, batches=(1, 3))


def test_only_the_classifier_is_left():
    model = made(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 5)))
    with pytest.raises(CutError, match=r"no place for an exit that is worth it.* exits=\['1'\]: there are 0, 1"):
        cut(model, X)
    assert cut(model, X, ["1"]).names == ("1",)
    with pytest.raises(CutError, match=r"no place .*'0' \(Choosy\) cannot be traced"):
        cut(made(nn.Sequential(Choosy(), nn.Flatten())), torch.randn(2, 8, 4, 4))


def test_forward_that_asks_for_tensors():
    class Net(CifarNet):
        def forward(self, x):
            return super().forward(x if isinstance(x, torch.Tensor) else x * 2)

    with pytest.raises(CutError, match="do not answer what the model answers"):
        cut(made(Net(1)), X)


def test_random_network():
    class Net(CifarNet):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, training=True))

    with pytest.raises(CutError, match="or is random"):
        cut(made(Net(1)), X)


@pytest.mark.parametrize(
    "wrap", [lambda y: {"logits": y}, lambda y: (y, y), lambda y: y.mean(0), lambda y: SimpleNamespace(logits=y)]
)
def test_networks_that_return_no_logits(wrap):
    class Net(CifarNet):
        def forward(self, x):
            return wrap(super().forward(x))

    with pytest.raises(CutError, match=r"the model \(Net\) returns no tensor \[batch, ...\]; wanted logits.*wrap it"):
        cut(made(Net(1)), X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code():
    with pytest.raises(CutError, match="compiled code cannot be traced"):
        cut(torch.jit.trace(made(Plain()), X), X)


# ---- nothing changes ------------------------------------------------------------------------------


def test_train_mode_is_refused(resnet):
    model = copy.deepcopy(resnet).train()
    with pytest.raises(RuntimeError, match=r"the model is in train mode.*call model.eval\(\) first"):
        cut(model, X)
    model.eval().layer2[1].bn1.train()
    with pytest.raises(RuntimeError, match=r"'layer2.1.bn1' in the model is in train mode"):
        cut(model, X)
    stages = cut(model.eval(), X)
    with pytest.raises(RuntimeError, match="train mode"):
        cut(stages.train(), X)


def test_not_a_model():
    with pytest.raises(TypeError, match=r"`model` is a function; wanted a torch.nn.Module"):
        cut(F.relu, X)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (X[0], r"torch.float32 \[1, 32, 32\]: .*channels"),
        (X[:1, :1], r"torch.float32 \[1, 1, 32, 32\]: .*channels"),
        (X.double(), r"torch.float64 \[1, 3, 32, 32\]: .*[Dd]ouble"),
    ],
)
def test_an_example_that_the_model_does_not_take(resnet, x, reason):
    with pytest.raises(ValueError, match=r"does not take `example_input`, of which one sample is " + reason) as caught:
        cut(resnet, x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("x", [torch.zeros(0, 3, 32, 32), None])
def test_not_an_example(resnet, x):
    with pytest.raises(ValueError, match=r"`example_input` .* wanted a tensor"):
        cut(resnet, x)


class Noting(nn.Module):
    """Keeps its last features, counts its calls, and caches."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.cache, self.history = None, {}, ["first"]
        self.register_buffer("table", torch.ones(1))

    def forward(self, x):
        y = self.conv1(x)
        self.last = y
        self.history.append(y)
        if "table" not in self.cache:
            self.cache["table"] = self.table * 2
        return x + self.conv2(y) * self.cache["table"]


def test_what_forward_sets_is_put_back():
    model = made(nn.Sequential(nn.Conv2d(3, 8, 3), Noting(), Noting(), nn.Flatten(), nn.Linear(8 * 30 * 30, 5)))
    model(X)
    model[2].cache.clear()
    last = model[1].last
    stages = cut(model, X)
    # One sample has gone through the model to compare, as the model itself would run it; nothing else is left.
    assert all(type(layer.last) is torch.Tensor and type(layer.cache["table"]) is torch.Tensor for layer in model[1:3])
    assert [type(entry) for entry in model[1].history] == [str, torch.Tensor, torch.Tensor]
    assert last.shape == (2, 8, 30, 30) and model[1].last.shape == (1, 8, 30, 30)
    assert_same(model, stages)
    stages(X[:1])
    assert model[1].last.shape == (3, 8, 30, 30)


def test_hooks_run_and_are_left():
    seen = []
    model = made(CifarNet(2))
    model.layer2[0].register_forward_hook(lambda module, args, result: seen.append("block") or result * 2)
    model.layer1[1].register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.layer3[1].conv1.register_forward_pre_hook(lambda module, args: seen.append("layer"))
    stages = cut(model, X)
    assert stages.names == ("relu", *(f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)))
    assert_same(model, stages)
    seen.clear()
    stages(X)
    assert seen == ["before", "block", "layer"]
    assert len(model.layer2[0]._forward_hooks) == 1


def test_hooks_on_the_whole_network(resnet):
    model = copy.deepcopy(resnet)
    model.register_forward_hook(lambda module, args, result: result * 2)
    with pytest.raises(CutError, match="forward hooks, which must see it called as a whole: remove them first"):
        cut(model, X)


def test_parametrized_weights():
    model = made(CifarNet(1))
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    nn.utils.parametrizations.spectral_norm(model.linear)
    model.eval()
    assert_same(model, cut(model, X))


def test_grad_flows_through(resnet):
    stages = cut(resnet, X)
    with torch.enable_grad():
        stages(X).sum().backward()
        found = resnet.conv1.weight.grad.clone()
        resnet.zero_grad()
        resnet(X).sum().backward()
    assert torch.equal(found, resnet.conv1.weight.grad)
    resnet.zero_grad()


def test_inference_mode(resnet):
    stages = cut(resnet, X)
    with torch.inference_mode():
        assert same(stages(X), resnet(X))
        assert same(cut(resnet, vision.images(2, 32))(X), resnet(X))


def test_moving_the_stages_moves_the_model(resnet):
    model = copy.deepcopy(resnet)
    stages = cut(model, X)
    stages.half()
    assert model.conv1.weight.dtype == torch.float16 and model.layer1[0].bn1.running_mean.dtype == torch.float16
    assert same(stages(X.half()), model(X.half()))
    model.double()
    assert same(stages(X.double()), model(X.double()))


def test_many_threads_at_once(resnet):
    stages, wrong = cut(resnet, X), []
    inputs = [vision.images(batch, 32, seed=batch) for batch in (1, 2, 3, 4)]
    wanted = [resnet(x) for x in inputs]

    def work(x, y):
        with torch.no_grad():
            wrong.extend(1 for _ in range(5) if not same(stages(x), y))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_stages(resnet):
    stages = cut(resnet, X, 2)
    compiled = [torch.compile(part, backend="eager", fullgraph=True) for part in stages]
    x = X
    for part in compiled:
        x = part(x)
    assert same(x, resnet(X))
    stages[0].compile(backend="eager")
    assert same(saved_and_loaded(stages)(X), resnet(X))


def test_errors_show_the_code(resnet):
    """A traceback into a stage has a line of code to show."""
    part = cut(resnet, X)[1]
    file = part._run.__code__.co_filename
    assert "self.layer1" in "".join(linecache.getlines(file))


# ---- stages by hand, and a choice among stages ----------------------------------------------------


def test_stages_made_from_modules():
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]
    stages = Stages(layers)
    assert stages.names == ("stage0", "stage1")
    assert [*stages] == layers and stages[1] is layers[1] and stages[-1] is layers[2] and len(stages) == 3
    x = torch.randn(5, 4)
    assert same(stages(x), nn.Sequential(*layers)(x))
    assert Stages(layers, ["a", "b"]).names == ("a", "b")
    assert "a, b" in repr(Stages(layers, ["a", "b"]))


@pytest.mark.parametrize(
    ("parts", "names", "error", "message"),
    [
        ([nn.ReLU()], None, ValueError, "`parts` has length 1; wanted at least 2"),
        ([], None, ValueError, "`parts` has length 0"),
        ([nn.ReLU(), F.relu], None, TypeError, "`parts[1]` is a function; wanted a torch.nn.Module"),
        ([nn.ReLU(), nn.ReLU()], ["a", "b"], ValueError, "`names` has length 2; wanted 1, one per part but the last"),
        ([nn.ReLU(), nn.ReLU()], "a", TypeError, "`names` is the string 'a'; wanted a sequence of 1 names"),
        ([nn.ReLU()] * 3, ["a", "a"], ValueError, "`names` holds 'a' more than once"),
    ],
)
def test_stages_made_from_wrong_modules(parts, names, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Stages(parts, names)


def test_stages_stay_as_they_are(resnet):
    stages = cut(resnet, X, 5)
    assert cut(stages, X) is stages
    assert cut(stages, X, "all") is stages


@pytest.mark.parametrize(
    ("exits", "numbers"),
    [
        ([0, 3, 9], [0, 3, 9]),
        ([3, 0, 3], [0, 3]),
        (["layer1.0", "layer3.2"], [1, 9]),
        (["layer2.*"], [4, 5, 6]),
        (range(10), range(10)),
    ],
)
def test_a_choice_among_stages(resnet, exits, numbers):
    stages = cut(resnet, X)
    chosen = cut(stages, X, exits)
    assert chosen.names == tuple(stages.names[j] for j in numbers)
    assert_same(resnet, chosen)
    assert_same(resnet, saved_and_loaded(chosen))
    own = resnet.state_dict(keep_vars=True)
    assert all(tensor is own[name] for part in chosen for name, tensor in part.state_dict(keep_vars=True).items())


def test_a_number_or_fractions_of_stages(resnet):
    stages = cut(resnet, X)
    assert cut(stages, X, 3).names == cut(resnet, X, 3).names
    assert cut(stages, X, [0.2, 0.7]).names == cut(resnet, X, [0.2, 0.7]).names


def test_a_choice_among_stages_made_by_hand():
    stages = Stages([nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)], ["a", "b", "c"]).eval()
    x = torch.randn(3, 4)
    chosen = cut(stages, x, ["b"])
    assert chosen.names == ("b",) and same(chosen(x), stages(x))
    assert not any(module.training for module in chosen.modules())


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ([10], "`exits` is [10]; wanted numbers of exits, 0 to 9"),
        ([-1], "wanted numbers of exits, 0 to 9"),
        ([], "wanted numbers of exits"),
        (["layer9"], "there is no such exit; there are relu, layer1.0"),
        (11, "`exits` is 11; wanted 1 to 10"),
    ],
)
def test_choices_among_stages_that_cannot_be(resnet, exits, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cut(cut(resnet, X), X, exits)


def test_a_module_that_is_exchanged_is_called_in_a_stage():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    x = torch.randn(2, 1, 8, 8)
    for stages in (cut(model, x, "all"), copy.deepcopy(cut(model, x, "all"))):
        name = next(name for name, module in stages[0].named_modules() if isinstance(module, nn.Conv2d))
        before, other = stages[0](x), nn.Conv2d(1, 4, 3).eval()
        stages[0].set_submodule(name, other)
        after = stages[0](x)
        assert not torch.equal(before, after) and torch.equal(after, other(x).relu())
