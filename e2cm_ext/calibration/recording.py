"""Makes a record: a pass over a data set in which every exit scores every sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.loader import Loader
from ..data.overlap import FittedImages, image_hashes
from ..heads.ensemble import combine_at_exit
from ..heads.protocol import ExitNetwork
from ..utils import distributed
from ..utils.warn import warn
from .record import Record

__all__ = ["record"]

_MAX_OVERLAP = 0.01  # without a warning: some data sets hold a few images twice


@torch.no_grad()
def record(network: ExitNetwork, loader: Loader, fitted_images: FittedImages | None) -> Record:
    """Record what every head, and the network itself, says about every sample.

    Under torch.distributed: about the samples of all processes, in the order of their ranks.

    Args:
        network: The network with its exits, all heads fitted.
        loader: Batches of images with labels.
        fitted_images: Those that the heads were fitted on, if known: a warning says so if the loader gives the same.

    Raises:
        ValueError: The loader gave no sample.
    """
    with distributed.synchronize_errors("record"):
        columns, numbers = _record_local(network, loader)
        local_costs = network.costs if len(numbers) else None
    parts = distributed.all_gather_objects((*columns, numbers))
    confidence, predictions, label, numbers = (torch.cat(column) for column in zip(*parts, strict=True))
    if not len(label):
        raise ValueError("the loader gave no sample: all its batches are empty")
    if fitted_images is not None:
        _warn_of_overlap(fitted_images.overlap(numbers))
    known_costs = next(found for found in distributed.all_gather_objects(local_costs) if found is not None)
    return Record(confidence, predictions, label, known_costs, network.rule.name)


def _record_local(network: ExitNetwork, loader: Loader) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Certainties, predictions and labels of this process's samples, and the numbers of its images."""
    columns = len(network.exit_names) + 1
    none = torch.empty(0, dtype=torch.int64, device="cpu")
    rows = [(none.new_empty(0, columns).float(), none.new_empty(0, columns).int(), none)]
    numbers = [none]
    for images, labels in loader.run("record"):
        numbers.append(image_hashes(images))
        certainty, prediction = _score_batch(network, images)
        rows.append((certainty.cpu(), prediction.cpu(), labels.cpu()))
    confidence, predictions, label = (torch.cat(column) for column in zip(*rows, strict=True))
    return (confidence, predictions, label), torch.cat(numbers)


def _score_batch(network: ExitNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """Certainties [B, M+1] float32 and predictions [B, M+1] int32 of every exit, and of the network itself."""
    heads, rule, combination = network.head_list(), network.rule, network.combination
    shape = (len(images), len(heads) + 1)
    certainty = torch.empty(shape, dtype=torch.float32, device=images.device)
    prediction = torch.empty(shape, dtype=torch.int32, device=images.device)
    memory: Tensor | None = None

    def score(j: int, x: Tensor) -> None:
        nonlocal memory
        if combination is None:
            certainty[:, j], prediction[:, j] = heads[j].score(x, rule)
        else:
            log_probs, certainty[:, j], memory = combine_at_exit(combination, heads[j], rule, x, memory, j)
            prediction[:, j] = log_probs.argmax(1)

    logits = network.walk(images, score, logits=True)
    log_probs = logits.log_softmax(1).float()
    if combination is not None:
        logits, _ = combination(log_probs, memory, len(heads), True)
        log_probs = logits
    certainty[:, -1] = rule.certainty(log_probs)
    prediction[:, -1] = logits.argmax(1)
    return certainty, prediction


def _warn_of_overlap(overlap: float) -> None:
    if overlap > _MAX_OVERLAP:
        warn(
            f"about {overlap:.0%} of these images are among those that the exits were fitted on, and look better to "
            "them than new ones: for thresholds and figures that hold on new images, take others",
        )
