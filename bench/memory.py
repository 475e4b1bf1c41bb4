"""Peak memory of fitting exits on ResNet-50 at 224 x 224 with 1000 classes, beside that of running it.

    python bench/memory.py

Images are noise and weights random: memory does not depend on them. Needs torchvision.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys

import torch
import torchvision

import e2cm_ext as e2cm

MEBIBYTE = 1 << 20


def peak() -> float:
    """Of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEBIBYTE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    batch = torch.randn(options.batch, 3, 224, 224), torch.randint(1000, (options.batch,))
    with torch.inference_mode():
        model(batch[0])
    alone = peak()
    ee = e2cm.EarlyExit(model, batch[0][:1], head=options.head)
    raw = sum(1000 * math.prod(head.feature_shape) * 4 for head in ee.heads) / MEBIBYTE
    held = sum(b.numel() * b.element_size() for b in ee.heads.buffers()) / MEBIBYTE
    ee.fit([batch] * options.batches, progress=False)
    print(f"{len(ee.heads)} exits, heads: {', '.join(sorted({head.kind for head in ee.heads}))}")
    print(f"running the network on batches of {options.batch}: peak {alone:.0f} MiB")
    print(f"fitting: peak {peak():.0f} MiB, of which the heads hold {held:.0f} MiB; raw means would hold {raw:.0f} MiB")


if __name__ == "__main__":
    main()
