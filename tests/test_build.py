"""What build_info says about the build is so."""

import re

import pytest

import e2cm_ext
from e2cm_ext import native


def test_build_info():
    info = e2cm_ext.build_info()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info["version"])
    assert info["version"] == e2cm_ext.__version__
    assert info["isa"] in info["isa_available"]
    assert info["isa_available"][-1] == "scalar"
    assert re.search(r"\d", info["compiler"])
    assert isinstance(info["openmp"], bool)


def test_cuda_part_is_linked_if_it_is_claimed():
    archs = e2cm_ext.build_info()["cuda_archs"]
    assert bool(archs) == hasattr(native, "cuda_exit")
    if not archs:
        pytest.skip("built without CUDA")
    assert archs == ["emulated"] or all(re.match(r"\d+", arch) for arch in archs)
    # Needs no GPU: sums of 3 rows and 10 classes in one split, and a counter.
    x, head = ((0, 0, 3, 100, 100), None), (0, 0, 0, 10, 100, 0, 0, 0)
    assert native.cuda_exit_workspace(x, head) == 512
