"""Images that were seen before: recognised in any order, in part, and only then."""

import warnings

import pytest
import torch
from support.helpers import generator
from support.small import digits, trained
from test_fast_exit import ByHand

from e2cm_ext import EarlyExit, fast_exit
from e2cm_ext.data.overlap import FittedImages, image_hashes


def images(count: int, seed: int, shape=(3, 20, 20), dtype=torch.float32):
    return torch.randn(count, *shape, generator=generator(seed)).to(dtype)


def seen_in(x, batch=100) -> FittedImages:
    seen = FittedImages()
    for part in x.split(batch):
        seen.add(part)
    return seen


@pytest.mark.parametrize("count", [1, 500, 1024, 1025, 20_000])
def test_the_share_that_was_seen(count):
    x = images(count, 0, shape=(40,))
    seen = seen_in(x)
    assert seen.overlap(image_hashes(x.flip(0))) == 1.0
    new = image_hashes(images(5000, 1, shape=(40,)))
    assert seen.overlap(new) == 0.0
    mixed = torch.cat([new[:count], image_hashes(x)])
    assert seen.overlap(mixed) == pytest.approx(len(x) / len(mixed), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_numbers_are_of_images_and_not_of_memory(dtype):
    x = (50 * images(300, 2)).to(dtype)
    numbers = image_hashes(x)
    assert len(numbers.unique()) == 300
    assert torch.equal(numbers, image_hashes(x.contiguous(memory_format=torch.channels_last)))
    assert (numbers < 0).double().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("which", ["EarlyExit", "FastExit"])
def test_samples_that_the_exits_were_fitted_on(which):
    fit_on, calibrate_on, _ = digits()
    if which == "EarlyExit":
        calibrate = EarlyExit(trained(), fit_on[0][0][:1]).fit(fit_on, progress=False).calibrate
    else:
        model = ByHand(trained()).eval()
        fast_exit.fit(model, fit_on, progress=False)
        calibrate = lambda *a, **k: fast_exit.calibrate(model, *a, **k)  # noqa: E731
    with warnings.catch_warnings(action="error"):
        calibrate(calibrate_on, flops=0.5, progress=False)
    with pytest.warns(UserWarning, match="about 100% of these images are among those that the exits were fitted on"):
        calibrate(fit_on[::-1], flops=0.5, progress=False)
    with pytest.warns(UserWarning, match="about 20% of these images"):
        calibrate([*calibrate_on, fit_on[0]], flops=0.5, progress=False)
