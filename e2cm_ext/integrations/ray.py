"""Bulk inference with Ray Data: a class for Dataset.map_batches.

Every worker loads the network once. If a worker dies, Ray runs its batches again in another one: each image is
predicted exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .predictor import ArrayPredictor, ImageArray, NetworkSource

__all__ = ["Predictor"]


class Predictor:
    """A function of batches of rows for Dataset.map_batches.

    It adds the columns `prediction`, `confidence` and `exit`, and removes the images.

    Args:
        network: The path of a package from EarlyExit.export that every worker can read, or a function that makes an
            EarlyExit in the worker.
        column: Name of the column of images.
        prepare: Turns a batch of images, an array [B, ...], into what the network takes: normalised floats. By default
            they are taken as they are.
        log_probs: Add a column `log_probs` too.
        threads: CPU threads of each worker. By default the number of CPUs that Ray gives it.

    Raises:
        TypeError: The function returned something other than an EarlyExit or what deploy.load returns.
        ValueError: A batch does not have the column.

    Example:
        >>> images = ray.data.read_parquet("images/")                        # any dataset with a column of images
        >>> predictions = images.map_batches(
        ...     Predictor, fn_constructor_kwargs={"network": "model.zip"},   # from ee.export
        ...     batch_size=128, concurrency=2, num_cpus=4,
        ... )
        >>> predictions.write_parquet("predictions/")
    """

    def __init__(
        self,
        network: NetworkSource,
        *,
        column: str = "image",
        prepare: Callable[[ImageArray], ImageArray] | None = None,
        log_probs: bool = False,
        threads: int | None = None,
    ) -> None:
        self._predictor = ArrayPredictor(network, prepare, _assigned_cpus() if threads is None else threads)
        self._column, self._log_probs = column, log_probs

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the rows with predictions in place of images."""
        if self._column not in batch:
            raise ValueError(f"`column` is {self._column!r}; the dataset has {', '.join(map(repr, batch))}")
        images = batch[self._column]
        if images.dtype == object:  # Ray's form of images of different shapes, or of lists
            images = np.stack(list(images))
        answers = self._predictor(images)
        columns = {name: values for name, values in batch.items() if name != self._column}
        columns |= {"prediction": answers.prediction, "confidence": answers.confidence, "exit": answers.exit}
        return columns | ({"log_probs": answers.log_probs} if self._log_probs else {})


def _assigned_cpus() -> int:
    """Return the number of CPUs that Ray gives to this worker."""
    import ray

    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    return max(1, int(cpus))
