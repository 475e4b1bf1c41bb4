"""Networks by name: from torchvision, from timm, or from a function in a module or a file.

    load("torchvision/resnet50", weights="IMAGENET1K_V2")
    load("timm/vit_tiny_patch16_224", weights="pretrained")
    load("resnet18", weights="mine.pt", num_classes=10)
    load("networks.py:cifar10_resnet(56)")
    load("my_package.models:make", weights="mine.safetensors")

The module of a function is imported, and the function is called: name only code that you trust. Files of weights are
data: nothing in them is executed.
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

_LIBRARIES = ("torchvision", "timm")
_RANDOM = "random"
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net")  # in the checkpoints of training scripts
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_MAX_NAMES = 3  # in an error message


def load(name: str, weights: str | None = None, num_classes: int | None = None) -> tuple[nn.Module, Any]:
    """Load a network in eval mode.

    Args:
        name: "torchvision/...", "timm/...", or the bare name if only one of the two has it; or "module:function", where
            the module may be a .py file. The function may be called with plain values, "net.py:make(10, width=32)". It
            returns the network, or a tuple that begins with it.
        weights: A file with a state dict (.safetensors, or from torch.save); "pretrained", or the name of an entry of
            torchvision's weights enum, which may be downloaded; or "random". Networks of torchvision and timm need it;
            a function may load its own weights.
        num_classes: For networks of torchvision and timm. By default as in their library.

    Returns:
        The network, and what data.transform_of needs to prepare images for it; None if that is not known.

    Raises:
        ValueError: There is no such network, or the weights do not fit it.
        FileNotFoundError: There is no such file.
        ImportError: torchvision or timm is missing.

    Example:
        >>> model, preprocessing = load("torchvision/resnet50", weights="pretrained")
        >>> transform = data.transform_of(preprocessing)
    """
    if ":" in name:
        if num_classes is not None:
            raise ValueError(f"`num_classes` is for networks of torchvision and timm; give it to the function: {name}")
        model = _call_function(name)
        if weights == "pretrained":
            raise ValueError(
                f"`weights` is 'pretrained', but {name} is not a network of torchvision or timm; wanted a file"
            )
        if weights not in (None, _RANDOM):
            assert weights is not None
            _load_weights(model, Path(weights))
        return model.eval(), None
    library, network = _find_network(name)
    if weights is None:
        raise ValueError(
            f"`weights` is not given, and {library}/{network} comes without: give a file, 'pretrained', or 'random' "
            "for an untrained network"
        )
    options = {} if num_classes is None else {"num_classes": num_classes}
    make = _torchvision_network if library == "torchvision" else _timm_network
    model, preprocessing = make(network, weights, options)
    return model.eval(), preprocessing


def names(library: str) -> list[str]:
    """Return the names of all classifiers of "torchvision" or "timm"."""
    if library == "timm":
        return [str(name) for name in _import_library("timm").list_models()]
    models = _import_library("torchvision.models")
    return [str(name) for name in models.list_models(module=models)]


# ---- functions ------------------------------------------------------------------------------------------------------


def _call_function(name: str) -> nn.Module:
    module, call = _split_name(name)
    function, arguments, options = _parse_call(name, call)
    found: Any = _import_module(module)
    for part in function.split("."):
        if not hasattr(found, part):
            callables = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise ValueError(f"{module} has no {part!r}; it has {', '.join(sorted(callables)[:10]) or 'no functions'}")
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
            f"{name} has made a {type(model).__name__}; wanted a torch.nn.Module, or a tuple that begins with one"
        )
    return model


def _split_name(name: str) -> tuple[str, str]:
    """Return the module, and the function with its arguments, which may hold colons too."""
    head, bracket, rest = name.partition("(")
    module, _, function = head.rpartition(":")
    return module, function + bracket + rest


def _parse_call(name: str, call: str) -> tuple[str, list[Any], dict[str, Any]]:
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


def _import_module(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.resolve().parent))  # for imports from the same folder; installed packages come first
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    if "" not in sys.path:
        sys.path.append("")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"there is no module {name!r}; wanted one that can be imported, or a file that ends in .py"
        ) from None


# ---- torchvision and timm -------------------------------------------------------------------------------------------


def _find_network(name: str) -> tuple[str, str]:
    """Return the library of a network, and its name there."""
    library, slash, network = name.partition("/")
    if slash and library in _LIBRARIES:
        if network not in names(library):
            raise ValueError(f"{library} has no network {network!r}{_similar_names(network, library)}")
        return library, network
    libraries = [library for library in _LIBRARIES if name in _names_if_installed(library)]
    if len(libraries) == 1:
        return libraries[0], name
    if libraries:
        choices = " or ".join(f"{library}/{name}" for library in libraries)
        raise ValueError(f"{name!r} is in {' and in '.join(libraries)}; say which: {choices}")
    raise ValueError(
        f"{name!r} is not a network; wanted torchvision/NAME or timm/NAME (pip install 'e2cm_ext[vision]'), or "
        f"module:function, or file.py:function"
    )


def _names_if_installed(library: str) -> list[str]:
    try:
        return names(library)
    except ImportError:
        return []


def _similar_names(network: str, library: str) -> str:
    import difflib

    similar = difflib.get_close_matches(network, names(library), n=_MAX_NAMES)
    return f"; there are {', '.join(similar)}" if similar else ""


def _torchvision_network(name: str, weights: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    models = _import_library("torchvision.models")
    make: Callable[..., nn.Module] = models.get_model_builder(name)
    if weights == _RANDOM or _is_file(weights):
        model = make(weights=None, **options)
        if weights != _RANDOM:
            _load_weights(model, Path(weights))
        return model, None
    entries = models.get_model_weights(name)
    known = [entry.name for entry in entries]
    if weights != "pretrained" and weights not in known:
        raise ValueError(f"`weights` is {weights!r}: no such file, and {name} has {', '.join(known)}, 'pretrained'")
    entry = entries.DEFAULT if weights == "pretrained" else entries[weights]
    return make(weights=entry, **options), entry


def _timm_network(name: str, weights: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    timm = _import_library("timm")
    if weights not in ("pretrained", _RANDOM) and not _is_file(weights):
        raise ValueError(f"`weights` is {weights!r}: no such file; wanted a file, 'pretrained' or 'random'")
    model: nn.Module = timm.create_model(name, pretrained=weights == "pretrained", **options)
    if _is_file(weights):
        _load_weights(model, Path(weights))
    return model, model if weights == "pretrained" else None


def _import_library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another version of torch
        raise ImportError(f"this needs {module.split('.')[0]}: pip install 'e2cm_ext[vision]' ({error})") from error


# ---- weights --------------------------------------------------------------------------------------------------------


def _is_file(weights: str) -> bool:
    return weights not in ("pretrained", _RANDOM) and (Path(weights).is_file() or "." in Path(weights).name)


def _load_weights(model: nn.Module, path: Path) -> None:
    state = _read_state_dict(path)
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} is {list(value.shape)} instead of {list(expected[name].shape)}"
        for name, value in state.items()
        if name in expected and isinstance(expected[name], Tensor) and value.shape != expected[name].shape
    ]
    differences = [
        *([f"it lacks {_first_few(missing)}"] if missing else []),
        *([f"the network has no {_first_few(unexpected)}"] if unexpected else []),
        *([_first_few(misshapen)] if misshapen else []),
    ]
    if differences:
        raise ValueError(f"{path} holds the weights of another network: {'; '.join(differences)}")
    model.load_state_dict(state)


def _first_few(items: list[str]) -> str:
    more = f" and {len(items) - _MAX_NAMES} more" if len(items) > _MAX_NAMES else ""
    return ", ".join(items[:_MAX_NAMES]) + more


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    found: Any
    if path.suffix == ".safetensors":
        try:
            found = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read: it is truncated, damaged, or not a safetensors file ({error})"
            ) from error
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} cannot be read: it is damaged, or holds more than tensors, which is not opened since it could "
                "run code: save only model.state_dict()"
            ) from error
        except Exception as error:  # damaged files make zipfile and torch raise many kinds of exceptions
            first, _, _ = str(error).partition("\n")
            raise ValueError(
                f"{path} cannot be read: it is truncated, damaged, or not from torch.save ({first})"
            ) from error
    for key in _STATE_DICT_KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict; wanted what torch.save(model.state_dict(), path) writes")
    state = {str(name): value for name, value in found.items()}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
