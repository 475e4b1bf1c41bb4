"""Bulk inference with Ray Data: a class for Dataset.map_batches, whose workers each load the network once.

    import ray
    from e2cm_ext.integrations.ray import Predictor

    images = ray.data.read_parquet("images/")                        # any dataset with a column of images
    answers = images.map_batches(
        Predictor, fn_constructor_kwargs={"network": "model.zip"},   # what ee.export wrote
        batch_size=128, concurrency=2, num_cpus=4,
    )
    answers.write_parquet("answers/")

Ray runs the batches of a worker that dies again in another; so nothing is lost, and nothing comes twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .predictor import Answerer, Images, Source

__all__ = ["Predictor"]


class Predictor:
    """Takes batches of rows and gives them back with the columns prediction, confidence and exit, and without images.

    network: the path of a package that every worker can read, or a function that makes an EarlyExit there. column: that
    of the images; batches of them are arrays [B, ...], and `prepare` makes of them what the network takes: floats,
    normalised. log_probs: a column of these, too. threads: for each worker; by default as many CPUs as Ray gives it.
    """

    def __init__(
        self,
        network: Source,
        *,
        column: str = "image",
        prepare: Callable[[Images], Images] | None = None,
        log_probs: bool = False,
        threads: int | None = None,
    ) -> None:
        self._answer = Answerer(network, prepare, _cpus() if threads is None else threads)
        self._column, self._log_probs = column, log_probs

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        if self._column not in batch:
            raise ValueError(f"`column` is {self._column!r}; the dataset has {', '.join(map(repr, batch))}")
        images = batch[self._column]
        if images.dtype == object:  # of different shapes, or as lists
            images = np.stack(list(images))
        answers = self._answer(images)
        columns = {name: values for name, values in batch.items() if name != self._column}
        columns |= {"prediction": answers.prediction, "confidence": answers.confidence, "exit": answers.exit}
        return columns | ({"log_probs": answers.log_probs} if self._log_probs else {})


def _cpus() -> int:
    """That Ray has given this worker."""
    import ray

    given = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    return max(1, int(given))
