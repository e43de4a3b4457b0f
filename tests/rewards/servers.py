"""Real servers on loopback, and faults between them and a client."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import uvicorn

from lit_align.rewards import RewardBank
from lit_align.rewards.serving import application

Fault = str


@contextmanager
def serving(bank: RewardBank) -> Iterator[str]:
    """A bank on a free port of this machine, as the command serves it."""
    config = uvicorn.Config(application(bank, torch.device("cpu")), port=0, log_level="critical")
    server = uvicorn.Server(config)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()  # who asks before the server has started waits, and is not refused
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def answering(answer: Callable[[str, Any], Any]) -> Iterator[str]:
    """A server that answers with what a function of path and body returns.

    The function returns JSON; or a pair of a status and JSON; or bytes, sent as they are with a length that
    promises ten more; or None, for which the connection is closed without a word.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def reply(self, body: Any) -> None:
            found = answer(self.path, body)
            if found is None:
                self.close_connection = True
                return
            status, told = found if isinstance(found, tuple) else (200, found)
            sent = told if isinstance(told, bytes) else json.dumps(told).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(sent) + 10 * isinstance(told, bytes)))
            with suppress(ConnectionError):  # the client has not waited
                self.end_headers()
                self.wfile.write(sent)
            if isinstance(told, bytes):
                self.close_connection = True

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


FAULTS = ("closed", "slow", "half", "count", "nan", "text", "error", "busy")


def faulty(right: Callable[[str, Any], Any], share: float, seconds: float) -> Callable[[str, Any], Any]:
    """An answer that goes wrong in a share of the calls, in all ways in turn.

    Args:
        right: The right answer.
        share: Of the calls that go wrong.
        seconds: How long a slow answer takes.
    """
    draw, lock = random.Random(0), threading.Lock()
    count = 0

    def answer(path: str, body: Any) -> Any:
        nonlocal count
        with lock:
            fault = FAULTS[count % len(FAULTS)] if draw.random() < share else None
            count += fault is not None
        if fault == "slow":
            time.sleep(seconds)
        found = right(path, body)
        if fault == "closed":
            return None
        if fault == "half":
            return json.dumps(found).encode()[:-4]
        if fault == "count" and "scores" in found:
            return {"scores": found["scores"][:-1]}
        if fault == "nan" and "scores" in found:
            return {"scores": [float("nan")] * len(found["scores"])}
        if fault == "text":
            return (200, "<html>")
        if fault in ("error", "busy"):
            return ({"error": 500, "busy": 429}[fault], {"error": "out of memory"})
        return found

    return answer
