"""A server that lists a complete model as vLLM does, and whose chat template is a wrong one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from attrs import define

from tests.servers.counting_proxy import running


@define
class VLLMStandIn:
    """Its state: the directory `root` is served as `called`.

    `asked` is told the number of each request, from 1 on, before it is answered.
    """

    root: Path
    called: str
    port: int = 0
    requests: int = 0
    asked: Callable[[int], None] = lambda number: None

    def answer_to(self, path: str) -> dict[str, Any]:
        self.requests += 1
        self.asked(self.requests)
        listed = {"id": self.called, "root": str(self.root), "parent": None}
        return {"/v1/models": {"data": [listed]}, "/tokenize": {"tokens": [1, 2, 3]}}[path]


@contextmanager
def vllm_stand_in(root: Path, called: str) -> Iterator[VLLMStandIn]:
    """One that serves the complete model in a directory, while the block lasts."""
    state = VLLMStandIn(root, called)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = json.dumps(state.answer_to(self.path)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = server.server_address[1]
    with running(server):
        yield state
