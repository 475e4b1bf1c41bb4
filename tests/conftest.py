"""One hypothesis profile for everybody: the same examples in every run, no deadlines on shared machines.

HYPOTHESIS_PROFILE=explore searches with new random examples, and many more of them; brief looks at a few.
E2CM_NO_FAST_PATH=1 shuts csrc/fast_path.cpp: every call takes the validated path, as with a torch older than 2.10.
E2CM_EMULATED=1 sends every call through ops/cuda.py to the CUDA kernels, in a module that was built with
E2CM_CUDA=EMULATED: their blocks run on the CPU, see csrc/tests/emulation/cuda_runtime.h.
"""

import contextlib
import os
import signal
import sys

# One thread: the tensors of tests are small, and threads that wait for each other took most of the time. Tests of
# several threads ask for them. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from e2cm_ext import native
from e2cm_ext.ops import cuda, functional

settings.register_profile("steady", derandomize=True, deadline=None, database=None, max_examples=45, print_blob=False)
# For all ops once more: at another level of instructions, or without the fast path.
settings.register_profile("again", derandomize=True, deadline=None, database=None, max_examples=20)
settings.register_profile("brief", derandomize=True, deadline=None, database=None, max_examples=8)
settings.register_profile("explore", deadline=None, database=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

# A shell that starts tests in the background lets them ignore Ctrl-C, and they would wait for it for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("E2CM_NO_FAST_PATH") or os.environ.get("E2CM_EMULATED"):
    functional._try_exit_step = functional._try_decide = functional._try_linear_step = lambda *_: None
if os.environ.get("E2CM_EMULATED"):
    assert hasattr(native, "cuda_exit"), "the module was built without E2CM_CUDA=EMULATED"
    cuda.supports = lambda x: x.is_cpu
    cuda._on = lambda x: contextlib.nullcontext()
    cuda._place = lambda x: (0, 0)
    cuda._to_host = lambda numbers: (numbers, None)


@pytest.fixture(autouse=True)
def _settings_of_torch():
    """Tests may change the number of threads and torch's defaults; the next one starts from where this one did."""
    threads, dtype, path = torch.get_num_threads(), torch.get_default_dtype(), list(sys.path)
    yield
    sys.path[:] = path  # processes that are started later search it, too: for a checkout, if one were in it
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)
