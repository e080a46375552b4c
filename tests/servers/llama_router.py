"""A real llama.cpp router for a while, which reads its models from a directory that is shared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
from attrs import frozen

from customized_models.backends import presets

from . import build_llama_cpp
from .process import free_port, serving, stopped


@frozen
class LlamaRouter:
    """A running router. `models`: the directory with its file of presets."""

    port: int
    models: Path
    pid: int

    def stopped(self) -> AbstractContextManager[None]:
        """It takes connections and answers none of them."""
        return stopped(self.pid)

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
    url = f"http://127.0.0.1:{port}/health"
    with serving(command, url, directory / "log", environment=environment) as pid:
        yield LlamaRouter(port, models, pid)
