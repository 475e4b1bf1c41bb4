"""Exits that learn by gradients, and a loader in random order."""

from __future__ import annotations

import math
import time

import torch
from torch import nn
from torch.nn import functional as F

import e2cm_ext as e2cm
from e2cm_ext.methods import training
from e2cm_ext.methods.learned_head import LearnedHead
from support.networks import SHAPE, digits, trained


class Averages(LearnedHead):
    def __init__(self, num_classes, feature_shape):
        super().__init__(num_classes, feature_shape)
        self.linear = nn.Linear(feature_shape[0], num_classes)

    def squeeze(self, x):
        return x.mean((2, 3))

    def outputs(self, squeezed):
        return self.linear(squeezed)


def network(head=Averages, model=None):
    model = trained() if model is None else model  # which may draw numbers of its own
    with training.seeded(3):
        return e2cm.EarlyExit(model, torch.zeros(1, *SHAPE), head=head)


def loss(outputs, labels, epoch):
    logits = [out[0] if isinstance(out, tuple) else out for out in outputs]
    return torch.stack([F.cross_entropy(each, labels) for each in logits]).sum()


def train(ee, loader, *, epochs=3, lr=1e-2, module=None, **options):
    module = module or training.ExitHeads(ee)
    optimizer = torch.optim.Adam(module.parameters(), lr)
    prepare = training.identity if isinstance(module, training.Joint) else training.Features(ee)
    losses = training.run(
        module,
        loader,
        loss,
        epochs=epochs,
        optimizer=optimizer,
        schedule=training.step_decay(optimizer, epochs, (0.5,)),
        prepare=prepare,
        progress=False,
        **options,
    )
    training.finish(ee)
    return losses


class Shuffled:
    """As a DataLoader does it: the order, and noise, from torch's default generator."""

    def __init__(self, batches=None, slow=0.0):
        self.x, self.y = (torch.cat(column) for column in zip(*(batches or digits()[0]), strict=True))
        self.slow = slow

    def __len__(self):
        return math.ceil(len(self.y) / 100)

    def __iter__(self):
        for rows in torch.randperm(len(self.y)).split(100):
            time.sleep(self.slow)
            yield self.x[rows] + 0.01 * torch.randn(len(rows), *SHAPE), self.y[rows]
