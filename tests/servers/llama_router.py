"""A real llama.cpp router for a while, which reads its models from a directory that is shared."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from attrs import frozen

from customized_models.backends import presets

from . import build_llama_cpp
from .llama_server import wait_for_health
from .ollama_server import free_port


@frozen
class LlamaRouter:
    """A running router. `models`: the directory with its file of presets."""

    port: int
    models: Path
    pid: int

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It takes connections and answers none of them."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def memory(self) -> list[dict[str, int]]:
        """Of the process of each model, bytes of its memory that are its `own`, and `shared`."""
        each = [child.memory_info() for child in psutil.Process(self.pid).children()]
        return [{"own": told.rss - told.shared, "shared": told.shared} for told in each]


@contextmanager
def llama_router(directory: Path) -> Iterator[LlamaRouter]:
    """The router, once it answers; ended with all it started when the block ends."""
    port, models = free_port(), directory / "models"
    models.mkdir(parents=True)
    (models / presets.FILE).touch()
    command = [build_llama_cpp.directory() / "llama-server", "--offline", "--jinja"]
    command += ["--models-preset", models / presets.FILE, "--models-max", "4", "--no-repack"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--ctx-size", "256"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory)}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        wait_for_health(process, f"http://127.0.0.1:{port}", directory / "log")
        yield LlamaRouter(port, models, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
