"""An EarlyExit whose noisy samples leave at several exits, for what is exported."""

from __future__ import annotations

from functools import partial

import torch

import e2cm_ext as e2cm
from support.networks import SHAPE, loader, net
from support.tensors import INF, generator


def noisy(images):
    """So much that exits are not sure of all."""
    return images + 3 * torch.randn(images.shape, generator=generator(11))


COOLED = partial(e2cm.WhitenedMeans, temperature=100)  # float32 tells all certainties apart, far from the data, too


def network(head=COOLED, rule="confidence"):
    """With the second exit off, and the others such that noisy samples leave at each of them and behind them."""
    ee = e2cm.EarlyExit(net(), torch.zeros(1, *SHAPE), head=head, rule=rule).fit(loader(300), progress=False)
    held_out = [(noisy(x), y) for x, y in loader(200, seed=1)]
    certainty = ee.record(held_out, progress=False).confidence
    limits = [float(certainty[:, j].quantile(q)) for j, q in ((0, 0.7), (2, 0.6), (3, 0.6))]
    ee.thresholds = [limits[0], INF, *limits[1:]]
    return ee
