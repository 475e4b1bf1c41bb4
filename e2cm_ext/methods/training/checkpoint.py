"""The state of a training run, and the file that it continues from after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...utils import serialization

__all__ = ["TrainingState"]


class TrainingState:
    """The position of a training run, with everything that it needs to continue there.

    Args:
        module: The module that is trained.
        optimizer: Of the module's parameters.
        schedule: Of the learning rate; None: it is constant.
        scaler: Of the gradients, for float16.
        epochs: How many epochs the run has.
        seed: Of the run.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
        scaler: torch.amp.GradScaler,
        epochs: int,
        seed: int,
    ) -> None:
        self._parts: dict[str, Any] = {"module": module, "optimizer": optimizer, "scaler": scaler}
        if schedule is not None:
            self._parts["schedule"] = schedule
        shapes = {name: list(value.shape) for name, value in module.state_dict().items()}
        self._about = json.dumps([type(optimizer).__name__, epochs, seed, shapes])
        self.losses: list[float] = []  # of the epochs that have ended
        self.epoch = self.batch = 0  # the next ones
        self._loss_sum, self._samples = torch.zeros((), dtype=torch.float64), 0
        self._rng: list[Tensor] = []

    def add(self, loss: Tensor, samples: int) -> None:
        """Count a batch: its mean loss, and how many samples it has."""
        self.batch += 1
        self._samples += samples
        self._loss_sum = self._loss_sum.to(loss.device) + loss.double() * samples

    def end_epoch(self) -> None:
        """Append the mean loss of the epoch, and go to the next one.

        Raises:
            ValueError: The loss is not finite, or there was no sample.
        """
        self._check_loss()
        if not self._samples:
            raise ValueError("the loader gave no sample; it may be used up: give one that can be run through again")
        self.losses.append(float(self._loss_sum) / self._samples)
        self.epoch += 1
        self.batch, self._loss_sum, self._samples = 0, torch.zeros((), dtype=torch.float64), 0

    def _check_loss(self) -> None:
        if not self._loss_sum.isfinite():
            raise ValueError(
                f"the loss became {float(self._loss_sum)} in epoch {self.epoch + 1}, at batch {self.batch} or before: "
                "a lower learning rate may help"
            )

    def save(self, path: Path, devices: list[torch.device]) -> None:
        """Write the state to a file.

        Args:
            path: The file. What was there stays until the new file is complete.
            devices: The GPUs whose random number generators belong to the state.

        Raises:
            ValueError: The loss is not finite.
        """
        self._check_loss()
        state = {
            **{name: part.state_dict() for name, part in self._parts.items()},
            "about": self._about,
            "position": [self.epoch, self.batch, self._samples],
            "sum": self._loss_sum,
            "losses": self.losses,
            "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)],
        }
        with serialization.atomic_write(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        """Read the state from a file.

        Raises:
            ValueError: The file is damaged, or belongs to another run.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            about = state["about"]
        except Exception as error:
            raise ValueError(f"{path} is no checkpoint, or damaged: delete it to start anew ({error})") from error
        if about != self._about:
            raise ValueError(f"{path} is of another training (module, optimizer, epochs or seed): give another file")
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.epoch, self.batch, self._samples = state["position"]
        self._loss_sum, self.losses, self._rng = state["sum"], state["losses"], state["random"]

    def restore_rng(self, devices: list[torch.device]) -> None:
        """Set torch's generators as they were when the file was written, before the loader makes the next batch."""
        cpu, *gpus = self._rng
        torch.set_rng_state(cpu)
        for device, state in zip(devices, gpus, strict=True):
            torch.cuda.set_rng_state(state, device)
