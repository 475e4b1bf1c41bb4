"""What this machine can do at best: the read bandwidth of a working set and the peak of multiply-add.

    python -m bench limits --threads 1

Measured by limits.c, compiled on the spot for this very machine; without a C compiler, by torch.sum and torch.mm, which
come less close. Other benches compare their times with these limits.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import common, markdown

SOURCE = Path(__file__).with_name("limits.c")
FOR_THIS_MACHINE = (["-march=native"], ["-mcpu=native"], [])
PROBE_SECONDS = 0.004
REST_SECONDS = 0.02  # OpenMP's threads go on spinning for some milliseconds, on cores that a probe needs
LINE = 64  # threads get whole cache lines
MEBIBYTE = 1 << 20

_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
Probe = Callable[[], float]  # runs for about PROBE_SECONDS and returns a rate per second


@functools.cache
def library() -> ctypes.CDLL | None:
    """limits.c as a shared library, or None where nothing compiles it."""
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC", "cc"), "gcc", "clang"])), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "limits.so")
        for machine in FOR_THIS_MACHINE:
            command = [compiler, "-O3", "-ffp-contract=fast", *machine, "-shared", "-fPIC", str(SOURCE), "-o", target]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return _declared(ctypes.CDLL(target))
    return None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    size, long = ctypes.c_size_t, ctypes.c_long
    found.limits_read.argtypes = [ctypes.c_void_p, size, long, ctypes.c_int, size]
    found.limits_read.restype = ctypes.c_float
    found.limits_multiply_add.argtypes = [long, ctypes.POINTER(ctypes.c_float)]
    found.limits_multiply_add.restype = ctypes.c_double
    return found


def method() -> str:
    return "torch.sum and torch.mm (no C compiler)" if library() is None else "bench/limits.c, compiled on the spot"


class Limits:
    """Probes for a number of threads. Not OpenMP's: its threads would have to share the cores with those of torch."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Limits:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def read(self, size: int) -> Probe:
        """Bytes per second of reading `size` bytes again and again, in the best of several patterns."""
        data = torch.ones((size + 3) // 4)
        if library() is None:
            return _rate(lambda times: [data.sum() for _ in range(times)], size)
        patterns = [(streams, ahead) for streams in (1, 2, 4, 8) for ahead in (0, 1024)]
        self._rest()
        probes = [_rate(self._reader(data, *pattern), size) for pattern in patterns]
        return self._rested(max(probes, key=lambda probe: max(probe() for _ in range(3))))

    def multiply_add(self) -> Probe:
        """Floating point operations per second, float32, a multiply-add counting as two."""
        native = library()
        if native is None:
            a = torch.rand(1024, 1024)
            return _rate(lambda times: [a @ a for _ in range(times)], 2 * 1024**3)
        per_time = native.limits_multiply_add(1, ctypes.c_float())

        def work(times: int, thread: int) -> None:
            native.limits_multiply_add(times * 1000, ctypes.c_float())

        self._rest()
        return self._rested(_rate(functools.partial(self._side_by_side, work), 1000 * per_time * self.threads))

    def _rest(self) -> None:
        if self.threads > 1:
            time.sleep(REST_SECONDS)

    def _rested(self, probe: Probe) -> Probe:
        def rested() -> float:
            self._rest()
            return probe()

        return rested

    def _reader(self, data: torch.Tensor, streams: int, ahead: int) -> Callable[[int], float]:
        native, size = library(), data.numel() * 4
        share = max(LINE, -(-size // self.threads // LINE) * LINE)

        def work(times: int, thread: int) -> None:
            start = min(thread * share, size)
            end = min(start + share, size)
            native.limits_read(data.data_ptr() + start, end - start, times, streams, ahead)

        return functools.partial(self._side_by_side, work)

    def _side_by_side(self, work: Callable[[int, int], None], times: int) -> float:
        """Seconds from the first thread's start to the last one's end."""
        barrier = threading.Barrier(self.threads)

        def timed(thread: int) -> tuple[float, float]:
            _take_core(thread)
            barrier.wait()
            start = time.perf_counter()
            work(times, thread)
            return start, time.perf_counter()

        spans = list(self._pool.map(timed, range(self.threads)))
        return max(end for _, end in spans) - min(start for start, _ in spans)


def _take_core(thread: int) -> None:
    """Left alone, threads that have just woken up may share a core for longer than a probe takes."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(_CORES)
        os.sched_setaffinity(0, {cores[thread % len(cores)]})


def _rate(run: Callable[[int], object], amount: float) -> Probe:
    """A probe of run(times), which handles `amount` every time and may return the seconds it took."""

    def seconds(times: int) -> float:
        start = time.perf_counter()
        took = run(times)
        return took if isinstance(took, float) else time.perf_counter() - start

    times = 1
    while (took := min(seconds(times) for _ in range(3))) < PROBE_SECONDS / 4:
        times *= 2
    times = max(1, round(times * PROBE_SECONDS / took))
    return lambda: amount * times / seconds(times)


# ---- the bench ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("limits", __doc__, seed=False)
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.25, 16, 256], metavar="MIB", help="of working sets"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of which the best counts (default: 5)")
    options = common.parse(parser, argv)
    threads = torch.get_num_threads()
    with Limits(threads) as machine:
        probes = {size: machine.read(round(size * MEBIBYTE)) for size in options.sizes}
        peak = machine.multiply_add()
        reading = {size: max(probe() for _ in range(options.rounds)) / 1e9 for size, probe in probes.items()}
        gigaflops = max(peak() for _ in range(options.rounds)) / 1e9
    print(f"{common.processor()}, {threads} threads, measured by {method()}")
    cells = [[f"{size:g}", f"{rate:.1f}"] for size, rate in reading.items()]
    print(markdown.table(["MiB", "read, GB/s"], cells, left=0))
    print(f"multiply-add, float32: {gigaflops:.1f} GFLOP/s")
    rows = [{"mebibytes": size, "gigabytes_per_second": rate} for size, rate in reading.items()]
    common.save(options, {"limits_by": method(), "read": rows, "gigaflops": gigaflops})
