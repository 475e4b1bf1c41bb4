"""What an .e2cm file holds: heads, thresholds and settings of a network with exits, without the network's weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .clusters import Centres, with_centres, without_centres
from .data.loader import device_and_dtype
from .heads import Head, Rule, ensemble, from_config
from .heads.rules import as_rule
from .runtime.exit_module import ExitModule
from .stages import Costs, Stages, cut
from .utils import serialization

__all__ = ["load", "save", "weights_sha256"]

_KIND = "EarlyExit"
Network = TypeVar("Network", bound=ExitModule)


def save(network: ExitModule, path: str | os.PathLike[str]) -> None:
    """Write a file: complete, or not there at all."""
    tensors = {"thresholds": network.thresholds}
    for j, head in enumerate(network.heads):
        for name, value in head.state_dict().items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name!r} of {type(head).__name__} is a {type(value).__name__}; wanted a tensor")
            tensors[f"heads.{j}.{name}"] = value
    _, dtype = device_and_dtype(network.stages)
    _, centres = without_centres(network.stages)
    if centres is not None:
        tensors |= {"centres.means": centres.means, "centres.spread": centres.spread}
    info = {
        "exits": network.exit_names,
        "heads": [head.config() for head in network.head_list()],
        "rule": network.rule.name,
        "combination": network.combination and network.combination.config(),
        "labelled": network.labelled,
        "costs": {"stages": network.costs.stages, "heads": network.costs.heads},
        "image_shape": network.image_shape,
        "image_dtype": str(dtype if network.image_dtype.is_floating_point else network.image_dtype),
        "network": weights_sha256(network.stages),
    }
    serialization.write(path, _KIND, tensors, info)


def load(path: str | os.PathLike[str], model: nn.Module, rule: Rule | None, make: Callable[..., Network]) -> Network:
    """Read what `save` wrote, for the model that it was made for, on that model's device.

    Args:
        path: The file.
        model: The network, in eval mode, or Stages of it.
        rule: Needed if the rule was the user's own.
        make: Puts the parts together: called with the arguments of ExitModule.

    Raises:
        ValueError: The file is damaged or of another format, or the model is another one.
    """
    tensors, info = serialization.read(path, _KIND)
    decide = _saved_rule(path, info["rule"], rule)
    device, own = device_and_dtype(model)
    saved = getattr(torch, info["image_dtype"].removeprefix("torch."))
    dtype = own if saved.is_floating_point else saved
    stages = _cut_again(path, model, torch.zeros(1, *info["image_shape"], dtype=dtype, device=device), info["exits"])
    if "centres.means" in tensors:
        plain, _ = without_centres(stages)
        stages = with_centres(plain, Centres(tensors["centres.means"], tensors["centres.spread"]).to(device))
    if weights_sha256(stages) != info["network"]:
        raise ValueError(
            f"{path} belongs to another network: the modules of this `model` have the same names, but not the same "
            "weights (or dtypes)"
        )
    combination = info.get("combination")
    network = make(
        stages,
        [_head(config, tensors, f"heads.{j}.") for j, config in enumerate(info["heads"])],
        decide,
        Costs(tuple(info["costs"]["stages"]), tuple(info["costs"]["heads"]), tuple(info["exits"])),
        tuple(info["image_shape"]),
        dtype,
        combination=None if combination is None else ensemble.from_config(combination),
        labelled=info.get("labelled", True),
    )
    network.thresholds = tensors["thresholds"]
    return network


def weights_sha256(stages: Stages) -> str:
    """SHA-256 over names, dtypes, shapes and values of all weights of a network, whatever their memory order."""
    found = [(name, j, value) for j, stage in enumerate(stages) for name, value in stage.state_dict().items()]
    digest = hashlib.sha256()
    for name, _, value in sorted(found, key=lambda item: item[:2]):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
            digest.update(serialization.bytes_of(value))
    return digest.hexdigest()


def _head(config: dict[str, object], tensors: dict[str, Tensor], prefix: str) -> Head:
    head = from_config(config)
    head.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
    return head


def _saved_rule(path: str | os.PathLike[str], name: str, given: Rule | None) -> Rule:
    if given is not None:
        if given.name != name:
            raise ValueError(f"`rule` is {given.name!r}; {path} was saved with the rule {name!r}")
        return given
    try:
        return as_rule(name)
    except ValueError:
        raise ValueError(f"{path} was saved with the rule {name!r}, which is not one of ours: give rule=...") from None


def _cut_again(path: str | os.PathLike[str], model: nn.Module, example: Tensor, exits: Sequence[str]) -> Stages:
    try:
        return cut(model, example, list(exits))
    except Exception as error:  # whatever a network raises for images that are not for it
        why, _, _ = str(error).partition("\n")
        raise ValueError(f"{path} belongs to another network: this `model` cannot be cut as that was: {why}") from error
