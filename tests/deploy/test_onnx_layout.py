"""Sums of an ONNX graph stay in the blocks of ONNX Runtime's convolutions: the same answers, and fewer operators."""

import importlib.util
import zipfile

import numpy as np
import pytest
import torch
from support.networks import SHAPE, Net, loader
from support.tensors import INF, NAN, generator
from torch import nn

import e2cm_ext as e2cm
from e2cm_ext.deploy.export_modules import ends_in_relu
from e2cm_ext.runner import OnnxCascade

pytestmark = pytest.mark.export

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs onnx, onnxscript and onnxruntime: the extra `onnx`")


def graph_of(path, number):
    import onnx

    with zipfile.ZipFile(path) as archive:
        return onnx.load_from_string(archive.read(f"stage-{number:03d}.onnx")).graph


def averages(graph):
    """What the averages over windows of 1 x 1 read."""
    return [
        node.input[0]
        for node in graph.node
        if node.op_type == "AveragePool" and next(a.ints for a in node.attribute if a.name == "kernel_shape") == [1, 1]
    ]


@pytest.fixture(scope="module")
def wide():
    """Of 16 channels, and exits that answer some each."""
    torch.manual_seed(0)
    ee = e2cm.EarlyExit(Net(16).eval(), torch.zeros(1, *SHAPE), head="whitened_means").fit(loader(300), progress=False)
    certainty = ee.record(loader(200, seed=1), progress=False).confidence
    ee.thresholds = certainty[:, :-1].quantile(0.6, 0)
    return ee


@needs_onnx
def test_a_sum_with_what_comes_from_outside_stays_in_blocks(wide, tmp_path):
    wide.export(tmp_path / "p.zip", progress=False)
    assert averages(graph_of(tmp_path / "p.zip", 0)) == []  # its sum, if it has one, is of two convolutions
    within = [averages(graph_of(tmp_path / "p.zip", number)) for number in range(1, 4)]
    assert ["x"] in within
    x = torch.cat([x for x, _ in loader(120, seed=2)])
    expected, found = wide.predict(x), OnnxCascade.load(tmp_path / "p.zip", threads=1).predict(x.numpy())
    assert len(expected.exit.unique()) > 2
    same = found.exit == expected.exit.numpy()
    assert same.mean() > 0.97  # others are near a threshold
    np.testing.assert_allclose(found.log_probs[same], expected.log_probs.numpy()[same], rtol=1e-3, atol=1e-3)


@needs_onnx
@pytest.mark.parametrize("channels", [16, 12])
def test_what_is_padded_is_put_into_blocks_if_channels_fill_them(channels):
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from e2cm_ext.deploy.onnx_layout import keep_nchwc

    weight = np.random.default_rng(0).normal(size=(channels, channels, 3, 3)).astype(np.float32)
    shape = ["batch", channels, 6, 6]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node("Slice", ["x", "from", "to", "axis"], ["less"]),
            helper.make_node("Pad", ["less", "pads"], ["b"]),
            helper.make_node("Add", ["b", "a"], ["c"]),
            helper.make_node("Relu", ["c"], ["d"]),
            helper.make_node("Conv", ["d", "w"], ["e"], pads=[1, 1, 1, 1]),
            helper.make_node("Add", ["e", "d"], ["f"]),
            helper.make_node("Add", ["f", "b"], ["y"]),
        ],
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in (
                ("w", weight),
                ("from", np.array([0])),
                ("to", np.array([channels - 2])),
                ("axis", np.array([1])),
                ("pads", np.array([0, 1, 0, 0, 0, 1, 0, 0])),
            )
        ],
        value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "abcdef"],
    )
    x = np.random.default_rng(1).normal(size=(3, channels, 6, 6)).astype(np.float32)
    answers = []
    for change in (lambda _: None, keep_nchwc):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        change(model.graph)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {"x": x})[0])
    np.testing.assert_allclose(answers[1], answers[0], rtol=1e-4, atol=1e-4)
    assert averages(model.graph) == (["b"] if channels == 16 else [])  # once for both sums


@needs_onnx
def test_what_is_not_finite_stays_so(wide, tmp_path):
    """Thresholds that all pass: yet the one with a NaN goes on to the end, alone and in company."""
    wide.export(tmp_path / "p.zip", progress=False)
    cascade = OnnxCascade.load(tmp_path / "p.zip", threads=1)
    cascade.thresholds = -INF
    x = loader(4, seed=3)[0][0].numpy()
    x[2, 0, 1, 1] = NAN
    end = len(wide.exit_names)
    assert cascade.predict(x).exit.tolist() == [0, 0, end, 0]
    assert [int(cascade.predict(one[None]).exit[0]) for one in x] == [0, 0, end, 0]


@needs_onnx
def test_memory_that_is_used_again_holds_nothing_of_others(wide, tmp_path):
    """Batches of all sizes, larger and smaller in turns, answer what each image alone does."""
    wide.export(tmp_path / "p.zip", progress=False)
    cascade = OnnxCascade.load(tmp_path / "p.zip", threads=1)
    x = torch.cat([x for x, _ in loader(60, seed=4)]).numpy()
    alone = [cascade.predict(one[None]) for one in x]
    exits = np.concatenate([one.exit for one in alone])
    log_probs = np.concatenate([one.log_probs for one in alone])
    first = cascade.predict(x[:7])
    for some in (x[:3], x, x[::-1], x[5:6], x[:, :, ::-1], x[:0]):
        assert len(cascade.predict(some).exit) == len(some)
    for size in (1, 2, 5, 60, 13):
        for begin in range(0, 60, size):
            part = slice(begin, begin + size)
            found = cascade.predict(x[part])
            np.testing.assert_array_equal(found.exit, exits[part])
            np.testing.assert_allclose(found.log_probs, log_probs[part], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(first.exit, exits[:7])  # answers are no views of it


def test_only_what_a_relu_has_made_is_never_negative():
    x = torch.randn(2, 3, 4, 4, generator=generator(0))

    def after(*parts):
        with torch.no_grad():
            return ends_in_relu(list(parts), x.clone())[1]

    class Then(nn.Module):
        def __init__(self, then):
            super().__init__()
            self.then = then

        def forward(self, x):
            return self.then(torch.relu(x))

    assert after(nn.ReLU())
    assert after(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True))
    assert not after(nn.Identity())
    assert not after(nn.ReLU(), nn.Conv2d(3, 3, 1))
    assert not after(Then(lambda x: x - 1))
    assert not after(Then(lambda x: x.sub_(1)))

    def of_a_part(x):
        y = x - 1
        y[:, :1].relu_()
        return y

    def a_part_changed(x):
        x[:, :1].sub_(1)
        return x

    assert not after(Then(of_a_part))
    assert not after(Then(a_part_changed))
