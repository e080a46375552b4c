"""A server as a process: started, waited for, stopped for a while, ended with what it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def free_port() -> int:
    """A port of the loopback address that nothing listens on now."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str | Path],
    url: str,
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float = 60,
) -> Iterator[int]:
    """The number of the server's process, once it answers at `url`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        with ended_with_us(process.pid):
            _wait(process, url, log, seconds)
            yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started and left


@contextmanager
def ended_with_us(group: int) -> Iterator[None]:
    """Kill a group of processes if this process is killed while the block lasts.

    A shell waits for the end of a pipe that only this process holds open.
    """
    command = ["sh", "-c", 'read line; kill -s KILL -- "-$0"', str(group)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as watcher:
        try:
            yield
        finally:
            watcher.kill()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    told = log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"{process.args[0]} did not start:\n{told}")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process takes connections and answers none of them."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
