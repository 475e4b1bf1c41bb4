"""Networks with exits of BWDS: how they are built and trained, and their curve."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...calibration.curves import Curve, curve_of_thresholds
from ...calibration.record import Record
from ...calibration.search import default_thresholds
from ...calibration.target import refuse_foreign
from ...data.loader import device_and_dtype
from ...early_exit import EarlyExit
from ...stages import Stages
from ...utils import distributed
from .. import training
from .decisions import fit_decision, sweep
from .head import PRICES, Decider

__all__ = ["build", "curve", "decide", "train"]


def build(
    model: nn.Module | Stages,
    example_input: Tensor,
    num_classes: int | None = None,
    exits: int | str | Sequence[str] | Sequence[float] = 6,
    prices: Sequence[float] = PRICES,
    inputs: str = "scores",
    *,
    seed: int = 0,
) -> EarlyExit:
    """Build a network with classifiers and decision functions at its exits. They are not trained yet.

    Args:
        model: The network, in eval mode, or Stages of it. It is not changed.
        example_input: A batch as the model takes it.
        num_classes: Checked against the model's logits, if given.
        exits: Where exits stand, as in EarlyExit.
        prices: For which decisions are learned; rising.
        inputs: Of the decision functions: "scores" (of the classifier) or "features" (pooled, as the classifier gets
            them).
        seed: Of the classifiers' initial weights.

    Returns:
        The network, with the rule "gate". `train` it.

    Raises:
        ValueError: Prices do not rise, `inputs` is unknown, or an argument does not fit the model.

    Example:
        ee = bwds.build(model, images[:1], exits=2)
    """

    def decider(classes: int, shape: tuple[int, ...]) -> Decider:
        return Decider(classes, shape, prices=prices, inputs=inputs)

    with training.seeded(seed):
        return EarlyExit(model, example_input, num_classes, exits, decider, "gate")


def train(
    ee: EarlyExit,
    loader: Iterable[Any],
    *,
    decide_on: Iterable[Any] | None = None,
    epochs: int = 25,
    lr: float = 1e-3,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> list[float]:
    """Train the classifiers, then the decision functions.

    Afterwards all thresholds are +inf: calibrate, take a point of `curve`, or set them to a price.

    Args:
        ee: What `build` returned; it is trained in place.
        loader: Yields (images, labels); or what `training.cache` returns, which saves running the network in every
            epoch.
        decide_on: A loader for the decision functions. Take samples on which neither network nor classifiers were
            trained, if there are any: on training samples both err less often. None: the same loader.
        epochs: How many, for the classifiers.
        lr: The learning rate of Adam. It is multiplied by 0.1 after 60% of the epochs, as for SDN.
        seed: Of the random numbers in training.
        checkpoint: A file to continue from after an interruption, see `training.run`. It holds the classifiers.
        precision: Of the forward pass, see `training.run`.
        progress: Show a progress bar.

    Returns:
        The mean loss of every epoch.

    Raises:
        TypeError: `build` has not made the network.

    Example:
        ee = bwds.build(model, images[:1], exits=2, prices=(1.0, 2.0, 4.0))
        bwds.train(ee, loader, decide_on=held_out, epochs=2, progress=False)
        ee.thresholds = 4.0  # the decisions for this price: an error is worth four times the network's FLOPs
    """

    def objective(outputs: training.Outputs, labels: Tensor, epoch: int) -> Tensor:
        return torch.stack([F.cross_entropy(logits.float(), labels) for logits in outputs[:-1]]).sum()

    module = training.ExitHeads(ee)
    optimizer = torch.optim.Adam(module.parameters(), lr)
    losses = training.run(
        module,
        loader,
        objective,
        epochs=epochs,
        optimizer=optimizer,
        schedule=training.step_decay(optimizer, epochs, (0.6,)),
        prepare=training.Features(ee),
        seed=seed,
        checkpoint=checkpoint,
        precision=precision,
        num_classes=ee.num_classes,
        progress=progress,
    )
    training.finish(ee)
    decide(ee, loader if decide_on is None else decide_on, progress)
    return losses


@torch.no_grad()
def decide(ee: EarlyExit, loader: Iterable[Any], progress: bool = True) -> None:
    """Learn the decision functions of all exits for all prices. The classifiers stay as they are.

    The inputs of all decision functions are held in memory: for every exit and sample K + 4 numbers, or as many as
    there are channels.

    Args:
        ee: A network with trained classifiers; it is changed in place. Its thresholds are +inf afterwards.
        loader: Yields (images, labels); or what `training.cache` returns.
        progress: Show a progress bar.

    Raises:
        TypeError: `build` has not made the network.
        ValueError: The loader yields no sample.

    Example:
        bwds.decide(ee, held_out, progress=False)
    """
    heads = _deciders(ee)
    inputs, losses = _inputs_and_losses(ee, heads, loader, progress)
    prices = heads[0].prices
    with tqdm(total=len(prices) * len(heads), desc="decisions", disable=not progress, leave=False) as bar:

        def fit_with_progress(inputs: Tensor, leave: Tensor, weight: Tensor) -> Tensor:
            bar.update(1)
            return fit_decision(inputs, leave, weight)

        decisions = sweep(inputs, losses, ee.costs.fractions.tolist(), prices, fit_with_progress)
    for head, of_head in zip(heads, decisions, strict=True):
        head.decisions.copy_(of_head)
    ee.thresholds = math.inf


def curve(ee: EarlyExit, loader: Record | Iterable[Any], progress: bool = True) -> Curve:
    """Compute the paper's curve of accuracy over FLOPs: one price for all exits.

    It begins with all samples leaving at the first exit, as at the price 0, and ends with none leaving early.
    `ee.curve` may choose another price for each exit.

    Args:
        ee: A trained network.
        loader: Yields (images, labels); or a record of them.
        progress: Show a progress bar.

    Returns:
        The curve. Its thresholds are prices.

    Raises:
        TypeError: `build` has not made the network.
        ValueError: The record is of another network.

    Example:
        curve = bwds.curve(ee, held_out, progress=False)
        ee.thresholds = curve.best_within(0.9).thresholds
    """
    prices = _deciders(ee)[0].prices
    record = loader if isinstance(loader, Record) else ee.record(loader, progress)
    refuse_foreign(record, ee)
    same = torch.tensor(prices)[:, None].expand(-1, record.exits)
    return curve_of_thresholds(record, torch.cat([default_thresholds(record.exits), same]), progress)


def _deciders(ee: EarlyExit) -> list[Decider]:
    if not all(isinstance(head, Decider) for head in ee.heads):
        raise TypeError("the exits of `ee` learn no decisions: make it with bwds.build")
    return list(ee.heads)  # type: ignore[arg-type]


def _inputs_and_losses(
    ee: EarlyExit, heads: list[Decider], loader: Iterable[Any], progress: bool
) -> tuple[list[Tensor], Tensor]:
    """For every exit the inputs of its decision functions [N, F], and errors [N, M+1] float32, of all processes."""
    features = training.Features(ee)
    batches = loader if isinstance(loader, training.Cached) else ee.batches(loader, progress).run("answers")
    inputs: list[list[Tensor]] = [[] for _ in heads]
    losses = []
    device, _ = device_and_dtype(ee.stages)
    for images, labels in batches:
        *squeezed, logits = (x.to(device) for x in features(images))
        predictions = []
        for j, (head, x) in enumerate(zip(heads, squeezed, strict=True)):
            log_probs = head.linear(x).float().log_softmax(1)
            inputs[j].append(head.decision_inputs(x, log_probs))
            predictions.append(log_probs.argmax(1))
        predictions.append(logits.argmax(1))
        losses.append((torch.stack(predictions, 1) != labels.to(device)[:, None]).float())
    errors = _of_all_processes(training.concatenate(losses))
    return [_of_all_processes(training.concatenate(of_exit)) for of_exit in inputs], errors


def _of_all_processes(rows: Tensor) -> Tensor:
    """Every process learns from the samples of all, and so learns the same."""
    return torch.cat(distributed.all_gather_objects(rows.cpu())).to(rows.device)
