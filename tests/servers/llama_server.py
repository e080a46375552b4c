"""A real llama.cpp server for a while, with one file, on a free port."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import build_ollama, cache
from .ollama_server import START_SECONDS, free_port


@contextmanager
def llama_server(file: Path, log: Path) -> Iterator[str]:
    """The URL of a server that has loaded `file`; it uses the chat template in it."""
    port = free_port()
    command = [cache.directory() / build_ollama.LLAMA_SERVER, "--model", file, "--offline"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--ctx-size", "2048", "--jinja"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_health(process, url, log)
        yield url
    finally:
        process.kill()
        process.wait()


def wait_for_health(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until a server that was just started answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"llama-server did not start:\n{log.read_text(errors='replace')[-2000:]}")
