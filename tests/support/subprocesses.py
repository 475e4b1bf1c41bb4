"""Python in processes of its own: with the package and the shared test code of this process, on one thread."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import e2cm_ext

TESTS = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
_empty = tempfile.TemporaryDirectory(prefix="e2cm-tests-")  # Python imports from where it is started
LIMIT = 300  # seconds that a process may take, on a busy machine


def environment(**changes: str) -> dict[str, str]:
    """The variables of this process, and `changes`.

    The child imports the same e2cm_ext as this process and the modules of tests/support. Options of pytest are not
    inherited: with a second -q, for example, it prints no counts.
    """
    paths = [TESTS, Path(e2cm_ext.__file__).parents[1], *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    own = {"PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))), "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    return os.environ | own | changes


def start_python(*arguments: object, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen:
    """Starts Python, by default in an empty folder, with pipes for its output."""
    options = {
        "cwd": tempfile.gettempdir(),
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    } | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment(**(env or {})), **options)


def run_python(
    *arguments: object, env: dict[str, str] | None = None, check: bool = True, timeout: float = LIMIT, **options: object
) -> subprocess.CompletedProcess:
    """Runs Python to its end. With `check`, a failure is an AssertionError with what the process said."""
    process = start_python(*arguments, env=env, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.wait()
    if check:
        assert process.returncode == 0, f"{process.returncode}: {(out or '')[-5000:]}{(err or '')[-3000:]}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def torchrun(script: str, folder: Path, *arguments: object) -> None:
    """Runs the code `script` in two processes under torchrun, in `folder`."""
    path = folder / "job.py"
    path.write_text(script)
    run_python(*TORCHRUN, path, *arguments, cwd=folder)
