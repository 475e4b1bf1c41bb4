"""Every block of the README runs as it stands there: the Python ones one behind the other, and the tour of the command
line with a small network in the place of the large one. Blocks that install, build or measure are run by .ci/run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
FOUND = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
BLOCKS = [block for kind, block in FOUND if kind == "python"]
TOUR = "".join(block for kind, block in FOUND if kind == "bash" and re.search(r"^(e2cm|export) ", block, re.MULTILINE))
OTHERS = [block for kind, block in FOUND if kind == "bash" and block not in TOUR]
NAMES = {"__name__": "readme"}


def test_there_are_blocks():
    assert BLOCKS and TOUR.count("e2cm ") > 5 and OTHERS
    assert {kind for kind, _ in FOUND} <= {"python", "bash", "text", "cpp"}  # the last two cannot be run


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), NAMES)
    assert "left" in capsys.readouterr().out


STAND_IN = """
import torch
from torch import nn

def cifar10_resnet(depth):
    assert depth == 56
    torch.manual_seed(0)
    convolutions = [nn.Sequential(nn.Conv2d(width, 16, 3, padding=1), nn.ReLU()) for width in (3, 16, 16, 16)]
    layers = [*convolutions, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)]
    return nn.Sequential(*layers).eval()
"""


def test_the_tour_of_the_command_line(tmp_path):
    import numpy as np

    (tmp_path / "networks.py").write_text(STAND_IN)
    digits = load_digits()
    images = (np.kron(digits.images, np.ones((1, 2, 2))) * 15).astype(np.uint8)[..., None].repeat(3, 3)
    np.savez(
        tmp_path / "cifar10.npz", x_train=images[:600], y_train=digits.target[:600],
        x_test=np.tile(images[600:], (2, 1, 1, 1))[:2200], y_test=np.tile(digits.target[600:], 2)[:2200],
    )  # fmt: skip
    program = tmp_path / "bin" / "e2cm"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom e2cm_ext.cli import main\nmain()\n")
    program.chmod(0o755)
    # No network that has learned nothing can be within .01 of its own accuracy by chance: nor is it meant to be.
    where = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(["bash", "-euc", TOUR], cwd=tmp_path, env=where, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "accuracy" in found.stdout and (tmp_path / "resnet56.html").stat().st_size > 10_000


OPTIONAL = {"onnxruntime", "ray"}  # of extras that the tests do without; .ci/run has them


def test_every_other_block_is_run_by_ci():
    """.ci/run takes them out of the README by their first words, see `readme` there. Benches take their time: of these
    only the options are looked at, here."""
    ci = (ROOT / ".ci" / "run").read_text()
    names = [name for _, name in re.findall(r"""\breadme (["'])(.*?)\1(?=\s)""", ci)]
    for block in OTHERS:
        benches = re.findall(r"python (bench/\w+\.py)", block)
        scripts = re.findall(r"bash (bench/\w+\.sh)", block)
        run = any(block.startswith(name) for name in names) or any(
            f"bash {script} --dry-run" in ci for script in scripts
        )
        assert benches or run, f"not run: {block}"
        for bench in benches:
            ran = subprocess.run([sys.executable, ROOT / bench, "--help"], capture_output=True, text=True)
            missing = re.search(r"No module named '(\w+)'", ran.stderr)
            assert ran.returncode == 0 or (missing and missing[1] in OPTIONAL), ran.stderr
