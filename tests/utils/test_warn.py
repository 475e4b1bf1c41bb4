"""Where warnings point: at the caller's line, however deep inside the package and torch they are given."""

import warnings

import pytest
import torch
from support.networks import images, loader, net

from e2cm_ext import EarlyExit
from e2cm_ext.utils import warn


def test_at_the_line_of_the_caller():
    with pytest.warns(UserWarning, match="hello") as caught:
        warn.warn("hello")
    assert caught[0].filename == __file__


@torch.no_grad()
@torch.inference_mode()
def test_all_callers_are_warned():
    ee = EarlyExit(net(), images(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        ee.fit(loader(classes=9), progress=False)
        ee.record(loader(classes=9), progress=False)
        ee.calibrate(loader(classes=9), flops=0.9, progress=False)
        ee.calibrate(ee.record(loader(20, classes=9), progress=False), risk=(0.001, 0.01), progress=False)
    said = [str(w.message).split()[0] for w in caught]
    assert said == ["no", "about", "about", "about", "all"]
    assert {w.filename for w in caught} == {__file__} and len({w.lineno for w in caught}) == 4
