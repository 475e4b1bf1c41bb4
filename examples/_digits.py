"""A small trained network for the examples: a residual network and the handwritten digits of scikit-learn.

The digits are 8x8 pixels, which is too easy: the first layer alone can tell them apart. So each digit is placed at a
random position in a 16x16 image, and noise is added.
"""

import copy
import functools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())
        self.body = nn.Sequential(first, nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs))
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return (self.skip(x) + self.body(x)).relu()


class SmallResNet(nn.Module):
    """A stem, four residual blocks, and a linear classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1), Block(16, 16, 1))
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def forward(self, x):
        return self.classifier(self.blocks(self.stem(x)))


def moved(images):
    """Each image at a random position, with noise."""
    shifts = torch.randint(-3, 4, (len(images), 2)).tolist()
    images = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(images, shifts, strict=True)])
    return images + 0.1 * torch.randn_like(images)


def digits():
    """(images [B, 1, 16, 16], labels [B]) to train and fit on (1,000), to calibrate on (400), and to test on (397)."""
    torch.manual_seed(0)
    found = load_digits()
    order = torch.randperm(len(found.target))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    images, labels = moved(F.pad(images, (4, 4, 4, 4))), torch.tensor(found.target)[order]
    sizes = [1000, 400, len(labels) - 1400]
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def batches(images, labels, size=100):
    """A loader: what e2cm_ext takes is any iterable of (images, labels), such as a DataLoader."""
    return list(zip(images.split(size), labels.split(size), strict=True))


def trained(model, images, labels, steps=150):
    """Trains a network with Adam; some seconds on one core."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        shift = torch.randint(-1, 2, (2,)).tolist()
        logits = model(images[rows].roll(shift, (2, 3)))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@functools.cache  # tests run several examples in one process
def _trained_resnet():
    train, _, _ = digits()
    return trained(SmallResNet(), *train)


def trained_network():
    """A SmallResNet that is trained on the first part of digits()."""
    return copy.deepcopy(_trained_resnet())
