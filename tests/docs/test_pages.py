"""The code of the README and of docs/ runs as it stands there, and the generated tables are fresh.

The Python blocks of a page run one after the other in one namespace. A block that cannot run here follows a line
`<!-- not run: reason -->`. The README's tour of the command line runs with a small network in place of the large one.
Blocks that install or build are run by .ci/run; of benchmarks, the options are checked.
"""

import argparse
import importlib
import re
import runpy
import shlex
import sys
import textwrap
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.datasets import load_digits

from e2cm_ext import cli

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("[!_]*.py"))  # not what they share
OPTIONAL = {"litserve", "onnx", "onnxruntime", "onnxscript", "prometheus_client", "ray", "timm", "torchvision"}
NOT_CODE = {"bibtex", "console", "cpp", "json", "text", "toml", "yaml"}  # what cannot be run
FENCE = re.compile(
    r"^(?P<skip> *<!-- not run: [^\n]+ -->\n\s*)?(?P<indent> *)```(?P<kind>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
# The old README has 1,147 lines and other tables.
IS_NEW = "<!-- generated: readme-results -->" in README.read_text(encoding="utf-8")


class Block(NamedTuple):
    kind: str
    code: str
    line: int  # of its first line of code, in the page
    runs: bool


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["kind"],
            textwrap.dedent(found["code"]),
            text.count("\n", 0, found.start("code")) + 1,
            runs=found["skip"] is None,
        )
        for found in FENCE.finditer(text)
    ]


def lines_of(code: str) -> list[str]:
    """Commands: lines, joined where they end in a backslash, without those that are empty or comments."""
    return [line for line in code.replace("\\\n", "").splitlines() if line.strip() and not line.startswith("#")]


BLOCKS = {page.relative_to(ROOT).as_posix(): blocks_of(page) for page in PAGES}
WITH_PYTHON = [page for page, blocks in BLOCKS.items() if any(b.kind == "python" and b.runs for b in blocks)]
BASH = [
    (page, block.code) for page, blocks in BLOCKS.items() for block in blocks if block.kind == "bash" and block.runs
]
TOUR = "".join(code for page, code in BASH if page == README.name and re.search(r"^(e2cm|export) ", code, re.MULTILINE))
OTHERS = [
    code
    for page, code in BASH
    if code not in TOUR and (page == README.name or code.startswith(("cmake ", "bash bench/")))
]
BENCHES = sorted({line for _, code in BASH for line in lines_of(code) if line.startswith("python -m bench ")})


def test_there_are_blocks():
    assert README.name in WITH_PYTHON and TOUR.count("e2cm ") > 5 and OTHERS
    kinds = {(page, block.kind) for page, blocks in BLOCKS.items() for block in blocks}
    assert {kind for _, kind in kinds} <= {"python", "bash"} | NOT_CODE, kinds


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in BLOCKS[page]:
        if block.kind == "python" and block.runs:
            # Blank lines in front, so that a traceback names the line of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")
            with skip_without_extras():
                exec(code, module.__dict__)
    if page == README.name or page.startswith("docs/methods/"):
        assert "left" in capsys.readouterr().out  # samples left early


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example)])
    monkeypatch.syspath_prepend(example.parent)  # as when Python runs a script
    with skip_without_extras():
        runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


class skip_without_extras:
    """Skips a test whose code imports a package of an extra that is not installed."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in OPTIONAL:
            pytest.skip(f"{error.name} is not installed")


# ---- tables and links -----------------------------------------------------------------------------------------------


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("bench.tables")


def test_generated_tables_are_fresh(tables):
    tables.main(["--check"])


def test_the_check_of_tables_notices_a_changed_figure(tables, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    (tmp_path / "README.md").write_text("no table here")
    page.write_text("before\n<!-- generated: alternatives -->\n<!-- end -->\nafter\n")
    tables.main([])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n") and "in int8, with exits" in text
    tables.main(["--check"])
    page.write_text(text.replace("0.906", "0.916"))
    with pytest.raises(SystemExit, match=r"stale: docs/page\.md"):
        tables.main(["--check"])
    page.write_text("<!-- generated: nothing -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="there is no table 'nothing'"):
        tables.main(["--check"])


@pytest.mark.parametrize(
    ("budget", "accuracy"), [(0.1, ""), (0.2, "0.500"), (0.25, "0.550"), (0.3, "0.600"), (1, "0.600")]
)
def test_accuracy_between_two_points_is_that_of_time_sharing(tables, budget, accuracy):
    points = [{"budget": 0.2, "accuracy": 0.5}, {"budget": 0.3, "accuracy": 0.6}]
    assert tables.reading.accuracy_at(budget, points) == accuracy


def test_numbers_are_rounded_half_up(tables):
    assert [tables.reading.fixed(x, 3) for x in (0.9175, 0.91750001907, 0.9174999, 0.93550002)] == [
        "0.918", "0.918", "0.917", "0.936",
    ]  # fmt: skip


@pytest.mark.skipif(not IS_NEW, reason="the old README")
def test_readme_is_short_and_its_links_lead_to_files():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


# ---- the command line -----------------------------------------------------------------------------------------------

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


def test_the_tour_of_the_command_line(tmp_path, monkeypatch):
    digits = load_digits()
    images = (np.kron(digits.images, np.ones((1, 2, 2))) * 15).astype(np.uint8)[..., None].repeat(3, 3)
    np.savez(
        tmp_path / "cifar10.npz", x_train=images[:600], y_train=digits.target[:600],
        x_test=np.tile(images[600:], (2, 1, 1, 1))[:2200], y_test=np.tile(digits.target[600:], 2)[:2200],
    )  # fmt: skip
    (tmp_path / "networks.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    # No network that has learned nothing can be within .01 of its own accuracy by chance: nor is it meant to be.
    said = ""
    for line in lines_of(TOUR):
        program, *words = shlex.split(line, comments=True)
        if program == "export":
            monkeypatch.setenv(*words[0].split("=", 1))
            continue
        assert program == "e2cm"
        found = CliRunner().invoke(cli.main, words)
        assert found.exit_code == 0, f"{line}\n{found.output}"
        said += found.stdout
    assert "accuracy" in said and (tmp_path / "resnet56.html").stat().st_size > 10_000


def test_every_other_block_is_run_by_ci():
    """.ci/run takes them out of the pages by their first words, see `readme` there. Benches take their time: of these
    only the options are looked at, here."""
    ci = (ROOT / ".ci" / "run").read_text()
    names = [name for _, name in re.findall(r"""\breadme (["'])(.*?)\1(?=\s)""", ci)]
    for block in OTHERS:
        scripts = re.findall(r"bash (bench/\w+\.sh)", block)
        run = any(block.startswith(name) for name in names) or any(
            f"bash {script} --dry-run" in ci for script in scripts
        )
        assert run or block.startswith("python -m bench "), f"not run: {block}"


class Parsed(Exception):
    """The arguments were understood."""


@pytest.mark.parametrize("line", BENCHES, ids=lambda line: line.split()[3])
def test_commands_of_benchmarks_are_understood(line, monkeypatch):
    name, *arguments = shlex.split(line, comments=True)[3:]
    monkeypatch.syspath_prepend(ROOT)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with skip_without_extras():
        bench = importlib.import_module(f"bench.{name}")
        with pytest.raises(Parsed):
            bench.main(arguments)
