"""Networks by name, from torchvision and timm, and weights from all kinds of checkpoints."""

from __future__ import annotations

import pytest
import torch
from support.vision import timm, torchvision
from torch import nn

from e2cm_ext import data
from e2cm_ext.cli import model_loader

pytestmark = pytest.mark.vision


def test_of_torchvision_and_of_timm():
    model, preprocessing = model_loader.load("torchvision/resnet18", "random", 3)
    assert isinstance(model, torchvision.models.ResNet) and model.fc.out_features == 3
    assert not model.training and preprocessing is None
    model, _ = model_loader.load("timm/resnet18", "random", 3)
    assert isinstance(model, timm.models.ResNet) and model.fc.out_features == 3
    assert model_loader.load("mnasnet0_5", "random")[0](torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_a_name_that_is_ambiguous_or_unknown():
    with pytest.raises(ValueError, match="is in torchvision and in timm; say which"):
        model_loader.load("resnet50", "random")
    with pytest.raises(ValueError, match="torchvision has no network 'resnet5'; there are resnet50"):
        model_loader.load("torchvision/resnet5", "random")
    with pytest.raises(ValueError, match="comes without: give a file, 'pretrained', or 'random'"):
        model_loader.load("torchvision/resnet18")
    with pytest.raises(ValueError, match="no such file, and resnet18 has IMAGENET1K_V1, 'pretrained'"):
        model_loader.load("torchvision/resnet18", "V1")
    with pytest.raises(FileNotFoundError, match=r"there is no file nothing\.pt"):
        model_loader.load("torchvision/resnet18", "nothing.pt")
    with pytest.raises(ValueError, match="give it to the function"):
        model_loader.load("module:function", None, 3)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_weights_in_checkpoints(tmp_path, monkeypatch, key, prefix):
    (tmp_path / "wrapped_net.py").write_text(
        "from torch import nn\n\ndef make(size=2):\n    return nn.Linear(size, 2)\n"
    )
    torch.manual_seed(1)
    state = {prefix + name: value for name, value in nn.Linear(2, 2).state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    for name in ("wrapped_net.py:make", "wrapped_net:make", "wrapped_net.py:make(size=2)", "wrapped_net:nn.Identity"):
        if "Identity" in name:
            with pytest.raises(ValueError, match="the network has no weight, bias"):
                model_loader.load(name, "w.pt")
        else:
            model, _ = model_loader.load(name, "w.pt")
            assert torch.equal(model.weight, state[prefix + "weight"])
    with pytest.raises(ValueError, match=r"weight is \[2, 2\] instead of \[2, 3\]"):
        model_loader.load("wrapped_net.py:make(3)", "w.pt")


def test_preprocessing_of_pretrained_weights():
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    assert data.transform_of(entry) is not None


def test_weights_that_would_run_code_are_refused(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "w.pt")
    with pytest.raises(ValueError, match="which is not opened since it could run code"):
        model_loader.load("torchvision/resnet18", "w.pt")
