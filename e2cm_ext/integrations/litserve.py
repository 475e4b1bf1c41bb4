"""A server: HTTP requests with an image each, answered in batches, by LitServe.

    from e2cm_ext.integrations.litserve import serve

    serve("model.zip", port=8000)                                   # what ee.export wrote

A client sends the numbers of an image as the network takes it, in C order, in base64:

    body = {"image": base64.b64encode(image.astype("float32").tobytes()).decode()}
    requests.post("http://127.0.0.1:8000/predict", json=body).json()  # prediction, confidence, exit

GET /health says "ok" when all workers are ready, GET /metrics what has been going on, for Prometheus. What is refused:
bodies that are too large (413), that do not come to an end in time (408), that are not JSON with base64 in it or hold
another number of bytes than an image, or a NaN (422).
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

from .predictor import Answerer, Images, Source

__all__ = ["EarlyExitAPI", "Image", "serve"]


def _decoded(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("wanted a string in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"wanted a string in base64: {error}") from None


class Image(BaseModel):  # type: ignore[misc]
    """A request."""

    image: Annotated[bytes, BeforeValidator(_decoded)]


class EarlyExitAPI(litserve.LitAPI):  # type: ignore[misc]
    """network: the path of a package, or a function that makes an EarlyExit in the worker. shape and dtype: of one
    image as clients send it; `prepare` makes of a batch of these what the network takes. threads: of each worker."""

    def __init__(
        self,
        network: Source,
        shape: tuple[int, ...],
        *,
        dtype: str = "float32",
        prepare: Callable[[Images], Images] | None = None,
        max_batch_size: int = 32,
        batch_timeout: float = 0.005,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout, **options)
        self._network, self._prepare, self._threads = network, prepare, threads
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.counts = Counts()

    @property
    def bytes_of_image(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def setup(self, device: str) -> None:
        self._answer = Answerer(self._network, self._prepare, self._threads)

    def decode_request(self, request: Image) -> Any:
        """An array; or, as an error here would be one of the whole batch, what to say instead of an answer."""
        if len(request.image) != self.bytes_of_image:
            return JSONResponse(
                {"detail": f"the image has {len(request.image)} bytes; wanted {self.bytes_of_image}: "
                 f"{self.dtype} {list(self.shape)}"},
                422,
            )  # fmt: skip
        image = np.frombuffer(request.image, self.dtype).reshape(self.shape)
        if not np.isfinite(image).all():
            return JSONResponse({"detail": "the image holds NaN or infinity"}, 422)
        return image

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, inputs: Any) -> list[Any]:
        """Without batching (max_batch_size=1) LitServe gives, and takes, one of what are lists here."""
        alone = not isinstance(inputs, list)
        inputs = [inputs] if alone else inputs
        images = [image for image in inputs if isinstance(image, np.ndarray)]
        outputs = list(inputs)
        if images:
            answers = self._answer(np.stack(images))
            self.counts.batch(answers.exit)
            rows: Iterator[Any] = iter(zip(answers.prediction, answers.confidence, answers.exit, strict=True))
            for i, one in enumerate(inputs):
                if isinstance(one, np.ndarray):
                    prediction, confidence, exit = next(rows)
                    outputs[i] = {
                        "prediction": int(prediction),
                        "confidence": float(confidence),
                        "exit": int(exit),
                        "exit_name": (*self._answer.exit_names, "(end)")[exit],
                    }
        return outputs[0] if alone else outputs

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output


def serve(
    network: Source,
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
    """Serves until it is stopped (Ctrl-C, SIGTERM).

    shape: of one image, if `network` is a function; a package knows it. timeout: seconds that a request may wait for a
    worker (504). body_timeout: seconds that its body may take to come. max_bytes: of a body; by default four times
    what an image takes. options: those of EarlyExitAPI.
    """
    api = EarlyExitAPI(network, _shape_of(network) if shape is None else shape, **options)
    limits = {
        "counts": api.counts,
        "max_bytes": 4 * api.bytes_of_image + 1024 if max_bytes is None else max_bytes,
        "seconds": body_timeout,
    }
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=workers, timeout=timeout, middlewares=[(Gate, limits)]
    )
    server.app.add_api_route("/metrics", api.counts.page, methods=["GET"])
    # One process answers HTTP: what it refuses is counted there, and what workers do in memory that they share.
    server.run(host=host, port=port, num_api_servers=1, log_level=log_level, generate_client_file=False)


def _shape_of(network: Source) -> tuple[int, ...]:
    from ..runner import Package

    if callable(network):
        raise TypeError("`shape` is None; a function does not tell the shape of one image: give it")
    return Package(network).image_shape


class Gate:
    """In front of everything: refuses bodies that are too large or too slow, and takes the time of every request."""

    def __init__(self, app: Any, counts: "Counts", max_bytes: int, seconds: float) -> None:
        self._app, self._counts, self._max_bytes, self._seconds = app, counts, max_bytes, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 499  # the client has gone

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            body = await self._body(scope, receive)
            if isinstance(body, JSONResponse):
                await body(scope, receive, told)
            elif body is not None:
                await self._app(scope, _again(body, receive), told)
        finally:
            self._counts.request(status, time.perf_counter() - start)

    async def _body(self, scope: Any, receive: Any) -> Any:
        """All of it; or the refusal; or None, if the client has gone."""
        too_large = JSONResponse({"detail": f"the body has more than {self._max_bytes} bytes"}, 413, _CLOSE)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            return too_large
        body = b""
        end = time.monotonic() + self._seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                return JSONResponse({"detail": f"the body did not end within {self._seconds} s"}, 408, _CLOSE)
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return too_large
            if not message.get("more_body"):
                return body


_CLOSE = {"connection": "close"}  # what is left of the body is not waited for


def _again(body: bytes, receive: Any) -> Any:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Any:
        return messages.pop() if messages else await receive()

    return given


class Counts:
    """What has been going on, in memory that all processes of a server share; `page` is for Prometheus."""

    STATUSES = (200, 408, 413, 422, 499, 500, 503, 504, 0)  # 0: any other
    SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, math.inf)
    SIZES = (1, 2, 4, 8, 16, 32, 64, 128, math.inf)
    EXITS = 1024

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._statuses = spawn.Array("q", len(self.STATUSES))
        self._seconds = spawn.Array("d", len(self.SECONDS) + 1)  # the last number: their sum
        self._sizes = spawn.Array("q", len(self.SIZES) + 1)
        self._exits = spawn.Array("q", self.EXITS)

    def request(self, status: int, seconds: float) -> None:
        with self._statuses:
            self._statuses[self.STATUSES.index(status if status in self.STATUSES else 0)] += 1
        _observe(self._seconds, self.SECONDS, seconds)

    def batch(self, exits: Any) -> None:
        _observe(self._sizes, self.SIZES, len(exits))
        with self._exits:
            for exit in exits:
                self._exits[min(int(exit), self.EXITS - 1)] += 1

    def collect(self) -> Iterator[Any]:
        requests = CounterMetricFamily("e2cm_requests", "Answered and refused", labels=["status"])
        for status, count in zip(self.STATUSES, self._statuses[:], strict=True):
            if count:
                requests.add_metric([str(status or "other")], count)
        yield requests
        exits = CounterMetricFamily("e2cm_exits", "Images that left at an exit", labels=["exit"])
        for exit, count in enumerate(self._exits[:]):
            if count:
                exits.add_metric([str(exit)], count)
        yield exits
        for name, about, limits, values in (
            ("e2cm_request_seconds", "From the first byte to the last", self.SECONDS, self._seconds),
            ("e2cm_batch_size", "Images that were run together", self.SIZES, self._sizes),
        ):
            *each, total = values[:]
            sums = np.cumsum(each).tolist()
            names = ["+Inf" if limit == math.inf else str(limit) for limit in limits]
            yield HistogramMetricFamily(name, about, list(zip(names, sums, strict=True)), total)

    async def page(self) -> PlainTextResponse:
        registry = CollectorRegistry()
        registry.register(self)
        return PlainTextResponse(generate_latest(registry).decode())


def _observe(counts: Any, limits: tuple[float, ...], value: float) -> None:
    with counts:
        counts[next(i for i, limit in enumerate(limits) if value <= limit)] += 1
        counts[len(limits)] += value
