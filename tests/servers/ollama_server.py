"""A real Ollama for a while, on a free port, with a directory and a home of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from attrs import frozen

from . import build_ollama
from .process import free_port, serving, stopped


@frozen
class OllamaServer:
    """A running server. `models`: its directory, with `blobs` and `manifests`."""

    address: str
    port: int
    models: Path
    pid: int
    version: str

    @property
    def names(self) -> set[str]:
        """What it has, by the files it keeps: a manifest for each model, named after its tag."""
        return {path.parent.name for path in (self.models / "manifests").rglob("latest")}

    def stopped(self) -> AbstractContextManager[None]:
        """It takes connections and answers none of them."""
        return stopped(self.pid)


@contextmanager
def ollama_server(version: str, directory: Path, **settings: str) -> Iterator[OllamaServer]:
    """The server, once it answers; ended with all it started when the block ends.

    `settings`: further environment variables of its.
    """
    port, models = free_port(), directory / "models"
    models.mkdir(parents=True, exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_MODELS": str(models),
        "OLLAMA_CONTEXT_LENGTH": "512",
        **settings,
    }
    command = [build_ollama.binary(version), "serve"]
    url = f"http://127.0.0.1:{port}/api/version"
    with serving(command, url, directory / "log", environment=environment) as pid:
        yield OllamaServer("127.0.0.1", port, models, pid, version)
