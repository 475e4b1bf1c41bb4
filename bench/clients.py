"""A server made with e2cm_ext.integrations.litserve, and its clients, on this machine. Its test uses them, too."""

from __future__ import annotations

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
from typing import Any

import numpy as np

HOST = "127.0.0.1"
Reply = tuple[int, Any]  # the status, 0 if the server hung up; and what came with it

_SCRIPT = """
import sys, json
from e2cm_ext.integrations.litserve import serve

if __name__ == "__main__":
    serve(sys.argv[1], port=int(sys.argv[2]), **json.loads(sys.argv[3]))
"""


@contextlib.contextmanager
def serving(package: os.PathLike[str], folder: Any, wait: float = 300, **options: Any) -> Iterator[int]:
    """A server in a process of its own; gives the port as soon as it is healthy."""
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
    """Half of a body; then the client hangs up, or does nothing more."""
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
    """What is replied to each, and after how many seconds; client c sends requests c, c + clients, ... in turn."""
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
