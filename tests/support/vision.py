"""torchvision and timm as the tests need them: without weights, without downloads, and without a matching CUDA runtime.

    from support.vision import ZOO, network, timm, torchvision

torchvision's binaries from PyPI need the CUDA runtime that they were built for, and without it they cannot even be
imported: the shapes of two operators are registered that nobody has defined then. Networks need neither of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

# ---- importing them -------------------------------------------------------------------------------------------------

_UNDEFINED = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _define_missing_operators() -> torch.library.Library | None:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        pytest.skip("needs torchvision and timm: pip install 'e2cm_ext[vision]'", allow_module_level=True)
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in _UNDEFINED:
            library.define(name + _SCHEMA)
        return library
    return None


_library = _define_missing_operators()  # the definitions live as long as this object

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

# ---- the networks ---------------------------------------------------------------------------------------------------

# Blocks as their papers count them; behind every one is an exit, and one more behind the stem.
ZOO = {
    "torchvision/resnet18": 2 + 2 + 2 + 2,
    "torchvision/resnet50": 3 + 4 + 6 + 3,
    "torchvision/resnet152": 3 + 8 + 36 + 3,
    "torchvision/wide_resnet101_2": 3 + 4 + 23 + 3,
    "torchvision/mobilenet_v2": 1 + 2 + 3 + 4 + 3 + 3 + 1,
    "torchvision/mobilenet_v3_small": 11,
    "torchvision/mobilenet_v3_large": 15,
    "torchvision/efficientnet_b0": 1 + 2 + 2 + 3 + 3 + 4 + 1,
    "torchvision/efficientnet_b4": 2 + 4 + 4 + 6 + 6 + 8 + 2,
    "torchvision/densenet121": 4,
    "torchvision/regnet_y_400mf": 1 + 3 + 6 + 6,
    "torchvision/convnext_tiny": 3 + 3 + 9 + 3,
    "timm/resnet50": 3 + 4 + 6 + 3,
    "timm/mobilenetv3_large_100": 15,
    "timm/efficientnet_b0": 1 + 2 + 2 + 3 + 3 + 4 + 1,
    "timm/convnext_tiny": 3 + 3 + 9 + 3,
    "timm/vit_tiny_patch16_224": 12,
}


def network(name: str, seed: int = 0, size: int = 64, **options: object) -> nn.Module:
    """A network of the zoo, in eval mode, for images of `size` x `size`, with random weights."""
    library, _, kind = name.partition("/")
    torch.manual_seed(seed)
    if library == "torchvision":
        model = getattr(torchvision.models, kind)(weights=None, **options)
    else:
        model = timm.create_model(kind, **({"img_size": size} if "vit" in kind else {}), **options)
    scramble(model)
    return model.eval()


def scramble(model: nn.Module) -> None:
    """Fresh networks hide mistakes: blocks that add nothing, normalisation that changes nothing, signals that fade."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith(("bias", "running_mean")):
                tensor.normal_(0, 0.1)
            elif tensor.dim() == 1 or "layer_scale" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("weight"):
                tensor.mul_((2 / tensor[0].numel()) ** 0.5 / tensor.std())


def images(batch: int, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
