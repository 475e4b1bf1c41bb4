"""Networks by name: of torchvision, of timm, or what a function in a module or a file of yours makes.

    load("torchvision/resnet50", weights="IMAGENET1K_V2")
    load("timm/vit_tiny_patch16_224", weights="pretrained")
    load("resnet18", weights="mine.pt", num_classes=10)
    load("networks.py:cifar10_resnet(56)")
    load("my_package.models:make", weights="mine.safetensors")

Whatever is named behind a colon is imported and called, so name only what you trust. Files of weights are data: nothing
in them is executed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

__all__ = ["load", "names"]

_ZOOS = ("torchvision", "timm")
_RANDOM = "random"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # what training scripts store weights under
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_SHOWN = 3


def load(name: str, weights: str | None = None, num_classes: int | None = None) -> tuple[nn.Module, Any]:
    """A network in eval mode, and what knows how its images were prepared: see data.transform_of (None: nothing does).

    name: "torchvision/...", "timm/...", the bare name if only one of the two has it, or "module:function", where the
    module may be a .py file; the function may be called with plain values, "net.py:make(10, width=32)", and returns the
    network, or a tuple that begins with it.

    weights: a file with a state dict (.safetensors, or what torch.save has written); "pretrained", or the name of an
    entry of torchvision's weights enum, which may be downloaded; "random". A network of torchvision or timm needs it;
    a function of yours may bring its own.
    """
    if ":" in name:
        if num_classes is not None:
            raise ValueError(f"`num_classes` is for networks of torchvision and timm; give it to the function: {name}")
        model = _made(name)
        if weights == "pretrained":
            raise ValueError(
                f"`weights` is 'pretrained', but {name} is no network of torchvision or timm; wanted a file"
            )
        if weights not in (None, _RANDOM):
            assert weights is not None
            _fill(model, Path(weights))
        return model.eval(), None
    zoo, kind = _found(name)
    if weights is None:
        raise ValueError(
            f"`weights` is not given, and {zoo}/{kind} comes without: give a file, 'pretrained', or 'random' if it may "
            "know nothing"
        )
    options = {} if num_classes is None else {"num_classes": num_classes}
    make = _of_torchvision if zoo == "torchvision" else _of_timm
    model, prepared = make(kind, weights, options)
    return model.eval(), prepared


def names(zoo: str) -> list[str]:
    """All classifiers of "torchvision" or "timm"."""
    if zoo == "timm":
        return [str(name) for name in _imported("timm").list_models()]
    models = _imported("torchvision.models")
    return [str(name) for name in models.list_models(module=models)]


# ---- a function of yours --------------------------------------------------------------------------------------------


def _made(name: str) -> nn.Module:
    where, call = _split(name)
    function, arguments, options = _parsed(name, call)
    found: Any = _module(where)
    for part in function.split("."):
        if not hasattr(found, part):
            there = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise ValueError(f"{where} has no {part!r}; it has {', '.join(sorted(there)[:10]) or 'no functions'}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        model: Any = found
    elif callable(found):
        model = found(*arguments, **options)
    else:
        raise ValueError(f"{name} is a {type(found).__name__}; wanted a function that makes a torch.nn.Module")
    model = model[0] if isinstance(model, tuple) and model else model
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name} has made a {type(model).__name__}; wanted a torch.nn.Module, or a tuple that begins so"
        )
    return model


def _split(name: str) -> tuple[str, str]:
    """The module, and the function with its arguments, among which there may be colons, too."""
    head, bracket, rest = name.partition("(")
    where, _, function = head.rpartition(":")
    return where, function + bracket + rest


def _parsed(name: str, call: str) -> tuple[str, list[Any], dict[str, Any]]:
    wanted = f"{name!r} names no function; wanted module:function, or module:function(64, depth=3) with plain values"
    try:
        node = ast.parse(call.strip(), mode="eval").body
        if not isinstance(node, ast.Call):
            node = ast.Call(node, [], [])
        arguments = [ast.literal_eval(value) for value in node.args]
        options = {str(item.arg): ast.literal_eval(item.value) for item in node.keywords if item.arg}
        function = ast.unparse(node.func)
    except (SyntaxError, ValueError) as error:
        raise ValueError(wanted) from error
    if len(options) != len(node.keywords) or not all(part.isidentifier() for part in function.split(".")):
        raise ValueError(wanted)
    return function, arguments, options


def _module(where: str) -> ModuleType:
    path = Path(where)
    if path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {where}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.resolve().parent))  # it may import its neighbours; what is installed comes first
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    if "" not in sys.path:
        sys.path.append("")
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"there is no module {where!r}; wanted one that can be imported, or a file that ends in .py"
        ) from None


# ---- torchvision and timm -------------------------------------------------------------------------------------------


def _found(name: str) -> tuple[str, str]:
    zoo, slash, kind = name.partition("/")
    if slash and zoo in _ZOOS:
        if kind not in names(zoo):
            raise ValueError(f"{zoo} has no network {kind!r}{_near(kind, zoo)}")
        return zoo, kind
    have = [zoo for zoo in _ZOOS if name in _names_if_any(zoo)]
    if len(have) == 1:
        return have[0], name
    if have:
        raise ValueError(
            f"{name!r} is in {' and in '.join(have)}; say which: {' or '.join(f'{z}/{name}' for z in have)}"
        )
    raise ValueError(
        f"{name!r} is no network; wanted torchvision/NAME or timm/NAME (pip install 'e2cm_ext[vision]'), or "
        f"module:function, or file.py:function"
    )


def _names_if_any(zoo: str) -> list[str]:
    try:
        return names(zoo)
    except ImportError:
        return []


def _near(kind: str, zoo: str) -> str:
    import difflib

    near = difflib.get_close_matches(kind, names(zoo), n=_SHOWN)
    return f"; there are {', '.join(near)}" if near else ""


def _of_torchvision(kind: str, weights: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    models = _imported("torchvision.models")
    make: Callable[..., nn.Module] = models.get_model_builder(kind)
    if weights == _RANDOM or _is_file(weights):
        model = make(weights=None, **options)
        if weights != _RANDOM:
            _fill(model, Path(weights))
        return model, None
    entries = models.get_model_weights(kind)
    known = [entry.name for entry in entries]
    if weights != "pretrained" and weights not in known:
        raise ValueError(f"`weights` is {weights!r}: no such file, and {kind} has {', '.join(known)}, 'pretrained'")
    entry = entries.DEFAULT if weights == "pretrained" else entries[weights]
    return make(weights=entry, **options), entry


def _of_timm(kind: str, weights: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    timm = _imported("timm")
    if weights not in ("pretrained", _RANDOM) and not _is_file(weights):
        raise ValueError(f"`weights` is {weights!r}: no such file; wanted a file, 'pretrained' or 'random'")
    model: nn.Module = timm.create_model(kind, pretrained=weights == "pretrained", **options)
    if _is_file(weights):
        _fill(model, Path(weights))
    return model, model if weights == "pretrained" else None


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision made for another torch
        raise ImportError(f"this needs {module.split('.')[0]}: pip install 'e2cm_ext[vision]' ({error})") from error


# ---- weights --------------------------------------------------------------------------------------------------------


def _is_file(weights: str) -> bool:
    return weights not in ("pretrained", _RANDOM) and (Path(weights).is_file() or "." in Path(weights).name)


def _fill(model: nn.Module, path: Path) -> None:
    state = _state(path)
    mine = model.state_dict()
    missing = [name for name in mine if name not in state]
    foreign = [name for name in state if name not in mine]
    other = [
        f"{name} is {list(value.shape)} instead of {list(mine[name].shape)}"
        for name, value in state.items()
        if name in mine and isinstance(mine[name], Tensor) and value.shape != mine[name].shape
    ]
    wrong = [
        *([f"it lacks {_few(missing)}"] if missing else []),
        *([f"the network has no {_few(foreign)}"] if foreign else []),
        *([_few(other)] if other else []),
    ]
    if wrong:
        raise ValueError(f"{path} holds the weights of another network: {'; '.join(wrong)}")
    model.load_state_dict(state)


def _few(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    found: Any
    if path.suffix == ".safetensors":
        try:
            found = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read: it is truncated, damaged, or no safetensors file ({error})"
            ) from error
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} cannot be read: it is damaged, or holds more than tensors, which is not opened since it could "
                "run code: save model.state_dict()"
            ) from error
        except Exception as error:  # a damaged file can make zipfile and torch raise nearly anything
            first, _, _ = str(error).partition("\n")
            raise ValueError(
                f"{path} cannot be read: it is truncated, damaged, or not by torch.save ({first})"
            ) from error
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict; wanted what torch.save(model.state_dict(), path) writes")
    state = {str(name): value for name, value in found.items()}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
