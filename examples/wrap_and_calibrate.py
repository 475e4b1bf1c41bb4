"""Wraps a trained network, adds exits, and compares three budgets.

    python examples/wrap_and_calibrate.py

It trains a small residual network on scikit-learn's digits (some seconds), fits an exit behind every block, and prints
how accurate each exit is on its own. Then it sets three budgets, and measures accuracy, FLOPs and time on images that
neither the network nor the exits nor the thresholds have seen.
"""

import tempfile
import time

import torch
from _digits import batches, digits, trained_network

import e2cm_ext as e2cm

train, held_out, test = digits()
model = trained_network()  # a small residual network, trained on `train`

# 1. Wrap: EarlyExit traces the network and adds an exit behind every block. The network itself does not change.
ee = e2cm.EarlyExit(model, example_input=train[0][:1])

# 2. Fit: one pass over the training data, without gradients.
ee.fit(batches(*train), progress=False)
print(ee)

# 3. Record what every exit predicts for samples that the exits were not fitted on. One pass serves all budgets below.
record = ee.record(batches(*held_out), progress=False)
print("\naccuracy of each exit on its own:")
for name, flops, accuracy in zip((*ee.exit_names, "(end)"), record.flops, record.accuracy, strict=True):
    print(f"  {name:10} FLOPs {flops:.2f}  accuracy {accuracy:.3f}")


# 4. Calibrate: each budget gives one threshold per exit.
def milliseconds(run, images, rounds=20):
    """Median time of a call."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run(images)
        seconds.append(time.perf_counter() - start)
    return 1000 * torch.tensor(seconds).median().item()


test_images, test_labels = test
with torch.inference_mode():
    alone = (model(test_images).argmax(1) == test_labels).float().mean().item()
    base = milliseconds(model, test_images)
    print(f"\non test images:\n  {'the network alone':22} accuracy {alone:.3f}  FLOPs 1.00  {base:5.1f} ms per batch")
    for budget in ({"flops": 0.3}, {"flops": 0.5}, {"accuracy_drop": 0.0}):
        ee.calibrate(record, **budget, progress=False)
        found = ee.evaluate(batches(*test), progress=False)
        label = ", ".join(f"{name}={value}" for name, value in budget.items())
        print(
            f"  {label:22} accuracy {found.accuracy:.3f}  FLOPs {found.flops:.2f}  "
            f"{milliseconds(ee, test_images):5.1f} ms per batch"
        )

# 5. Where the samples left, with the last budget.
print(f"\n{found}")

# 6. Save and load. The file holds heads and thresholds, but not the weights of the network.
with tempfile.TemporaryDirectory() as folder:
    ee.save(f"{folder}/digits.e2cm")
    again = e2cm.EarlyExit.load(f"{folder}/digits.e2cm", model)
assert torch.equal(again(test_images), ee(test_images))
print("\nsaved and loaded again: the outputs are the same")
