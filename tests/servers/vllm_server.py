"""A real vLLM for a while, on a free port: a base model, and adapters that come and go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from attrs import frozen

from . import build_vllm
from .process import free_port, serving, stopped

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

    def stopped(self) -> AbstractContextManager[None]:
        """It takes connections and answers none of them."""
        return stopped(self.pid)


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
    url = f"http://127.0.0.1:{port}/health"
    with serving(
        command, url, directory / "log", environment=environment, seconds=START_SECONDS
    ) as pid:
        yield VLLMServer(port, base, models, pid)
