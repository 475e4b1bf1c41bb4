"""What benches share: the entry point, arguments, rounds, and result files that say where their figures come from."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import e2cm_ext as e2cm

sys.path.append(str(Path(__file__).parents[2]))  # at the end: e2cm_ext is the installed one
from bench import common, limits, markdown
from bench.__main__ import available, main

ROOT = Path(__file__).parents[2]
FIELDS = {"command", "commit", "modified", "date", "processor", "cores", "gpu", "instruction_set", "threads"}
FIELDS |= {"system", "versions", "build"}
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


# ---- the entry point ------------------------------------------------------------------------------------------------


def test_the_list_names_every_bench(capsys):
    main([])
    shown = capsys.readouterr().out
    modules = {path.stem for path in (ROOT / "bench").iterdir() if path.suffix == ".py" or path.is_dir()}
    helpers = {"__init__", "__main__", "__pycache__", "common", "markdown", "results"}
    assert set(available()) == modules - helpers
    assert all(name in shown for name in available())


def test_an_unknown_bench_is_refused():
    with pytest.raises(SystemExit, match="there is no bench 'nothing'; there are kernels, "):
        main(["nothing"])


def test_the_list_needs_no_package():
    """Benches are imported when they are run: not even torch is needed before."""
    program = (
        "import sys; from bench.__main__ import main; main([]); assert not {'torch', 'e2cm_ext'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", available())
def test_help_shows_the_command(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"python -m bench {name}" in capsys.readouterr().out


# ---- arguments and provenance ---------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path):
    parser = common.argument_parser("some", "a bench")
    parser.add_argument("call")
    return common.parse(parser, ["net(56)", "--json", str(tmp_path / "out.json"), "--threads", "1", "--seed", "3"])


def test_arguments_set_threads_and_seed(options):
    drawn = torch.rand(1)
    assert torch.get_num_threads() == 1
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_a_result_says_where_it_comes_from(options, capsys):
    common.save(options, {"rows": [1, 2]}, "pytest")
    saved = json.loads(options.json.read_text())
    about = saved["provenance"]
    assert saved["rows"] == [1, 2] and set(about) == FIELDS
    assert about["command"] == f"python -m bench some 'net(56)' --json {options.json} --threads 1 --seed 3"
    assert about["threads"] == 1 and about["processor"] and about["instruction_set"] == e2cm.build_info()["isa"]
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["pytest"] == pytest.__version__
    assert "saved" in capsys.readouterr().err


def test_nothing_is_written_without_a_name(options):
    path, options.json = options.json, None
    common.save(options, {})
    assert not path.exists()


def test_outside_of_a_checkout_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    about = common.provenance("command")
    assert about["commit"] is None and about["modified"] is None


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path):
    path = tmp_path / "file.json"
    common.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        common.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_has_a_provenance(path):
    about = json.loads(path.read_text())["provenance"]
    assert about.keys() >= FIELDS
    assert len(about["commit"]) == 40 and about["versions"]["torch"] and about["date"]
    added = about.get("added_afterwards", {"fields": []})["fields"]
    assert all(about[field] is not None for field in added)
    if not added:
        assert about["command"] and about["processor"]


# ---- small parts ----------------------------------------------------------------------------------------------------


def test_rounds_hold_one_sample_of_each():
    order = []
    samplers = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    samples = common.shuffled_rounds(samplers, seconds=0, least=7)
    assert {name: len(values) for name, values in samples.items()} == {"a": 7, "b": 7, "c": 7}
    rounds = ["".join(order[i : i + 3]) for i in range(0, 21, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 1


def test_spread_and_tables():
    found = common.spread(np.arange(11.0))
    assert found == {"median": 5.0, "p10": 1.0, "p90": 9.0}
    assert markdown.with_spread(found, 1) == "5.0 [1.0, 9.0]"
    assert markdown.table(["a", "b"], [["c", "1"]]) == "| a | b |\n| :-- | --: |\n| c | 1 |"


def test_limits_are_positive():
    with limits.Limits(1) as machine:
        assert machine.read(1 << 12)() > 0 and machine.multiply_add()() > 0
