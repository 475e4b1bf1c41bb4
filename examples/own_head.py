"""Writes a head and a rule of your own, and compares the head with the heads of the package.

    python examples/own_head.py

A head is what predicts at an exit. The one below is ridge regression on channel averages: it collects two sums in one
pass over the data, and solves a linear system at the end. A rule decides when a sample may leave. The one below
compares the two most probable classes. Everything else (calibration, evaluation, saving) works as before.
"""

from dataclasses import dataclass

import torch
from _digits import batches, digits, trained_network

import e2cm_ext as e2cm
from e2cm_ext.heads import all_reduce_sum


class RidgeRegression(e2cm.Head):
    """Linear scores from channel averages, fitted by least squares to one-hot labels."""

    def __init__(self, num_classes, feature_shape, strength=1e-2):
        super().__init__(num_classes, feature_shape)
        channels = feature_shape[0]
        self.strength = strength
        self.register_buffer("weight", torch.zeros(channels + 1, num_classes))
        self.register_buffer("temperature", torch.ones(()))
        self.reset()

    def features(self, x):
        """[B, channels + 1]: the average of each channel, and a constant for the bias."""
        return torch.nn.functional.pad(x.mean((2, 3)), (0, 1), value=1.0)

    # -- fitting: update() for each batch, finish() at the end of the pass

    def update(self, x, labels, pass_index):
        super().update(x, labels, pass_index)  # checks shapes and labels, counts the classes
        rows = self.features(x)
        self.products += rows.T @ rows
        self.targets.index_add_(1, labels, rows.T)

    def finish(self, pass_index):
        super().finish(pass_index)
        # The sums of all processes, if torch.distributed is in use.
        products, targets = all_reduce_sum(self.products), all_reduce_sum(self.targets)
        self.weight.copy_(torch.linalg.solve(products + self.strength * torch.eye(len(products)), targets))
        self.reset()

    def reset(self):
        super().reset()
        size = len(self.weight)
        self.products, self.targets = torch.zeros(size, size), torch.zeros(size, self.num_classes)

    # -- prediction

    def forward(self, x):
        """Log-probabilities [B, K]. Least squares predicts about 0 and 1, so the scores are scaled up."""
        return (8 * self.features(x) @ self.weight).log_softmax(1)

    # -- saving: the arguments of the constructor

    def config(self):
        return super().config() | {"strength": self.strength}


@dataclass(frozen=True)
class Margin(e2cm.Rule):
    """The difference between the two largest probabilities."""

    name = "margin"

    def certainty(self, log_probs):
        first, second = log_probs.exp().topk(2, dim=1).values.unbind(1)
        return first - second


train, held_out, test = digits()
model = trained_network()  # a small residual network, trained on `train`
ways = {
    "class means (the paper)": {"head": "class_means"},
    "whitened means (default)": {"head": "whitened_means"},
    "ridge regression": {"head": RidgeRegression},
    "ridge regression, margin": {"head": RidgeRegression, "rule": Margin()},
}
print(f"{'':26}accuracy of each exit on its own      with thresholds for 40% of the FLOPs")
for name, options in ways.items():
    ee = e2cm.EarlyExit(model, train[0][:1], **options).fit(batches(*train), progress=False)
    record = ee.record(batches(*test), progress=False)
    alone = " ".join(f"{accuracy:.3f}" for accuracy in record.accuracy[:-1])
    ee.calibrate(batches(*held_out), flops=0.4, progress=False)
    found = ee.evaluate(batches(*test), progress=False)
    print(f"{name:26}{alone:38}accuracy {found.accuracy:.3f} at FLOPs {found.flops:.2f}")
