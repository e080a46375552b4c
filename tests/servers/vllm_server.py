"""A real vLLM for a while, on a free port: a base model, and adapters that come and go."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from . import build_vllm
from .ollama_server import free_port

START_SECONDS = 600  # most of it imports, on a processor with other work
BASE = "tiny"


@frozen
class VLLMServer:
    """A running server of the base model `base`, as `BASE`. `models`: what it reads adapters from.

    `pid`: of the process that answers.
    """

    port: int
    base: Path
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


@contextmanager
def vllm_server(base: Path, directory: Path) -> Iterator[VLLMServer]:
    """The server, once it answers; ended with all it started when the block ends."""
    port, models = free_port(), directory / "models"
    models.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    # By its module: the command `vllm` asks for a distribution of that name.
    command = [build_vllm.python(), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", base, "--served-model-name", BASE, "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    # One at a time: on processors, a request that is batched with another may get its adapter.
    command += ["--max-model-len", "256", "--max-num-seqs", "1"]
    command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "1"]
    command += ["--max-cpu-loras", "4"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait(process, port, directory / "log")
        yield VLLMServer(port, base, models, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")
