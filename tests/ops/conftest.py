"""The op tests run on the CPU and, where there is a GPU, once more there."""

import pytest
from support.gpu import EMULATED, HAS_GPU, OPS, on_gpu

from e2cm_ext import ops

DEVICES = [] if EMULATED else ["cpu"]
if HAS_GPU:
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where a test's calls of ops run. Its tensors are on the CPU either way: see support/gpu.py."""
    if request.param == "cuda":
        if request.node.get_closest_marker("cpu_only"):
            pytest.skip("about the CPU alone")
        for name in OPS:
            monkeypatch.setattr(ops, name, on_gpu(getattr(ops, name)))
    return request.param
