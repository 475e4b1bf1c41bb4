"""What is written comes back, bit for bit and in its memory order; the layout of the file; and what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.helpers import same_bits
from torch import nn

from e2cm_ext import EarlyExit, build_info
from e2cm_ext.utils import serialization

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
]
DTYPES += [torch.uint8, torch.bool]


def test_every_file_says_which_version_wrote_it(tmp_path):
    serialization.write(tmp_path / "file", "test", {}, {})
    _, about = serialization.read(tmp_path / "file", "test")
    assert about["package"] == build_info()["version"]


def test_a_file_of_format_1_is_refused():
    """Whitened means with the option `mean_shrinkage` under its old name, as EarlyExit.save wrote it then."""
    path = Path(__file__).parent / "format-1.e2cm"
    assert rb"\"pull\": 0.25" in path.read_bytes()
    wanted = (
        r"format-1\.e2cm has format 1 \(written by e2cm_ext 0\.1\.0.*\); this version reads format 2: install the "
        "version that wrote it, or save it again"
    )
    with pytest.raises(ValueError, match=wanted):
        serialization.read(path, "EarlyExit")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with pytest.raises(ValueError, match=wanted):
        EarlyExit.load(path, model)


def tensors():
    numbers = torch.arange(120.0)
    return {
        **{f"as {dtype}": numbers[:7].to(dtype) for dtype in DTYPES},
        "one": torch.tensor(3.5),
        "one expanded": torch.tensor(3.5).expand(1),
        "none": torch.zeros(0, 4),
        "channels last": numbers.reshape(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "3d": numbers.reshape(1, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d),
        "transposed": numbers.reshape(10, 12).t(),
        "with gaps": numbers[::3],
        "negative": torch.tensor([-0.0, float("nan"), float("-inf")]),
        "äöü \"quoted\"": numbers[:2],
    }  # fmt: skip


def test_what_is_written_comes_back(tmp_path):
    info = {"text": 'ä "quoted" \\ \n', "numbers": [1, 2.5, None, True], "nested": {"a": {"b": []}}}
    serialization.write(tmp_path / "a", "test", tensors(), info)
    got, about = serialization.read(tmp_path / "a", "test")
    assert got.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert same_bits(got[name], tensor), name
        if name not in ("with gaps", "one expanded"):
            assert got[name].stride() == tensor.stride(), name
    assert {key: about[key] for key in info} == info
    assert about["kind"] == "test" and about["format"] == serialization.FORMAT


def test_any_reader_of_safetensors_can_read_it(tmp_path):
    serialization.write(tmp_path / "a", "test", tensors(), {})
    whole = (tmp_path / "a").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    assert length % 8 == 0
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors()[name].element_size() == 0  # aligned
    with safe_open(tmp_path / "a", "pt") as file:
        assert set(file.keys()) == tensors().keys()
        assert same_bits(file.get_tensor("as torch.bfloat16"), tensors()["as torch.bfloat16"])


def test_the_same_contents_are_the_same_bytes(tmp_path):
    for name, order in (("a", 1), ("b", -1)):
        serialization.write(tmp_path / name, "test", dict(list(tensors().items())[::order]), {"x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    serialization.write(tmp_path / "c", "test", tensors(), {"x": 2})
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_no_tensors_at_all(tmp_path):
    serialization.write(tmp_path / "a", "test", {}, {"x": 1})
    got, about = serialization.read(tmp_path / "a", "test")
    assert got == {} and about["x"] == 1


def test_another_kind_and_what_cannot_be_written(tmp_path):
    serialization.write(tmp_path / "a", "test", {}, {})
    with pytest.raises(ValueError, match="is a file of the kind 'test'; wanted 'other'"):
        serialization.read(tmp_path / "a", "other")
    with pytest.raises(TypeError, match=r"z is torch\.complex64, which cannot be saved"):
        serialization.write(tmp_path / "b", "test", {"z": torch.zeros(2, dtype=torch.complex64)}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        serialization.write(tmp_path / "b", "test", {}, {"x": object()})
    with pytest.raises(FileNotFoundError, match=r"nowhere'$"):  # and not a name that nobody has given
        serialization.write(tmp_path / "nowhere" / "b", "test", {}, {})
    with pytest.raises(IsADirectoryError, match=rf"{tmp_path.name}'$"):
        serialization.write(tmp_path, "test", {}, {})
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is truncated"),
        (b"\x10" + b"\0" * 7, "is truncated"),
        (b"\x10" + b"\0" * 7 + b'{"__meta', "is truncated"),
        (b"\x10" + b"\0" * 7 + b'{"a":{"dtype":"F32"}}', "is not a file of e2cm_ext"),
        (b"\xff" * 8 + serialization._PREFIX + b"x" * 50, "is damaged"),
        (b"\x05" + b"\0" * 7 + serialization._PREFIX + b"x" * 50, "is damaged"),
        ((40).to_bytes(8, "little") + serialization._PREFIX + b"x" * 50, "is damaged"),
        ((36).to_bytes(8, "little") + serialization._PREFIX + b'[]"}}   ', "is damaged"),
    ],
)
def test_rubbish(tmp_path, contents, message):
    (tmp_path / "a").write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        serialization.read(tmp_path / "a", "test")
