"""Compares early-exit methods on the same network, data and budgets.

    python examples/compare_methods.py

Class means and whitened means are fitted in closed form. SDN trains its exits by gradient descent, here for 15 epochs
while the network stays as it is. All of them are EarlyExit objects: the same calls record, calibrate and evaluate them.
"""

import copy
import time

import torch
from _digits import batches, digits, trained_network

import e2cm_ext as e2cm
from e2cm_ext.methods import joined, sdn

EXITS = ["stem", "blocks.0", "blocks.1"]
BUDGETS = (0.2, 0.3, 0.4, 0.6)

train, held_out, test = digits()
model = trained_network()  # a small residual network, trained on `train`
example, loader = train[0][:1], batches(*train)


def class_means():
    """The paper's method: the mean features of each class."""
    return e2cm.EarlyExit(model, example, exits=EXITS, head="class_means").fit(loader, progress=False)


def whitened_means():
    """The default of this package."""
    return e2cm.EarlyExit(model, example, exits=EXITS).fit(loader, progress=False)


def shallow_deep():
    """SDN: pooled linear classifiers, trained while the network stays as it is."""
    torch.manual_seed(0)
    net = sdn.build(model, example, exits=EXITS)
    sdn.train(net, loader, epochs=15, lr=0.01, progress=False)
    return net


def both():
    """SDN joined with whitened means: a sample leaves if either of the two is confident."""
    return joined.join(copy.deepcopy(nets["SDN"]), "whitened_means", leave="either").fit(loader, progress=False)


ways = {  # a function that makes the network with exits, and the method of the threshold search
    "class means (the paper)": (class_means, "paper"),
    "whitened means (default)": (whitened_means, "auto"),
    "SDN": (shallow_deep, "auto"),
    "SDN with whitened means": (both, "auto"),
}
nets = {}
print(f"{'accuracy on test images':28}{'fit, s':>8}" + "".join(f"{f'FLOPs {flops}':>12}" for flops in BUDGETS))
for name, (make, method) in ways.items():
    start = time.perf_counter()
    net = nets[name] = make()
    seconds = time.perf_counter() - start
    record = net.record(batches(*held_out), progress=False)
    cells = []
    for flops in BUDGETS:
        try:
            net.calibrate(record, flops=flops, method=method, progress=False)
        except ValueError:  # no thresholds are that cheap
            cells.append("-")
            continue
        cells.append(f"{net.evaluate(batches(*test), progress=False).accuracy:.3f}")
    print(f"{name:28}{seconds:8.1f}" + "".join(f"{cell:>12}" for cell in cells))
with torch.inference_mode():
    accuracy = (model(test[0]).argmax(1) == test[1]).float().mean().item()
print(f"the network alone has an accuracy of {accuracy:.3f} at FLOPs 1")
