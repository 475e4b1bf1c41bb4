"""Uses FastExit as a layer in a forward() of your own.

    python examples/fast_exit_forward.py

Take this way if you write the network yourself, or if torch.fx cannot trace it. Each FastExit gets the features of the
samples that are still in the batch, and returns those that stay. The example prints how the batch shrinks.
"""

import torch
from _digits import Block, batches, digits, trained
from torch import nn

from e2cm_ext import FastExit, fast_exit


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.exit0 = FastExit((8, 16, 16), num_classes=10)  # the shape of one sample's features
        self.block1 = Block(8, 8, 1)
        self.exit1 = FastExit((8, 16, 16), num_classes=10)
        self.block2 = Block(8, 16, 2)
        self.exit2 = FastExit((16, 8, 8), num_classes=10)
        self.rest = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1))
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        self.sizes = []  # for this example only

    def forward(self, images):
        self.sizes = [len(images)]
        x, state = self.exit0(self.stem(images))  # x: the samples that stay
        self.sizes.append(len(x))
        x, state = self.exit1(self.block1(x), state)
        self.sizes.append(len(x))
        x, state = self.exit2(self.block2(x), state)
        self.sizes.append(len(x))
        if state.done:  # all samples have left: skip the rest
            return state.result()
        return state.result(self.classifier(self.rest(x)))  # Decisions, in the order of the input


class Logits(nn.Module):
    """For the training loop, which expects logits. In train mode no sample leaves early."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images).log_probs


train, held_out, test = digits()
network = Network()
trained(Logits(network), *train)

fast_exit.fit(network, batches(*train), progress=False)  # one pass; fits all FastExit layers
record = fast_exit.record(network, batches(*held_out), progress=False)
images, labels = test
for flops in (1.0, 0.5, 0.3, 0.2):
    if flops < 1:
        fast_exit.calibrate(network, record, flops=flops, progress=False)
    with torch.inference_mode():
        decisions = network(images)
    accuracy = (decisions.prediction == labels).float().mean().item()
    what = f"FLOPs at most {flops}" if flops < 1 else "no exit active"
    print(f"{what:19} accuracy {accuracy:.3f}   samples in the batch: {' -> '.join(map(str, network.sizes))}")

# Exits keep their state in the state_dict, like any other layer.
print(f"\nbuffers of an exit: {', '.join(name for name in network.exit1.state_dict())}")
