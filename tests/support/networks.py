"""Small networks with random weights, a small trained one, and loaders, for the tests of what runs networks."""

from __future__ import annotations

import functools
import inspect
import itertools
import textwrap

import torch
from torch import Tensor, nn

from e2cm_ext import Head, Stages
from support.tensors import generator

SHAPE, CLASSES = (1, 8, 8), 10


class Block(nn.Module):
    """Residual, with operations in place."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    """Stem, three residual blocks, one of them behind a stride, dropout, classifier: four exits."""

    def __init__(self, channels: int = 12):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.block1 = Block(channels)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.block2 = Block(2 * channels)
        self.block3 = Block(2 * channels)
        self.drop = nn.Dropout(0.1)
        self.classifier = nn.Linear(2 * channels, CLASSES)

    def forward(self, x):
        x = self.down(self.block1(self.stem(x)))
        x = self.block3(self.block2(x))
        return self.classifier(self.drop(x.mean((2, 3))))


def net(seed: int = 0) -> Net:
    """With random weights, also in batch normalisation."""
    model = Net()
    g = generator(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=g)
            elif tensor.is_floating_point():
                fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 9
                tensor.normal_(0, (2 / fan) ** 0.5, generator=g)
    return model.eval()


def net_in_stages(seed: int = 0) -> Stages:
    """The same network in three parts."""
    n = net(seed)
    last = nn.Sequential(n.block3, nn.AdaptiveAvgPool2d(1), nn.Flatten(), n.classifier)
    return Stages([nn.Sequential(n.stem, n.block1), nn.Sequential(n.down, n.block2), last], ["near", "far"]).eval()


def samples(count: int, seed: int = 7) -> Tensor:
    """Images that look like those of `loader`."""
    return loader(count, count, seed=seed)[0][0]


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=generator(seed))


def loader(count: int = 200, batch: int = 64, classes: int = CLASSES, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Noise around one pattern per class."""
    g = generator(seed)
    patterns = torch.randn(CLASSES, *SHAPE, generator=generator(99))
    labels = torch.arange(count) % classes
    x = patterns[labels] + 0.7 * torch.randn(count, *SHAPE, generator=g)
    return list(zip(x.split(batch), labels.split(batch), strict=True))


def all_of(batches):
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


class Interrupted(list):
    """Batches, in the middle of which Ctrl-C comes."""

    def __init__(self, batches, after, error=KeyboardInterrupt):
        super().__init__(batches)
        self.left, self.error = after, error

    def __iter__(self):
        for batch in super().__iter__():
            if self.left == 0:
                raise self.error
            self.left -= 1
            yield batch


@functools.cache
def digits() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """scikit-learn's digits: to fit on, to calibrate on, to test on."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=generator(0))
    x = ((torch.tensor(x, dtype=torch.float32) / 16 - 0.3) / 0.38).reshape(-1, *SHAPE)[order]
    y = torch.tensor(y)[order]
    parts = [slice(0, 900), slice(900, 1300), slice(1300, None)]
    return tuple(list(zip(x[p].split(100), y[p].split(100), strict=True)) for p in parts)


@functools.cache
def _trained_weights() -> dict[str, Tensor]:
    """On one thread: the same bits in every process, whichever test asks first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train()
    finally:
        torch.set_num_threads(threads)


def _train() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for images, labels in itertools.chain.from_iterable(itertools.repeat(digits()[0], 6)):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def trained() -> Net:
    """A network that knows digits."""
    model = Net()
    model.load_state_dict(_trained_weights())
    return model.eval()


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Scripted(Head):
    """Answers class `answer` with the probability that stands in the first feature; writes down the batches it gets."""

    def __init__(self, answer: int = 0, classes: int = 3, shape: tuple[int, ...] = (4,)):
        super().__init__(classes, shape)
        self.answer, self.seen, self.fitted = answer, [], True

    def forward(self, x):
        self.seen.append(x.clone())
        p = x.flatten(1)[:, :1].clamp(0, 1)
        rest = (1 - p) / (self.num_classes - 1)
        probabilities = rest.repeat(1, self.num_classes)
        probabilities[:, self.answer] = p[:, 0]
        return probabilities.log()

    def flops(self):
        return 7


class Watched(nn.Module):
    """Adds a number to the first feature; writes down the batches it gets."""

    def __init__(self, add: float = 0.0):
        super().__init__()
        self.add, self.seen = add, []

    def forward(self, x):
        self.seen.append(x.clone())
        return torch.cat([x[:, :1] + self.add, x[:, 1:]], dim=1)


class FirstThree(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, -3:]


class Pointwise(nn.Module):
    """A stage whose arithmetic is the same bits for a sample in whatever batch it comes."""

    def __init__(self, seed: int, shape: tuple[int, ...] = (3, 4, 5)):
        super().__init__()
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(shape, generator=generator(seed)))
        self.shift = nn.Parameter(0.3 * torch.randn(shape, generator=generator(seed + 100)))

    def forward(self, x):
        return torch.where(x > 0, x, 0.3 * x) * self.scale + self.shift


def pointwise(count: int = 5) -> Stages:
    return Stages([*(Pointwise(seed) for seed in range(count)), FirstThree()]).eval()


def example_of(cls):
    """The code under `Example:` in a docstring."""
    lines = inspect.getdoc(cls).split("\n")
    start = lines.index("Example:") + 1
    end = next((i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith("    ")), len(lines))
    return textwrap.dedent("\n".join(lines[start:end]))
