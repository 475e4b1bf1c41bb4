"""An HTTP server on LitServe: each request holds one image, and the server runs them in batches.

A client posts the values of an image, as the network takes it, in C order and base64:

    body = {"image": base64.b64encode(image.astype("float32").tobytes()).decode()}
    requests.post("http://127.0.0.1:8000/predict", json=body).json()  # prediction, confidence, exit, exit_name

GET /health returns "ok" when all workers are ready, GET /metrics returns metrics for Prometheus. Refused requests:

- 408: the body does not end in time,
- 413: the body is too large,
- 422: the body is not JSON with base64 in it, has the wrong number of bytes, or holds a NaN or infinity.
"""

import asyncio
import base64
import binascii
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from pydantic import BaseModel, BeforeValidator

from .predictor import ArrayPredictor, ImageArray, NetworkSource

__all__ = ["EarlyExitAPI", "Image", "serve"]


def _decode_base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("wanted a string in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"wanted a string in base64: {error}") from None


class Image(BaseModel):  # type: ignore[misc]
    """The body of a request.

    Attributes:
        image: Values of the image; in JSON as base64.
    """

    image: Annotated[bytes, BeforeValidator(_decode_base64)]


class EarlyExitAPI(litserve.LitAPI):  # type: ignore[misc]
    """The request handler of the server, for a LitServer of your own.

    Args:
        network: The path of a package from EarlyExit.export, or a function that makes an EarlyExit in the worker.
        shape: Of one image as clients send it.
        dtype: Of its values.
        prepare: Turns a batch of such images into what the network takes. By default they are taken as they are.
        max_batch_size: Most images that run together.
        batch_timeout: Seconds to wait for a batch to fill.
        threads: CPU threads of each worker. By default chosen by torch or ONNX Runtime.
        options: Other options of litserve.LitAPI.

    Attributes:
        metrics: Counters of requests, batches and exits.

    Example:
        >>> api = EarlyExitAPI("model.zip", shape=(3, 32, 32), threads=1)
        >>> litserve.LitServer(api, accelerator="cpu").run(port=8000)
    """

    def __init__(
        self,
        network: NetworkSource,
        shape: tuple[int, ...],
        *,
        dtype: str = "float32",
        prepare: Callable[[ImageArray], ImageArray] | None = None,
        max_batch_size: int = 32,
        batch_timeout: float = 0.005,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout, **options)
        self._network, self._prepare, self._threads = network, prepare, threads
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.metrics = Metrics()

    @property
    def image_bytes(self) -> int:
        """Bytes of one image in a request."""
        return math.prod(self.shape) * self.dtype.itemsize

    def setup(self, device: str) -> None:
        """Load the network in a worker."""
        self._predictor = ArrayPredictor(self._network, self._prepare, self._threads)

    def decode_request(self, request: Image) -> Any:
        """Return the image as an array, or the response that refuses it: an exception would fail the whole batch."""
        if len(request.image) != self.image_bytes:
            return JSONResponse(
                {"detail": f"the image has {len(request.image)} bytes; wanted {self.image_bytes}: "
                 f"{self.dtype} {list(self.shape)}"},
                422,
            )  # fmt: skip
        image = np.frombuffer(request.image, self.dtype).reshape(self.shape)
        if not np.isfinite(image).all():
            return JSONResponse({"detail": "the image holds NaN or infinity"}, 422)
        return image

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Keep the list: it may hold responses beside arrays."""
        return inputs

    def predict(self, inputs: Any) -> list[Any]:
        """Predict the images among `inputs`, and return the other items as they are.

        With max_batch_size=1 LitServe passes one item in place of a list, and takes one back.
        """
        single = not isinstance(inputs, list)
        inputs = [inputs] if single else inputs
        images = [image for image in inputs if isinstance(image, np.ndarray)]
        outputs = list(inputs)
        if images:
            answers = self._predictor(np.stack(images))
            self.metrics.count_batch(answers.exit)
            rows: Iterator[Any] = iter(zip(answers.prediction, answers.confidence, answers.exit, strict=True))
            for i, item in enumerate(inputs):
                if isinstance(item, np.ndarray):
                    prediction, confidence, exit = next(rows)
                    outputs[i] = {
                        "prediction": int(prediction),
                        "confidence": float(confidence),
                        "exit": int(exit),
                        "exit_name": (*self._predictor.exit_names, "(end)")[exit],
                    }
        return outputs[0] if single else outputs

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Keep the list: it has one response per request."""
        return output


def serve(
    network: NetworkSource,
    shape: tuple[int, ...] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    timeout: float = 30.0,
    body_timeout: float = 10.0,
    max_bytes: int | None = None,
    log_level: str = "warning",
    **options: Any,
) -> None:
    """Serve a network over HTTP until the process is stopped (Ctrl-C, SIGTERM).

    Args:
        network: The path of a package from EarlyExit.export, or a function that makes an EarlyExit in each worker.
        shape: Of one image; needed if `network` is a function.
        host: Address to listen on.
        port: Port to listen on.
        workers: Number of processes that each load the network.
        timeout: Seconds that a request may wait for a worker; then it gets 504.
        body_timeout: Seconds that the body of a request may take to arrive; then it gets 408.
        max_bytes: Largest size of a body; a larger one gets 413. By default four times the size of an image.
        log_level: Of the HTTP server.
        options: Other options of EarlyExitAPI.

    Raises:
        TypeError: `network` is a function, and `shape` is missing.

    Example:
        >>> serve("model.zip", port=8000, workers=2, threads=1)   # from ee.export
    """
    api = EarlyExitAPI(network, _shape_of(network) if shape is None else shape, **options)
    limits = {
        "metrics": api.metrics,
        "max_bytes": 4 * api.image_bytes + 1024 if max_bytes is None else max_bytes,
        "body_timeout": body_timeout,
    }
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=workers, timeout=timeout, middlewares=[(RequestLimits, limits)]
    )
    server.app.add_api_route("/metrics", api.metrics.page, methods=["GET"])
    # One process handles HTTP and counts requests; workers count batches in shared memory.
    server.run(host=host, port=port, num_api_servers=1, log_level=log_level, generate_client_file=False)


def _shape_of(network: NetworkSource) -> tuple[int, ...]:
    from ..runner import Package

    if callable(network):
        raise TypeError("`shape` is None; a function does not tell the shape of one image: give it")
    return Package(network).image_shape


class RequestLimits:
    """ASGI middleware that refuses bodies that are too large or too slow, and times every request.

    Args:
        app: The application behind it.
        metrics: Where requests are counted.
        max_bytes: Largest size of a body.
        body_timeout: Seconds that a body may take to arrive.
    """

    def __init__(self, app: Any, metrics: "Metrics", max_bytes: int, body_timeout: float) -> None:
        self._app, self._metrics, self._max_bytes, self._body_timeout = app, metrics, max_bytes, body_timeout

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 499  # the client has closed the connection

        async def send_and_note_status(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            body = await self._read_body(scope, receive)
            if isinstance(body, JSONResponse):
                await body(scope, receive, send_and_note_status)
            elif body is not None:
                await self._app(scope, _replay(body, receive), send_and_note_status)
        finally:
            self._metrics.count_request(status, time.perf_counter() - start)

    async def _read_body(self, scope: Any, receive: Any) -> Any:
        """Return the body, or the response that refuses it, or None if the client has closed the connection."""
        too_large = JSONResponse({"detail": f"the body has more than {self._max_bytes} bytes"}, 413, _CLOSE_CONNECTION)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            return too_large
        body = b""
        deadline = time.monotonic() + self._body_timeout
        while True:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                return JSONResponse(
                    {"detail": f"the body did not end within {self._body_timeout} s"}, 408, _CLOSE_CONNECTION
                )
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return too_large
            if not message.get("more_body"):
                return body


_CLOSE_CONNECTION = {"connection": "close"}  # the rest of the body is not read


def _replay(body: bytes, receive: Any) -> Any:
    """Return a `receive` function that gives a body that was read before, and then what `receive` gives."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return messages.pop() if messages else await receive()

    return replay


class Metrics:
    """Counters in memory that all processes of a server share; a collector of prometheus_client."""

    STATUSES = (200, 408, 413, 422, 499, 500, 503, 504, 0)  # 0: any other
    SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, math.inf)
    SIZES = (1, 2, 4, 8, 16, 32, 64, 128, math.inf)
    MAX_EXITS = 1024

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._statuses = spawn.Array("q", len(self.STATUSES))
        self._seconds = spawn.Array("d", len(self.SECONDS) + 1)  # last: the sum
        self._sizes = spawn.Array("q", len(self.SIZES) + 1)
        self._exits = spawn.Array("q", self.MAX_EXITS)

    def count_request(self, status: int, seconds: float) -> None:
        """Count a request by its status and its time."""
        with self._statuses:
            self._statuses[self.STATUSES.index(status if status in self.STATUSES else 0)] += 1
        _observe(self._seconds, self.SECONDS, seconds)

    def count_batch(self, exits: Any) -> None:
        """Count a batch by its size, and its images by the exits where they left."""
        _observe(self._sizes, self.SIZES, len(exits))
        with self._exits:
            for exit in exits:
                self._exits[min(int(exit), self.MAX_EXITS - 1)] += 1

    def collect(self) -> Iterator[Any]:
        """Return all metrics, for prometheus_client."""
        requests = CounterMetricFamily("e2cm_requests", "Requests, by HTTP status", labels=["status"])
        for status, count in zip(self.STATUSES, self._statuses[:], strict=True):
            if count:
                requests.add_metric([str(status or "other")], count)
        yield requests
        exits = CounterMetricFamily("e2cm_exits", "Images that left at an exit", labels=["exit"])
        for exit, count in enumerate(self._exits[:]):
            if count:
                exits.add_metric([str(exit)], count)
        yield exits
        for name, description, limits, values in (
            (
                "e2cm_request_seconds",
                "Time of a request, from its start to the end of the response",
                self.SECONDS,
                self._seconds,
            ),
            ("e2cm_batch_size", "Images that ran together", self.SIZES, self._sizes),
        ):
            *counts, total = values[:]
            cumulative = np.cumsum(counts).tolist()
            names = ["+Inf" if limit == math.inf else str(limit) for limit in limits]
            yield HistogramMetricFamily(name, description, list(zip(names, cumulative, strict=True)), total)

    async def page(self) -> PlainTextResponse:
        """Return the response to GET /metrics."""
        registry = CollectorRegistry()
        registry.register(self)
        return PlainTextResponse(generate_latest(registry).decode())


def _observe(counts: Any, limits: tuple[float, ...], value: float) -> None:
    """Count a value in its bin of a histogram, and add it to the sum behind the bins."""
    with counts:
        counts[next(i for i, limit in enumerate(limits) if value <= limit)] += 1
        counts[len(limits)] += value
