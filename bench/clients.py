"""A server made with e2cm_ext.integrations.litserve, and its clients, on this machine. Its test uses them, too.

    python -m bench clients 8000 cifar10.npz --mean .485 .456 .406 --std .229 .224 .225

sends images to a server that runs already on this machine, at this port; each client sends its next image when it has
the answer to the last. `python -m bench serving` starts servers of its own.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from . import common

HOST = "127.0.0.1"
Reply = tuple[int, Any]  # the status, 0 if the server closed the connection; and what came with it

_SCRIPT = """
import sys, json
from e2cm_ext.integrations.litserve import serve

if __name__ == "__main__":
    serve(sys.argv[1], port=int(sys.argv[2]), **json.loads(sys.argv[3]))
"""


@contextlib.contextmanager
def serving(package: os.PathLike[str], folder: Path, wait: float = 300, **options: Any) -> Iterator[int]:
    """A server in a process of its own; yields the port as soon as it is healthy."""
    script, port = folder / "server.py", _free_port()
    script.write_text(_SCRIPT)
    command = [sys.executable, str(script), str(package), str(port), json.dumps(options)]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + wait
        while get(port, "/health")[0] != 200:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{(folder / 'server.log').read_text()}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):  # its workers, which may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


# ---- requests -------------------------------------------------------------------------------------------------------


def get(port: int, path: str) -> Reply:
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except OSError:
        return 0, ""
    finally:
        connection.close()


def body_of(image: np.ndarray) -> bytes:
    return json.dumps({"image": base64.b64encode(image.tobytes()).decode()}).encode()


def post(port: int, body: bytes, connection: http.client.HTTPConnection | None = None) -> Reply:
    mine = connection or http.client.HTTPConnection(HOST, port, timeout=120)
    try:
        mine.request("POST", "/predict", body, {"Content-Type": "application/json"})
        response = mine.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    except (OSError, http.client.HTTPException):
        mine.close()
        return 0, None
    finally:
        if connection is None:
            mine.close()


def cut_off(port: int, body: bytes, hang_up: bool) -> Reply:
    """Half of a body; then the client closes the connection, or does nothing more."""
    head = f"POST /predict HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection((HOST, port), timeout=120) as s:
        s.sendall(head.encode() + b"\r\n\r\n" + body[: len(body) // 2])
        if hang_up:
            s.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            if line := s.makefile("rb").readline():
                return int(line.split()[1]), None
    return 0, None


def all_at_once(
    requests: Sequence[Callable[[http.client.HTTPConnection], Reply]], port: int, clients: int
) -> tuple[list[Reply], list[float]]:
    """The reply to each, and after how many seconds; client c sends requests c, c + clients, ... one by one."""
    replies: list[Reply] = [(0, None)] * len(requests)
    seconds = [0.0] * len(requests)

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(HOST, port, timeout=120)
        for i in range(number, len(requests), clients):
            start = time.perf_counter()
            replies[i] = requests[i](connection)
            seconds[i] = time.perf_counter() - start
        connection.close()

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return replies, seconds


# ---- the bench ------------------------------------------------------------------------------------------------------


def load_test(port: int, images: np.ndarray, clients: int) -> tuple[list[Reply], dict[str, float]]:
    """The replies to one request per image, and their latency and throughput, after some that are not timed."""
    bodies = [body_of(image) for image in images]
    requests = [lambda c, body=body: post(port, body, c) for body in bodies]
    all_at_once(requests[: 4 * clients], port, clients)
    start = time.perf_counter()
    replies, seconds = all_at_once(requests, port, clients)
    took = time.perf_counter() - start
    p50, p99 = map(float, np.percentile(seconds, [50, 99]))
    return replies, {"p50 ms": p50 * 1e3, "p99 ms": p99 * 1e3, "requests per second": len(images) / took}


def add_load(parser: argparse.ArgumentParser, first: int = 0) -> None:
    common.add_images(parser)
    parser.add_argument("--requests", type=int, default=1000, help="one test image each (default: 1000)")
    parser.add_argument("--first", type=int, default=first, help=f"test image to send (default: {first})")
    parser.add_argument("--clients", type=int, default=16, help="at the same time (default: 16)")


def images_of(options: argparse.Namespace) -> np.ndarray:
    part = slice(options.first, options.first + options.requests)
    found, _ = common.concatenated(common.images(options, "test", part, channels_last=False))
    return found.numpy()


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("clients", __doc__, threads=False, seed=False)
    parser.add_argument("port", type=int, help="of the server")
    add_load(parser)
    options = common.parse(parser, argv)
    replies, found = load_test(options.port, images_of(options), options.clients)
    statuses, counts = np.unique([status for status, _ in replies], return_counts=True)
    result = {"clients": options.clients, "requests": len(replies), **found}
    result |= {"replies by status": dict(zip(map(str, statuses), counts.tolist(), strict=True))}
    print(result)
    common.save(options, result)
