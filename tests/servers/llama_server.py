"""A real llama.cpp server for a while, with one file, on a free port."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import build_ollama, cache
from .process import free_port, serving


@contextmanager
def llama_server(file: Path, log: Path) -> Iterator[str]:
    """The URL of a server that has loaded `file`; it uses the chat template in it."""
    port = free_port()
    command = [cache.directory() / build_ollama.LLAMA_SERVER, "--model", file, "--offline"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--ctx-size", "2048", "--jinja"]
    url = f"http://127.0.0.1:{port}"
    with serving(command, f"{url}/health", log):
        yield url
