"""Exports a network with exits to one file, runs it without torch, and answers a server's requests with it.

    pip install '.[onnx]'    # and '.[serve]' for the last part
    python examples/export_and_serve.py

The file holds one ONNX graph per stage. The runner runs a stage, compares with the threshold of the exit behind it,
drops the samples that leave, and goes on with the others.
"""

import base64
import importlib.util
import tempfile
import time
from pathlib import Path

import numpy as np
from _digits import batches, digits, trained_network

import e2cm_ext as e2cm
from e2cm_ext.runner import OnnxCascade  # needs numpy and onnxruntime only; the file runner.py can be copied


def installed(*names):
    return all(importlib.util.find_spec(name) for name in names)


if not installed("onnx", "onnxscript", "onnxruntime"):
    raise SystemExit("this example needs the extra `onnx`: pip install '.[onnx]'")

train, held_out, test = digits()
model = trained_network()  # a small residual network, trained on `train`
ee = e2cm.EarlyExit(model, train[0][:1]).fit(batches(*train), progress=False)
ee = ee.select(batches(*held_out), count=2, progress=False)  # ship few exits: each costs time and space
print(f"calibrated: {ee.calibrate(batches(*held_out), flops=0.4, progress=False)}")

folder = tempfile.TemporaryDirectory()
package = Path(folder.name) / "digits.zip"

# 1. Export.
manifest = ee.export(package, progress=False)
print(f"\n{package.name}: {package.stat().st_size / 1024:.0f} KiB, exits that are on:")
for stage in manifest["stages"]:
    print(f"  {stage['file']}  features {stage['shape']}  exit {stage['name']!r}, threshold {stage['threshold']}")

# 2. Run it. The runner takes and returns numpy arrays.
images, labels = test[0].numpy(), test[1].numpy()
cascade = OnnxCascade.load(package, threads=1)
answers = cascade.predict(images)
expected = ee.predict(test[0])
print(f"\nruns on onnxruntime: accuracy {(answers.prediction == labels).mean():.3f}")
print(f"  same predictions as torch: {(answers.prediction == expected.prediction.numpy()).mean():.1%}")
print(f"  largest difference of a probability: {np.abs(answers.confidence - expected.confidence.numpy()).max():.1e}")


def microseconds(images):
    """Median time of one image."""
    times = []
    for i in range(len(images)):
        start = time.perf_counter()
        cascade.predict(images[i : i + 1])
        times.append(time.perf_counter() - start)
    return 1e6 * np.median(times)


with_exits = microseconds(images)
cascade.thresholds = float("inf")  # thresholds can be changed in the runner
print(f"  one image at a time: {with_exits:.0f} us with exits, {microseconds(images):.0f} us with all exits off")

# 3. Serve it. serve(package, port=8000) starts a server; here its request handler runs in this process.
if not installed("litserve", "prometheus_client"):
    print("\nserver: skipped, needs the extra `serve`: pip install '.[serve]'")
else:
    from e2cm_ext.integrations.litserve import EarlyExitAPI, Image

    api = EarlyExitAPI(str(package), shape=images.shape[1:], threads=1)
    api.setup("cpu")
    bodies = [{"image": base64.b64encode(image.tobytes()).decode()} for image in images[:3]]  # what clients send
    requests = [api.decode_request(Image(**body)) for body in bodies]
    print("\nwhat the server answers to three requests:")
    for answer, label in zip(api.predict(api.batch(requests)), labels, strict=False):
        print(f"  {answer}   (label {label})")
folder.cleanup()
