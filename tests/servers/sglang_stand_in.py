"""A server that speaks as much of SGLang's API as the library uses; it needs a GPU for its own.

As `python/sglang/srt/entrypoints/http_server.py` has it: an adapter is loaded under a name that
none has yet, and listed with its directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from attrs import define, field

from tests.servers.counting_proxy import running


@define
class SGLangStandIn:
    """Its state: `adapters` are directories by name. `dies`: at the next that is posted."""

    base: Path
    called: str
    port: int = 0
    adapters: dict[str, str] = field(factory=dict)
    posted: list[str] = field(factory=list)
    dies: bool = False

    def listing(self) -> dict[str, Any]:
        base = {"id": self.called, "root": self.called, "parent": None}
        loaded = [
            {"id": name, "root": path, "parent": self.called}
            for name, path in self.adapters.items()
        ]
        return {"object": "list", "data": [base, *loaded]}

    def load(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return 400, {"success": False, "error_message": f"{name} is already loaded"}
        if not Path(path, "adapter_config.json").is_file():
            return 400, {"success": False, "error_message": f"no adapter at {path}"}
        self.adapters[name] = path
        return 200, {"success": True, "loaded_adapters": self.adapters}

    def unload(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return 400, {"success": False, "error_message": f"{body['lora_name']} is not loaded"}
        return 200, {"success": True, "loaded_adapters": self.adapters}


@contextmanager
def sglang_stand_in(base: Path, called: str = "base") -> Iterator[SGLangStandIn]:
    """One that serves the base model in a directory, while the block lasts."""
    state = SGLangStandIn(base, called)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told = {
                "/v1/models": state.listing(),
                "/get_model_info": {"model_path": str(state.base)},
                "/get_server_info": {"version": "0.5.4"},
            }
            self.answer(200 if self.path in told else 404, told.get(self.path, {}))

        def do_POST(self) -> None:
            state.posted.append(self.path)
            if state.dies:
                server.shutdown()
                server.server_close()
                return
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            call = {"/load_lora_adapter": state.load, "/unload_lora_adapter": state.unload}
            self.answer(*(call[self.path](body) if self.path in call else (404, {})))

        def answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = server.server_address[1]
    with running(server):
        yield state
