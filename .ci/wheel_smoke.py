"""Whether an installed wheel works: its kernels against plain torch, then a small network from fit to prediction.

    python .ci/wheel_smoke.py

The kernels are run once at every level of instructions that this machine and this build have.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import e2cm_ext as e2cm

CHECKOUT = Path(__file__).resolve().parents[1]


def check_kernels() -> None:
    torch.manual_seed(0)
    for classes in (10, 100):  # few and many classes take different ways
        x, means, scale = torch.randn(300, 257), torch.randn(classes, 257), torch.rand(classes) + 0.5
        expected = (-torch.cdist(x.double(), means.double()) / scale).log_softmax(1)
        scores = e2cm.ops.class_scores(x, means, scale)
        torch.testing.assert_close(scores.log_probs.double(), expected, rtol=0, atol=1e-4)
        threshold = float(scores.confidence.median())
        out = e2cm.Decisions.empty(len(x), classes)
        survivors, ids = e2cm.ops.exit_step(x, means, scale, threshold, torch.arange(len(x)), out, exit=3)
        stay = (scores.confidence <= threshold).nonzero()[:, 0]
        assert 0 < len(ids) < len(x) and torch.equal(ids, stay), "the wrong samples stay"
        assert torch.equal(survivors, x[stay]), "survivors are not the rows of their samples"
        left = scores.confidence > threshold
        assert torch.equal(out.prediction[left], expected.argmax(1)[left]), "wrong predictions"


def check_network() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for c in (3, 8, 8, 8)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    labels = torch.arange(4).repeat(128)
    images = 8 * torch.randn(512, 3, 16, 16) + labels[:, None, None, None]
    batches = list(zip(images.split(64), labels.split(64), strict=True))
    ee = e2cm.EarlyExit(model, images[:1]).fit(batches[:4], progress=False)
    with torch.no_grad():
        assert torch.equal(ee(images), model(images).log_softmax(1)), "without exits it is not the network itself"
    ee.calibrate(batches[4:], flops=0.6, progress=False)
    decisions = ee.predict(images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "smoke.e2cm"
        ee.save(path)
        again = e2cm.EarlyExit.load(path, model).predict(images)
    assert torch.equal(decisions.prediction, again.prediction), "what is loaded is not what was saved"
    leavers = torch.bincount(decisions.exit).tolist()
    assert 0 < leavers[-1] < len(images), f"all samples leave at one place: {leavers}"
    print("samples per exit:", *leavers)


def main() -> None:
    package = Path(e2cm.__file__).resolve()
    assert CHECKOUT not in package.parents, f"{package} is the checkout, not an installed wheel"
    if os.environ.get("E2CM_ISA"):
        check_kernels()
        return
    info = e2cm.build_info()
    print(f"{package.parent}, torch {torch.__version__}, {info}")
    if sys.platform == "linux":
        with open("/proc/self/maps", encoding="utf-8") as maps:
            print("OpenMP:", *sorted({line.split()[-1] for line in maps if "libgomp" in line}))
    for isa in info["isa_available"]:
        subprocess.run([sys.executable, __file__], env={**os.environ, "E2CM_ISA": isa}, check=True)
        print(f"kernels, {isa}: as in plain torch")
    check_network()


main()
