"""A real Ollama for a while, on a free port, with a directory and a home of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from . import build_ollama

START_SECONDS = 60


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

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It takes connections and answers none of them."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


def free_port() -> int:
    """A port of the loopback address that nothing listens on now."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


@contextmanager
def ollama_server(version: str, directory: Path, **settings: str) -> Iterator[OllamaServer]:
    """The server, once it answers; ended with all it started when the block ends.

    `settings`: further environment variables of its.
    """
    port, models = free_port(), directory / "models"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_MODELS": str(models),
        "OLLAMA_CONTEXT_LENGTH": "512",
        **settings,
    }
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [build_ollama.binary(version), "serve"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(process, port, directory / "log")
        yield OllamaServer("127.0.0.1", port, models, process.pid, version)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"Ollama did not start:\n{log.read_text(errors='replace')[-2000:]}")
