"""Packages: what is run from them answers as the network they were exported from; what is not whole is refused."""

import hashlib
import importlib.util
import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import CLASSES, SHAPE, Scripted, loader, net, net_in_stages, samples
from support.packages import network, noisy
from support.subprocesses import run_python
from support.tensors import INF, NAN, generator

import e2cm_ext as e2cm
from e2cm_ext import deploy, runner
from e2cm_ext.deploy.export_modules import Features, StageWithExit, logits_of
from e2cm_ext.methods.sdn import MostConfident
from e2cm_ext.ops import reference

pytestmark = pytest.mark.export

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs onnx, onnxscript and onnxruntime: the extra `onnx`")
FORMATS = [pytest.param("onnx", marks=needs_onnx), "torch"]

# ---- the operations that are exported ------------------------------------------------------------------------------


@st.composite
def statistics(draw):
    """Feature maps, and statistics of them; cells of equal and of unequal size."""
    channels, rows, columns = (draw(st.integers(1, most)) for most in (9, 6, 6))

    def grid():
        some = (draw(st.integers(1, rows)), draw(st.integers(1, columns)))
        return some if draw(st.booleans()) else (0, 0)

    last = draw(st.booleans())
    pairs = draw(st.integers(0, (channels + 1) // 2))
    grids = dict(mean=grid(), rms=grid(), max=grid())
    if not pairs and not any(g[0] for g in grids.values()):
        grids["mean"] = (1, 1)
    wanted = e2cm.Statistics(**grids, pairs=pairs, channels=-1 if last else 0)
    shape = (rows, columns, channels) if last else (channels, rows, columns)
    x = torch.randn(draw(st.integers(1, 4)), *shape, dtype=torch.float64, generator=generator(draw(st.integers(0, 99))))
    return wanted, shape, x


@given(statistics(), st.booleans())
def test_statistics_are_those_of_the_reference(problem, dense):
    wanted, shape, x = problem
    features = Features(wanted, shape)
    features.dense = dense  # both ways to the products of channels
    torch.testing.assert_close(features(x), reference.statistics(x, wanted), rtol=1e-9, atol=1e-9)


@given(statistics(), st.booleans(), st.booleans())
def test_parts_times_split_weights_are_statistics_times_weights(problem, dense, nonnegative):
    wanted, shape, x = problem
    x = x.abs() if nonnegative else x
    features = Features(wanted, shape, nonnegative)
    features.dense = dense
    expected = reference.statistics(x, wanted)
    weight = torch.randn(5, expected.shape[1], dtype=torch.float64, generator=generator(3))
    pairs = zip(features.parts(x), features.split_weights(weight), strict=True)
    torch.testing.assert_close(sum(part @ w for part, w in pairs), expected @ weight.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(features(x), expected, rtol=1e-9, atol=1e-9)


def test_tokens_vectors_and_raw_features():
    x = torch.randn(3, 5, 7, dtype=torch.float64, generator=generator(0))
    wanted = e2cm.Statistics(mean=(1, 1), pairs=2, channels=-1)
    torch.testing.assert_close(Features(wanted, (5, 7))(x), reference.statistics(x, wanted))
    wanted = e2cm.Statistics(mean=(1, 1))
    torch.testing.assert_close(Features(wanted, (7,))(x[:, 0]), reference.statistics(x[:, 0], wanted))
    assert torch.equal(Features(None, (5, 7))(x), x.flatten(1))


@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_distances_are_those_of_the_reference(shift):
    """With a large shared offset, too, where |x|^2 - 2 x m + |m|^2 of the features as they are would be lost."""
    head = e2cm.ClassMeans(4, (6, 5, 5))
    x = torch.randn(40, 6, 5, 5, generator=generator(1)) + shift
    labels = torch.arange(40) % 3  # class 3 has no sample
    for pass_index in range(2):
        head.update(x, labels, pass_index)
        head.finish(pass_index)
    logits, sound = logits_of(head)(x)
    expected = reference.class_scores(x.double(), head.means.double(), head.scale.double())[2]
    found = logits.log_softmax(1)
    torch.testing.assert_close(found[:, :3].double(), expected[:, :3], rtol=1e-4, atol=1e-4)
    assert (found[:, 3] == -INF).all()
    assert torch.equal(sound, torch.zeros(40))


@pytest.mark.parametrize("head", ["class_means", "pooled_means", "whitened_means"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_sample_that_is_not_finite_has_no_certainty(head, bad):
    ee = e2cm.EarlyExit(net(), torch.zeros(1, *SHAPE), head=head).fit(loader(60), progress=False)
    stage = torch.nn.Identity()
    x = ee.stages[0](samples(3))
    x[1, 2, 3, 4] = bad
    certainty = StageWithExit([stage], ee.heads[0], ee.rule)(x)[1]
    assert certainty.isfinite().tolist() == [True, False, True]


def test_a_maximum_alone_does_not_hide_an_infinity():
    x = torch.zeros(2, 3, 4, 4)
    x[0, 0, 0, 0] = -INF
    found = Features(e2cm.Statistics(max=(1, 1)), (3, 4, 4))(x)
    assert found[0].isnan().all()
    assert (found[1] == 0).all()


# ---- packages that answer ------------------------------------------------------------------------------------------


@dataclass
class Packed:
    ee: e2cm.EarlyExit
    path: Path
    manifest: dict


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """One network, in a package of every format; made when it is asked for."""
    made = {}

    def make(format):
        if format not in made:
            path = tmp_path_factory.mktemp("packages") / f"{format}.zip"
            ee = network()
            made[format] = Packed(ee, path, ee.export(path, format, progress=False))
        return made[format]

    return make


def numbers_of(answers):
    return [np.asarray(column) for column in answers]


def as_wanted(format, images):
    return images.numpy() if format == "onnx" else images


def agree(found, expected):
    """Two runtimes round differently: log-probabilities agree to 1e-3 of their size."""
    found, expected = numbers_of(found), numbers_of(expected)
    for which in (0, 2):
        assert found[which].dtype == np.int64
        np.testing.assert_array_equal(found[which], expected[which])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[3], expected[3], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_package_answers_as_the_network_does(packed, format):
    made = packed(format)
    cascade = deploy.load(made.path, threads=1)
    images = noisy(samples(200, seed=3))
    expected = made.ee.predict(images)
    assert expected.exit.bincount(minlength=5).tolist()[1] == 0
    assert (expected.exit.bincount(minlength=5)[[0, 2, 3, 4]] > 0).all()  # all ways out are taken
    agree(cascade.predict(as_wanted(format, images)), expected)
    for size in (1, 32):
        parts = [numbers_of(cascade.predict(as_wanted(format, part))) for part in images.split(size)]
        agree([np.concatenate(column) for column in zip(*parts, strict=True)], expected)
    np.testing.assert_allclose(
        np.asarray(cascade(as_wanted(format, images))), expected.log_probs.numpy(), rtol=1e-3, atol=1e-3
    )
    assert [len(column) for column in cascade.predict(as_wanted(format, images[:0]))] == [0] * 4


@pytest.mark.parametrize("format", FORMATS)
def test_thresholds_can_be_set_anew(packed, format):
    made = packed(format)
    cascade = deploy.load(made.path, threads=1)
    np.testing.assert_array_equal(np.asarray(cascade.thresholds), made.ee.thresholds[[0, 2, 3]].numpy())
    images = as_wanted(format, samples(20))
    cascade.thresholds = INF
    answers = cascade.predict(images)
    assert (np.asarray(answers.exit) == 4).all()
    logits = made.ee.stages(samples(20))
    np.testing.assert_array_equal(np.asarray(answers.prediction), logits.argmax(1).numpy())
    cascade.thresholds = [INF, -INF, INF]
    assert (np.asarray(cascade.predict(images).exit) == 2).all()
    for wrong in ([0.5], [NAN, 0, 0]):
        with pytest.raises(ValueError, match="`thresholds`"):
            cascade.thresholds = wrong


@pytest.mark.parametrize("format", FORMATS)
def test_a_sample_with_a_nan_never_leaves_early(packed, format):
    cascade = deploy.load(packed(format).path, threads=1)
    cascade.thresholds = -INF
    images = samples(3)
    images[1, 0, 4, 4] = NAN
    assert np.asarray(cascade.predict(as_wanted(format, images)).exit).tolist() == [0, 4, 0]


@pytest.mark.parametrize("format", FORMATS)
def test_a_path_in_the_place_of_a_package_is_refused(packed, format):
    made = runner.OnnxCascade if format == "onnx" else deploy.TorchCascade
    with pytest.raises(TypeError, match="`package` is a str; wanted a Package: `load` takes a path"):
        made(str(packed(format).path))


@pytest.mark.parametrize("format", FORMATS)
def test_images_that_do_not_fit_are_refused(packed, format):
    cascade = deploy.load(packed(format).path, threads=1)
    images = as_wanted(format, samples(2))
    with pytest.raises(ValueError, match=r"`images` has shape \[1, 8, 8\]; wanted \[batch, 1, 8, 8\]: is it one image"):
        cascade.predict(images[0])
    with pytest.raises(ValueError, match=r"shape \[2, 1, 8, 7\]"):
        cascade.predict(images[..., 1:])
    with pytest.raises(TypeError, match="`images` is float64; wanted float32"):
        cascade.predict(images.astype("float64") if format == "onnx" else images.double())
    with pytest.raises(TypeError, match="`images` is a list"):
        cascade.predict([1.0])


def test_the_manifest_says_what_is_in_the_package(packed):
    made = packed("torch")
    with zipfile.ZipFile(made.path) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        assert manifest == made.manifest
        hashes = {n: hashlib.sha256(archive.read(n)).hexdigest() for n in archive.namelist() if n != "manifest.json"}
    assert manifest["files"] == hashes
    assert manifest["exits"] == list(made.ee.exit_names)
    assert [stage["exit"] for stage in manifest["stages"]] == [0, 2, 3, 4]
    assert [stage["name"] for stage in manifest["stages"]] == [*(made.ee.exit_names[j] for j in (0, 2, 3)), "(end)"]
    assert [stage["shape"] for stage in manifest["stages"]] == [[12, 8, 8], [24, 4, 4], [24, 4, 4], [CLASSES]]
    assert (manifest["runtime"], manifest["version"], manifest["rule"]) == ("torch", e2cm.__version__, "confidence")


def test_export_leaves_the_network_as_it_is(packed):
    fresh = network()
    ee = packed("torch").ee
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(ee.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    assert ee.stages.parts[0] is not None
    assert not any(module.training for module in ee.modules())


@pytest.mark.slow
@pytest.mark.subprocess
@needs_onnx
def test_the_runner_needs_no_torch(packed, tmp_path):
    """As a file of its own, in a process that cannot import torch."""
    made = packed("onnx")
    shutil.copy(runner.__file__, tmp_path / "runner.py")
    images = noisy(samples(50, seed=3)).numpy()
    np.save(tmp_path / "images.npy", images)
    script = (
        "import sys; sys.modules['torch'] = sys.modules['e2cm_ext'] = None\n"
        "import numpy as np\n"
        "from runner import OnnxCascade\n"
        f"answers = OnnxCascade.load({str(made.path)!r}, threads=1).predict(np.load('images.npy'))\n"
        "np.savez('answers.npz', **answers._asdict())\n"
    )
    run_python("-c", script, cwd=tmp_path)
    found = np.load(tmp_path / "answers.npz")
    agree([found[name] for name in runner.Answers._fields], made.ee.predict(torch.from_numpy(images)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_compiled_programs_answer_as_the_network_does(tmp_path):
    first = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, stride=2), torch.nn.ReLU())
    stages = e2cm.Stages([first, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, CLASSES))]).eval()
    ee = e2cm.EarlyExit(stages, torch.zeros(1, *SHAPE), head="pooled_means").fit(loader(200), progress=False)
    ee.thresholds = ee.record(loader(200, seed=1), progress=False).confidence[:, 0].median()
    ee.export(tmp_path / "p.zip", "aoti", progress=False)
    cascade = deploy.load(tmp_path / "p.zip")
    images = samples(40, seed=5)
    expected = ee.predict(images)
    assert len(expected.exit.unique()) == 2
    agree(cascade.predict(images), expected)
    alone = [cascade.predict(image) for image in images[:5].split(1)]
    agree([torch.cat(column) for column in zip(*alone, strict=True)], [column[:5] for column in expected])


@dataclass(frozen=True)
class Margin(e2cm.Rule):
    name: ClassVar[str] = "margin"

    def certainty(self, log_probs):
        first, second = log_probs.exp().topk(2, dim=1).values.unbind(1)
        return first - second


def test_networks_in_16_bits(tmp_path):
    ee = e2cm.EarlyExit(net().bfloat16(), torch.zeros(1, *SHAPE, dtype=torch.bfloat16), exits=2)
    ee.fit([(x.bfloat16(), y) for x, y in loader(200)], progress=False)
    held_out = [(noisy(x).bfloat16(), y) for x, y in loader(200, seed=1)]
    ee.thresholds = ee.record(held_out, progress=False).confidence[:, :2].median(0).values
    ee.export(tmp_path / "p.zip", "torch", progress=False)
    images = noisy(samples(60, seed=5)).bfloat16()
    found, expected = deploy.load(tmp_path / "p.zip").predict(images), ee.predict(images)
    assert found.log_probs.dtype is torch.float32
    # What is near a threshold may go either way.
    assert (found.exit == expected.exit).float().mean() > 0.9
    assert (found.prediction == expected.prediction).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["entropy", Margin()])
def test_other_rules_heads_and_stages_by_hand(rule, tmp_path):
    ee = e2cm.EarlyExit(net_in_stages(), torch.zeros(1, *SHAPE), head="pooled_means", rule=rule)
    ee.fit(loader(200), progress=False)
    ee.thresholds = ee.record(loader(200, seed=1), progress=False).confidence[:, :2].quantile(0.5, 0)
    ee.export(tmp_path / "p.zip", "torch", progress=False)
    expected = ee.predict(samples(60, seed=5))
    assert len(expected.exit.unique()) == 3
    agree(deploy.load(tmp_path / "p.zip").predict(samples(60, seed=5)), expected)


def test_a_head_of_ones_own_is_exported_as_it_stands():
    head = Scripted()
    logits, sound = logits_of(head)(torch.tensor([[0.7, 0, 0, 0], [0.2, 1, 1, 1]]))
    torch.testing.assert_close(logits.exp(), torch.tensor([[0.7, 0.15, 0.15], [0.2, 0.4, 0.4]]))
    assert sound.tolist() == [0, 0]


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_said(tmp_path, packed):
    ee = e2cm.EarlyExit(net(), torch.zeros(1, *SHAPE))
    with pytest.raises(ValueError, match="`format` is 'tflite'; wanted 'onnx', 'torch', 'aoti'"):
        ee.export(tmp_path / "p.zip", "tflite")
    if HAS_ONNX:
        example = torch.zeros(1, *SHAPE, dtype=torch.float64)
        double = e2cm.EarlyExit(net().double(), example, head=e2cm.WhitenedMeans)  # by name it would be refused here
        with pytest.raises(ValueError, match=r"the network is torch.float64; .* call .float\(\) first"):
            double.export(tmp_path / "p.zip")
    ee.train()
    with pytest.raises(RuntimeError, match="export needs a network in eval mode"):
        ee.export(tmp_path / "p.zip", "torch")
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_leaves_the_old_package(tmp_path, packed, monkeypatch):
    path = tmp_path / "p.zip"
    path.write_bytes(b"old")
    ee = network()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="no space"):
        ee.export(path, "torch", progress=False)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("p.zip", b"old")]


def refused(path, data, match):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match):
        runner.Package(path)


def test_what_is_not_a_whole_package_is_refused(packed, tmp_path):
    whole = packed("torch").path.read_bytes()
    path = tmp_path / "p.zip"
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 70, len(whole) - 1):
        refused(path, whole[:size], "is truncated or damaged|is not a package")
    refused(path, b"\x89PNG" + whole, "is not a package of e2cm_ext|damaged")
    refused(path, b"something else", "is not a package of e2cm_ext: it does not begin like one")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ValueError, match="a zip file without manifest"):
        runner.Package(path)
    with pytest.raises(FileNotFoundError):
        runner.Package(tmp_path / "nowhere.zip")


def packed_anew(source, target, change=lambda manifest, files: None, seal=True):
    """A package that says what `change` makes of it, with checksums that are right."""
    with zipfile.ZipFile(source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    change(manifest, files)
    text = json.dumps(manifest).encode()
    with zipfile.ZipFile(target, "w") as archive:
        archive.comment = hashlib.sha256(text).hexdigest().encode() if seal else b""
        for name, content in {"manifest.json": text, **files}.items():
            archive.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m, f: f.update({"stage-000.pt2": b"x"}), "stage-000.pt2 does not match its checksum"),
        (lambda m, f: f.pop("stage-001.pt2"), "does not hold just what manifest.json says: stage-001.pt2"),
        (lambda m, f: f.update({"more": b""}), "does not hold just what manifest.json says: more"),
        (lambda m, f: m.update(kind="other"), "its manifest.json is of another program"),
        (lambda m, f: m.update(format=1), r"has format 1 \(written by e2cm_ext .*\); this runner reads format 2"),
        (lambda m, f: m.pop("stages"), "its manifest lacks something: KeyError"),
        (lambda m, f: m["stages"][0].pop("threshold"), "its manifest lacks something: KeyError"),
    ],
)
def test_a_package_that_is_not_what_it_says_is_refused(packed, tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        runner.Package(packed_anew(packed("torch").path, tmp_path / "p.zip", change))


def test_a_package_without_its_seal_is_refused(packed, tmp_path):
    with pytest.raises(ValueError, match="its seal is missing"):
        runner.Package(packed_anew(packed("torch").path, tmp_path / "p.zip", seal=False))
    runner.Package(packed_anew(packed("torch").path, tmp_path / "p.zip"))


def test_a_package_for_another_runtime_is_refused(packed):
    with pytest.raises(ValueError, match="is a package for 'torch'; this runs packages for 'onnx'"):
        runner.OnnxCascade.load(packed("torch").path)


def test_a_program_that_cannot_be_loaded_is_said(packed, tmp_path):
    def spoil(manifest, files):
        files["stage-000.pt2"] = b"nothing"
        manifest["files"]["stage-000.pt2"] = hashlib.sha256(b"nothing").hexdigest()

    with pytest.raises(ValueError, match=r"torch .* cannot load stage-000.pt2"):
        deploy.load(packed_anew(packed("torch").path, tmp_path / "p.zip", spoil))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole package of a kilobyte."""
    path = tmp_path_factory.mktemp("tiny") / "p.zip"
    stages = [{"file": "a", "exit": 0, "name": "(end)", "threshold": "-inf", "shape": [2]}]
    about = {"runtime": "torch", "image_shape": [3], "image_dtype": "float32", "num_classes": 2, "exits": []}
    content = bytes(range(200))
    files = {"a": hashlib.sha256(content).hexdigest()}
    manifest = {"kind": runner.KIND, "format": runner.FORMAT, **about, "stages": stages, "files": files}
    from e2cm_ext.deploy import exporter

    exporter._pack(path, manifest, {"a": content})
    return path


@settings(max_examples=200)
@given(data=st.data())
def test_no_altered_byte_goes_unnoticed(tiny, data):
    """Or it is one that does not matter, such as the date of a file in the zip file."""
    whole, expected = tiny.read_bytes(), runner._read(str(tiny))
    where, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    altered = bytearray(whole)
    altered[where] ^= 1 << bit
    path = tiny.with_name("altered.zip")
    path.write_bytes(altered)
    try:
        found = runner._read(str(path))
    except ValueError:
        return
    assert found == expected


def test_exits_that_answer_together_are_refused(tmp_path):
    ee = e2cm.EarlyExit(net(), torch.zeros(1, *SHAPE)).fit(loader(), progress=False)
    ee.combination = MostConfident()
    with pytest.raises(ValueError, match="answer together"):
        ee.export(tmp_path / "p.zip", "torch")
    assert not list(tmp_path.iterdir())
