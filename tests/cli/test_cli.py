"""The command line, mostly in this process and a few times as a program: its output, its errors, its exit codes."""

from __future__ import annotations

import json
import os
import signal
import textwrap
import time
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.datasets import load_digits
from support.subprocesses import run_python, start_python

import e2cm_ext as e2cm
from e2cm_ext.cli import main, model_loader

NET = """
    from pathlib import Path

    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv = nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x):
            return (x + self.conv(x)).relu()

    def make(width=8, classes=10):
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        end = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes))
        return nn.Sequential(stem, Block(width), Block(width), end), "something else"

    def trained():
        model, _ = make()
        model.load_state_dict(torch.load(Path(__file__).with_name("net.pt")))
        return model

    def wrong():
        return 3

    def fails():
        raise RuntimeError("no GPU today\\nsecond line")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network, weights of it, images, and a fitted file."""
    path = tmp_path_factory.mktemp("cli")
    (path / "net.py").write_text(textwrap.dedent(NET))
    digits = load_digits()
    images, labels = (digits.images * 15).astype(np.uint8), digits.target
    names = np.array([f"<digit {k}>" for k in range(10)])
    np.savez(
        path / "digits.npz", x_train=images[:600], y_train=labels[:600], x_test=images[600:1000],
        y_test=labels[600:1000], classes=names,
    )  # fmt: skip
    model = model_loader.load(f"{path}/net.py:make")[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = torch.from_numpy(images[:600])[:, None].float() / 255, torch.from_numpy(labels[:600])
    for step in range(60):
        rows = slice(step % 6 * 100, step % 6 * 100 + 100)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    torch.save(model.state_dict(), path / "net.pt")
    fitted = run("fit", path / "net.e2cm", *what(path), "--flops", 0.7)
    assert fitted.exit_code == 0, fitted.stderr
    return path


def what(path, network="trained"):
    return ("-n", f"{path}/net.py:{network}", "-d", path / "digits.npz", "--normalise", "none", "-q")


def run(*arguments, **rest):
    return CliRunner().invoke(main, [str(word) for word in arguments], **rest)


def json_of(*arguments):
    found = run(*arguments, "--json")
    assert found.exit_code == 0, found.stderr
    assert found.stderr == ""
    return json.loads(found.stdout)


def error(code, *arguments, **rest):
    """The one line that is said."""
    found = run(*arguments, **rest)
    assert (found.exit_code, found.stdout) == (code, ""), found.output
    assert found.stderr.startswith("e2cm: error: ") and found.stderr.count("\n") == 1
    return found.stderr


def start(*arguments, **options):
    return start_python("-c", "from e2cm_ext.cli import main; main()", *arguments, **options)


# ---- output ---------------------------------------------------------------------------------------------------------


def test_fit_writes_the_same_as_the_python_interface(folder):
    model, _ = model_loader.load(f"{folder}/net.py:trained")
    train = e2cm.data.load(folder / "digits.npz", normalise=None)
    fitted_on, held_out = e2cm.data.split(train, [0.9, 0.1])
    ee = e2cm.EarlyExit(model, next(iter(train))[0][:1]).fit(fitted_on, progress=False)
    ee.calibrate(held_out, flops=0.7, progress=False)
    there = e2cm.EarlyExit.load(folder / "net.e2cm", model)
    assert there.exit_names == ee.exit_names
    for name, value in ee.heads.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, there.heads.state_dict()[name]), name
    assert torch.equal(there.thresholds, ee.thresholds)


def test_fit_prints_the_next_command(folder, tmp_path):
    found = run("fit", tmp_path / "a.e2cm", *what(folder), "--flops", "0.7")
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("next: ")]
    again = run(*line.removeprefix("next: e2cm ").split(), "-q")
    assert again.exit_code == 0, again.stderr
    found = run("fit", tmp_path / "b.e2cm", *what(folder))
    assert "e2cm calibrate" in found.stdout


def test_evaluate_agrees_with_the_python_interface(folder):
    found = json_of("evaluate", folder / "net.e2cm", *what(folder), "--part", "100:")
    model, _ = model_loader.load(f"{folder}/net.py:trained")
    ee = e2cm.EarlyExit.load(folder / "net.e2cm", model)
    test = e2cm.data.load(folder / "digits.npz", split="test", normalise=None, part=slice(100, None))
    wanted = ee.evaluate(test, progress=False)
    assert (found["accuracy"], found["flops"], found["samples"]) == (wanted.accuracy, wanted.flops, 300)
    assert [row["leavers"] for row in found["exits"]] == wanted.exits.tolist()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
    assert found["network_accuracy"] == right / 300


def test_evaluate_prints_a_table(folder):
    found = run("evaluate", folder / "net.e2cm", *what(folder))
    assert "400 samples" in found.stdout and "the network alone" in found.stdout and "█" in found.stdout


@pytest.mark.parametrize(
    ("budget", "holds"),
    [
        (("--flops", 0.5), lambda point, base: point["flops"] <= 0.5),
        (("--accuracy-drop", 0.02), lambda point, base: point["accuracy"] >= base - 0.02),
        (("--latency", 5.0, "-b", 16), lambda point, base: point["latency"] <= 5 and point["batch_size"] == 16),
        (("--risk", 0.5, 0.1), lambda point, base: (point["epsilon"], point["delta"]) == (0.5, 0.1)),
        (("--risk", 0.5, 0.1, "--of", "agreement"), lambda point, base: point["risk"] <= 0.5),
    ],
)
def test_calibrate_for_every_budget(folder, tmp_path, budget, holds):
    out = tmp_path / "other.e2cm"
    before = (folder / "net.e2cm").read_bytes()
    found = json_of("calibrate", folder / "net.e2cm", *what(folder), *budget, "-o", out)
    assert holds(found["point"], found["network_accuracy"]), found
    assert (folder / "net.e2cm").read_bytes() == before
    limits = json_of("info", out)
    assert limits["kind"] == "EarlyExit"
    loaded = e2cm.EarlyExit.load(out, model_loader.load(f"{folder}/net.py:trained")[0])
    assert [{inf: "never", -inf: "always"}.get(v, v) for v in loaded.thresholds.tolist()] == found["point"][
        "thresholds"
    ]


def test_fit_on_one_split_and_calibrate_on_another(folder, tmp_path):
    found = json_of(
        "fit", tmp_path / "a.e2cm", *what(folder), "--flops", 0.7, "--held-out-split", "test", "--held-out-part", ":150"
    )  # fmt: skip
    assert (found["fitted_on"], found["held_out"]) == (600, 150)
    found = json_of("fit", tmp_path / "a.e2cm", *what(folder), "--select", 1, "--exits", "0,1", "--head", "class_means")
    assert (found["fitted_on"], found["held_out"], len(found["exits"])) == (540, 60, 1)
    assert found["exits"][0]["head"] == "class_means" and found["point"] is None


def test_curve_gives_points_and_a_picture(folder, tmp_path):
    picture = tmp_path / "curve.svg"
    found = json_of("curve", folder / "net.e2cm", *what(folder), "--method", "paper", "--picture", picture)
    assert found["samples"] == 200  # the other half found the thresholds
    assert all(0 < point["flops"] < 2 and 0 <= point["accuracy"] <= 1 for point in found["points"])
    assert picture.read_text().count("<svg") == 1
    assert "picture.xyz" in error(1, "curve", folder / "net.e2cm", *what(folder), "--picture", tmp_path / "picture.xyz")
    assert not (tmp_path / "picture.xyz").exists()


def test_profile_and_bench(folder, tmp_path):
    found = json_of("profile", folder / "net.e2cm", *what(folder), "-b", 4, "--repeats", 1, "--save", tmp_path / "p")
    assert found["sizes"] == [1, 2, 4]
    assert e2cm.Profile.load(tmp_path / "p").stages.tolist() == found["stages_seconds"]
    found = json_of("bench", folder / "net.e2cm", *what(folder), "-b", 16, "--rounds", 2, "--batches", 2)
    assert set(found["ways"]) == {"network", "predict", "predict_stream"}
    assert found["ways"]["network"]["time"]["median"] == 1 and found["images"] == 32
    for command in ("profile", "bench"):
        assert run(command, folder / "net.e2cm", *what(folder), "-b", 2).exit_code == 0


def test_info_shows_the_build_and_a_file(folder):
    assert json_of("info")["build"]["version"] == e2cm.__version__
    found = run("info", folder / "net.e2cm")
    assert "threshold" in found.stdout and "whitened_means" in found.stdout
    assert json_of("info", folder / "net.e2cm")["about"]["exits"] == ["0", "1", "2"]


def test_options_from_the_environment(folder):
    there = {
        "E2CM_NETWORK": f"{folder}/net.py:trained",
        "E2CM_DATA": str(folder / "digits.npz"),
        "E2CM_NORMALISE": "none",
    }
    assert run("evaluate", folder / "net.e2cm", "-q", env=there).exit_code == 0


@pytest.mark.parametrize("command", ["", *sorted(main.commands)])
def test_help_has_an_example(command):
    found = run(*command.split(), "--help")
    assert found.exit_code == 0 and "e2cm " in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 100
    example = [line for line in found.stdout.splitlines() if line.startswith("    e2cm ") or "  e2cm " in line]
    assert example


def test_commands_options_and_networks_are_completed(folder):
    def completed(words):
        count = len(words.split()) - (0 if words.endswith(" ") else 1)
        there = {"_E2CM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
        found = run(prog_name="e2cm", env=there)
        return [line.partition(",")[2] for line in found.stdout.splitlines()]

    assert completed("e2cm ev") == ["evaluate"]
    assert "--accuracy-drop" in completed("e2cm calibrate x --acc")
    assert completed("e2cm fit x --normalise im") == ["imagenet"]
    assert completed("e2cm fit x -n torchv") == ["torchvision/"]
    assert "whitened_means" in completed("e2cm fit x --head ")


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["evaluate"], "Missing argument 'FILE.e2cm'"),
        (["fit", "x.e2cm"], "-n"),
        (["fit", "x.e2cm", "--nonsense"], "No such option"),
        (["fit", "/nowhere/x.e2cm"], "there is no folder /nowhere"),
        (["fit", "/tmp"], "is a directory"),
        (["evaluate", "/nowhere/x.e2cm"], "does not exist"),
        (["demo", "--flops", "0"], "0"),
        (["evaluate", "FILE", "WHAT", "--part", "7"], "'7' is not a range of samples"),
        (["evaluate", "FILE", "WHAT", "--normalise", "imagnet"], "'imagnet' is none of: none, imagenet"),
        (["evaluate", "FILE", "WHAT", "-b", "0"], "-b"),
        (["calibrate", "FILE", "WHAT"], "no budget is given"),
        (["calibrate", "FILE", "WHAT", "--flops", "0.5", "--latency", "0.5"], "--flops and --latency are given"),
        (["calibrate", "FILE", "WHAT", "--flops", "0.5", "--of", "agreement"], "--of says what --risk bounds"),
        (["fit", "x.e2cm", "WHAT", "--held-out-part", ":5"], "--held-out-split"),
    ],
)
def test_a_usage_error_is_one_line_and_code_2(folder, words, said):
    words = [w for word in words for w in ({"FILE": [folder / "net.e2cm"], "WHAT": what(folder)}.get(word, [word]))]
    assert said in error(2, *words)


def replaced(words, option, value):
    words = [str(word) for word in words]
    words[words.index(option) + 1] = str(value)
    return words


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("-n", "net.py:make", "there is no file net.py"),
        ("-n", "HERE/net.py:nothing", "has no 'nothing'; it has Block, Path, fails, make, trained, wrong"),
        ("-n", "HERE/net.py:make(open('x'))", "plain values"),
        ("-n", "HERE/net.py:make(", "names no function"),
        ("-n", "HERE/net.py:wrong", "has made a int; wanted a torch.nn.Module"),
        ("-n", "HERE/net.py:fails", "no GPU today second line"),
        ("-n", "HERE/net.py:make(4)", "belongs to another network"),
        ("-n", "no.such.module:make", "there is no module 'no.such.module'"),
        ("-n", "no_such_network", "'no_such_network' is not a network; wanted torchvision/NAME"),
        ("-d", "HERE/nothing.npz", "HERE/nothing.npz: No such file"),
        ("-d", "no/thing", "is neither a folder nor a .npz file"),
        ("-d", "HERE/net.pt", "is neither a folder nor a .npz file"),
        ("-d", "HERE/torn.npz", "torn.npz cannot be read"),
        ("--normalise", "weights", "do not say how images were prepared"),
        ("--normalise", ".5,.5/.5,.5", "`normalise` has 2 means"),
    ],
)
def test_a_failure_is_one_line_and_code_1(folder, option, value, said):
    (folder / "torn.npz").write_bytes((folder / "digits.npz").read_bytes()[:3000])
    words = replaced(what(folder), option, value.replace("HERE", str(folder)))
    assert said.replace("HERE", str(folder)) in error(1, "evaluate", folder / "net.e2cm", *words)


def test_damaged_and_foreign_files(folder, tmp_path):
    ours = (folder / "net.e2cm").read_bytes()
    for name, content, said in (
        ("torn.e2cm", ours[: len(ours) // 2], "is truncated"),
        ("other.e2cm", b"something else", "is not a file of e2cm_ext"),
        ("changed.e2cm", ours[:-9] + bytes([ours[-9] ^ 1]) + ours[-8:], "is damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        assert said in error(1, "evaluate", tmp_path / name, *what(folder))
        assert said in error(1, "info", tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda net: net[: len(net) // 2], "cannot be read"),
        (lambda net: b"", "cannot be read"),
        (lambda net: b"text", "cannot be read"),
    ],
)
def test_corrupt_weights(folder, tmp_path, content, said):
    path = tmp_path / "w.pt"
    path.write_bytes(content((folder / "net.pt").read_bytes()))
    assert said in error(1, "evaluate", folder / "net.e2cm", *what(folder), "-w", path)
    path = path.rename(tmp_path / "w.safetensors")
    assert said in error(1, "evaluate", folder / "net.e2cm", *what(folder), "-w", path)


def test_a_budget_that_cannot_be_met_changes_nothing(folder):
    before = (folder / "net.e2cm").read_bytes()
    assert "the cheapest there is" in error(1, "calibrate", folder / "net.e2cm", *what(folder), "--flops", 1e-4)
    assert (folder / "net.e2cm").read_bytes() == before
    assert "accuracy_drop" in error(1, "calibrate", folder / "net.e2cm", *what(folder), "--accuracy-drop", -1)


def test_a_missing_device(folder):
    assert "--device nonsense" in error(1, "evaluate", folder / "net.e2cm", *what(folder), "--device", "nonsense")
    if not torch.backends.cuda.is_built():
        assert "--device cuda: " in error(1, "evaluate", folder / "net.e2cm", *what(folder), "--device", "cuda")


def test_debug_shows_the_traceback(folder):
    found = run("evaluate", folder / "net.e2cm", *what(folder, "fails"), "--debug")
    assert found.exit_code == 1
    assert "Traceback" in found.stderr and 'raise RuntimeError("no GPU today' in found.stderr


def test_warnings_are_lines_too(folder, tmp_path):
    found = run(
        "calibrate",
        folder / "net.e2cm",
        *what(folder),
        "--risk",
        0.001,
        0.01,
        "--of",
        "agreement",
        "-o",
        tmp_path / "a.e2cm",
    )
    assert found.exit_code == 0
    assert found.stderr.startswith("e2cm: warning: ") and found.stderr.count("\n") == 1


# ---- as a program ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.subprocess
def test_results_go_to_stdout_and_errors_to_stderr(folder):
    good = start("evaluate", folder / "net.e2cm", *what(folder), "--json")
    bad = start("evaluate", folder / "nothing.e2cm")
    out, err = good.communicate(timeout=600)
    assert (good.returncode, err) == (0, "") and json.loads(out)["samples"] == 400
    out, err = bad.communicate(timeout=600)
    assert (bad.returncode, out) == (2, "") and err.count("\n") == 1


SLOW = """
    import pathlib, time
    from net import trained

    def make():
        model = trained()

        def wait(*_):
            pathlib.Path(__file__).with_name("started").touch()
            time.sleep(60)

        model[0][1].register_forward_pre_hook(wait)
        return model
"""


@pytest.mark.slow
@pytest.mark.subprocess
def test_interrupted_nothing_is_written(folder, tmp_path):
    (folder / "slow.py").write_text(textwrap.dedent(SLOW))
    old = (folder / "net.e2cm").read_bytes()
    (tmp_path / "old.e2cm").write_bytes(old)
    words = replaced(what(folder), "-n", folder / "slow.py:make")
    program = start("fit", tmp_path / "old.e2cm", *words, "--flops", 0.5, cwd=folder)  # slow.py imports net.py
    deadline = time.monotonic() + 600
    while not (folder / "started").exists():
        assert program.poll() is None and time.monotonic() < deadline, program.communicate()
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=300)
    assert (program.returncode, out) == (130, "")
    assert err.strip() == "e2cm: interrupted: nothing was written"
    assert os.listdir(tmp_path) == ["old.e2cm"] and (tmp_path / "old.e2cm").read_bytes() == old


@pytest.mark.subprocess
def test_it_runs_as_a_module():
    ran = run_python("-m", "e2cm_ext", "--help")
    assert ran.stdout.startswith("Usage: e2cm "), ran.stderr


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_full_disk_is_one_line(folder):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        program = run_python("-m", "e2cm_ext", "info", check=False, stdout=full)
    assert program.returncode != 0 and "Traceback" not in program.stderr
