"""A server that speaks as much of Ollama's API as the library uses, and fails as told.

For faults that a real server does not produce on demand. Each fault is a function that takes over
one request: it gets the handler and writes what it likes to the connection.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from attrs import define, field

from tests.servers.counting_proxy import running

BOMB = gzip.compress(b" " * (32 << 20))


@define
class StandIn:
    """Its state, which tests read and change.

    `models`: what is served, by full name, each as it was asked to be created. `written`: when,
    by name. `loaded`: by the name it was loaded under. `blobs`: by digest. `tensors`: what `show`
    tells of those of every file. `faults`: by method and the start of the path. `seen`: the headers
    of every request, in the order they came.
    """

    port: int = 0
    version: str = "0.11.4"
    models: dict[str, dict[str, Any]] = field(factory=dict)
    written: dict[str, datetime] = field(factory=dict)
    loaded: dict[str, dict[str, Any]] = field(factory=dict)
    blobs: dict[str, bytes] = field(factory=dict)
    tensors: list[dict[str, Any]] = field(factory=list)
    faults: dict[tuple[str, str], Callable[[Handler], None]] = field(factory=dict)
    seen: list[tuple[str, str, dict[str, str]]] = field(factory=list)
    over: threading.Event = field(factory=threading.Event)

    def put(self, name: str, model: dict[str, Any]) -> None:
        """Let a name stand for a model from now on."""
        self.models[full(name)] = model
        self.written[full(name)] = datetime.now(UTC)


def full(name: str) -> str:
    """A name with its tag."""
    return name if ":" in name else f"{name}:latest"


class Handler(BaseHTTPRequestHandler):
    """One connection; `self.state` is the server's."""

    protocol_version = "HTTP/1.1"
    state: StandIn

    def take(self) -> None:
        self.close_connection = True
        self.state.seen.append((self.command, self.path, dict(self.headers)))
        for (method, path), fault in self.state.faults.items():
            if method in (self.command, "*") and self.path.startswith(path):
                with suppress(OSError):
                    fault(self)
                return
        self.answer(self.body())

    do_GET = do_POST = do_HEAD = do_DELETE = take

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, body: bytes) -> None:
        state, what = self.state, f"{self.command} {self.path}"
        if self.path.startswith("/api/blobs/"):
            return self.blob(self.path.rpartition("/")[2], body)
        asked = json.loads(body) if body else {}
        name = full(asked.get("model", asked.get("source", "")))
        if what == "GET /api/version":
            return self.send(200, {"version": state.version})
        if what == "GET /api/tags":
            times = {n: {"modified_at": t.isoformat()} for n, t in list(state.written.items())}
            listed = [entry(n, m) | times[n] for n, m in list(state.models.items())]
            return self.send(200, {"models": listed})
        if what == "GET /api/ps":
            return self.send(200, {"models": [entry(n, m) for n, m in list(state.loaded.items())]})
        if what == "POST /api/create":
            return self.create(asked)
        if name not in state.models:
            return self.send(404, {"error": f"model '{name}' not found"})
        if what == "POST /api/show":
            return self.send(200, self.described(state.models[name]))
        if what == "POST /api/copy":
            state.put(asked["destination"], state.models[name])
            return self.raw(200, b"")
        if what == "POST /api/generate":
            self.load(name, asked.get("keep_alive"))
            return self.send(200, {"done": True, "eval_count": 4, "response": "four"})
        assert what == "DELETE /api/delete"
        del state.models[name]
        return self.send(200, {})

    def load(self, name: str, keep_alive: int | None) -> None:
        """One runner for each file, whatever it was loaded as."""
        state, model = self.state, self.state.models[name]
        same = [n for n, other in state.loaded.items() if other["files"] == model["files"]]
        if keep_alive == 0:
            for other in same:
                del state.loaded[other]
        elif not same:
            state.loaded[name] = model

    def described(self, model: dict[str, Any]) -> dict[str, Any]:
        weights = model["files"]["model.gguf"].replace(":", "-")
        told = {**model, "modelfile": f"# FROM x\nFROM /blobs/{weights}\n"}
        return told | {"tensors": self.state.tensors} if self.state.tensors else told

    def blob(self, digest: str, body: bytes) -> None:
        if self.command == "HEAD":
            return self.send(200 if digest in self.state.blobs else 404, {})
        if digest != "sha256:" + hashlib.sha256(body).hexdigest():
            return self.send(400, {"error": "digest mismatch"})
        self.state.blobs[digest] = body
        return self.send(201, {})

    def create(self, asked: dict[str, Any]) -> None:
        if asked["files"]["model.gguf"] not in self.state.blobs:
            return self.send(400, {"error": "unknown type"})
        name = asked.pop("model")
        self.state.put(name, asked)
        return self.lines({"status": "parsing GGUF"}, {"status": "success"})

    def lines(self, *lines: dict[str, Any]) -> None:
        self.raw(200, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def send(self, status: int, value: object) -> None:
        self.raw(status, json.dumps(value).encode())

    def raw(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def entry(name: str, model: dict[str, Any]) -> dict[str, str]:
    """A line of a listing."""
    content = json.dumps(model, sort_keys=True).encode()
    return {"name": name, "digest": hashlib.sha256(content).hexdigest()}


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """The server, while the block lasts."""
    state = StandIn()
    handler = type("Handler", (Handler,), {"state": state})
    with running(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        server.daemon_threads = True
        state.port = server.server_port
        try:
            yield state
        finally:
            state.over.set()


def silence(handler: Handler) -> None:
    """Not a byte."""
    handler.state.over.wait()


def cut(handler: Handler) -> None:
    """A reset connection, after a little of what was sent has been read."""
    handler.rfile.read(min(1000, int(handler.headers.get("Content-Length", 0))))
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()


def hang_up(handler: Handler) -> None:
    """A connection closed in good order, and no answer: a server that is asked to end."""
    handler.body()


def slow_headers(handler: Handler) -> None:
    """A header that grows by a byte now and then."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    trickle(handler)


def slow_body(handler: Handler) -> None:
    """A body that grows by a byte now and then."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    trickle(handler)


def trickle(handler: Handler) -> None:
    while not handler.state.over.wait(0.05):
        handler.wfile.write(b"x")


def endless_body(handler: Handler) -> None:
    """A line without an end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not handler.state.over.is_set():
        handler.wfile.write(b"10000\r\n" + b" " * 65536 + b"\r\n")


def endless_continue(handler: Handler) -> None:
    """Interim answers, and never the answer."""
    while not handler.state.over.is_set():
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.001)


def truncated(handler: Handler) -> None:
    """Half of what was announced."""
    handler.body()
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"status":"success"}\n')


def no_http(handler: Handler) -> None:
    """Another protocol."""
    handler.body()
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")


def html(handler: Handler) -> None:
    """A login page, as 200."""
    handler.body()
    handler.raw(200, b"<html>login</html>", Content_Type="text/html")


def angry(handler: Handler) -> None:
    """A failure that answers with terminal commands and the caller's own token."""
    handler.body()
    said = f"\x1b]0;pwned\x07\x1b[2J{handler.headers.get('Authorization')}" + "<br>" * 100_000
    handler.raw(500, said.encode())


def redirect(handler: Handler) -> None:
    """Go elsewhere, and take everything along."""
    handler.body()
    handler.raw(307, b"", Location=f"http://127.0.0.1:{handler.state.port}/stolen?secret=1")


def bomb(handler: Handler) -> None:
    """Thirty kilobytes that would become thirty megabytes."""
    handler.body()
    handler.raw(200, BOMB, Content_Encoding="gzip")


def deep(handler: Handler) -> None:
    """JSON of a hundred thousand levels."""
    handler.body()
    handler.raw(200, b"[" * 100_000)


def not_an_object(handler: Handler) -> None:
    """JSON of another shape."""
    handler.body()
    handler.raw(200, b"[1]")


def other_shape(handler: Handler) -> None:
    """An object of another shape."""
    handler.body()
    handler.send(200, {"models": {"name": 1}, "version": [1], "data": 3})


def too_large(handler: Handler) -> None:
    """Refused before the body has come."""
    handler.raw(413, b"")


def error_line(handler: Handler) -> None:
    """200, and then it went wrong."""
    handler.body()
    handler.lines({"status": "parsing GGUF"}, {"error": "no room\x1b[2J"}, {"status": "success"})


def no_success(handler: Handler) -> None:
    """200, and then no more."""
    handler.body()
    handler.lines({"status": "parsing GGUF"})


def nothing_created(handler: Handler) -> None:
    """Success, without a model."""
    handler.body()
    handler.lines({"status": "success"})
