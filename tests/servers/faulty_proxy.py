"""A reverse proxy before an object store, which does to some requests what networks and stores do.

It passes a request's `Host` on as it came, because signatures cover it.
"""

from __future__ import annotations

import enum
import http.client
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .counting_proxy import running


class Fault(enum.Enum):
    """What becomes of a request."""

    ERROR = "the store answers 500 and does nothing"
    BUSY = "the store answers 503 and does nothing"
    RESET = "the connection is reset before the store hears of it"
    LOST = "the store does it, and the connection is reset before its answer"
    CUT = "the connection ends in the middle of the answer's body"
    DAMAGED = "a byte of the answer's body is another"
    HELD = "the store does not hear of it, and the connection stays open"
    STALE = "a list is as it was when it was asked for last"


_STATUS = {Fault.ERROR: (500, "InternalError"), Fault.BUSY: (503, "ServiceUnavailable")}
_OF_ONE_HOP = {"connection", "transfer-encoding", "keep-alive"}


class FaultyProxy:
    """What is done to requests, and what there was of them.

    `requests`: method and path of each since `disturb` or `calm` was called last; `sent`: bytes of
    their bodies; `held`: is released once for each that is held.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: list[tuple[str, str]] = []
        self.sent = 0
        self.held = threading.Semaphore(0)
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self.calm()

    def disturb(self, fault: Fault, first: int, count: int = sys.maxsize, of: str = "") -> None:
        """From now on, do it to `count` requests beginning with the one of number `first`.

        Args:
            fault: What becomes of them.
            first: 0 is the next one.
            count: How many.
            of: Count only requests with this in their path.
        """
        with self._lock:
            self._fault, self._numbers = fault, range(first, min(first + count, sys.maxsize))
            self._of, self._counted, self.sent = of, 0, 0
            self.requests.clear()

    def calm(self) -> None:
        """From now on, pass all on."""
        self.disturb(Fault.ERROR, 0, 0)

    def of_next(self, method: str, path: str, body: int) -> Fault | None:
        """Note a request with a body of so many bytes, and say what becomes of it."""
        with self._lock:
            self.requests.append((method, path))
            self.sent += body
            counts = self._of in path
            self._counted += counts
            return self._fault if counts and self._counted - 1 in self._numbers else None


@contextmanager
def faulty_proxy(port: int) -> Iterator[FaultyProxy]:
    """A proxy in front of the server at that port of the loopback address."""
    lists: dict[str, tuple[http.client.HTTPResponse, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            fault = proxy.of_next(self.command, self.path, length)
            body = self.rfile.read(length)
            self.close_connection = True
            if fault is Fault.HELD:
                proxy.held.release()
                proxy.ended.wait()
            elif fault is Fault.RESET:
                self.reset()
            elif fault in _STATUS:
                status, code = _STATUS[fault]
                error = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(error)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else error)
            else:
                self.answer(fault, body)

        do_GET = do_POST = do_HEAD = do_DELETE = do_PUT = pass_on

        def answer(self, fault: Fault | None, body: bytes) -> None:
            if fault is Fault.STALE and self.path in lists:
                answer, data = lists[self.path]
            else:
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
            if "list-type=2" in self.path:
                lists[self.path] = answer, data
            if fault is Fault.LOST:
                self.reset()
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in _OF_ONE_HOP and (name != "Content-Length" or not data):
                    self.send_header(name, value)
            if data:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault is Fault.DAMAGED and data:
                data = data[:-1] + bytes([data[-1] ^ 1])
            if fault is Fault.CUT and data:
                self.wfile.write(data[: len(data) // 2])
                self.reset()
                return
            self.wfile.write(data)

        def reset(self) -> None:
            at_once = struct.pack("ii", 1, 0)  # what was not sent yet is dropped
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            os.close(self.connection.detach())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        proxy = FaultyProxy(server.server_port)
        try:
            yield proxy
        finally:
            proxy.ended.set()
