"""Processes of this host that outlive whoever started them, known by number and start time."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import DeploymentError
from ..models import Progress

_KEPT = 64 << 10  # bytes of a starting process's output
_GRACE = 5.0  # seconds between asking a process to end and ending it
_TICK = 0.2  # seconds between two calls of `progress`


def start_time(pid: int) -> str | None:
    """When the process of that number started, as its system tells it; None if none runs.

    A number is given out again in time, and after a restart of the host; number and start time
    together are not.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The command's name, in parentheses, may hold anything; see proc(5).
        state, *others = stat.rpartition(b")")[2].split()
        if state in (b"Z", b"X"):
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {int(others[18])}"
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    state_text, _, since = answer.stdout.strip().partition(" ")
    return None if not since or state_text.startswith("Z") else since.strip()


def end(pid: int, started: str) -> None:
    """End that process: first it is asked to, then it is killed. Never another of its number.

    Raises:
        DeploymentError: it belongs to someone else, or survives.
    """
    for kind in (signal.SIGTERM, signal.SIGKILL):
        if start_time(pid) != started:
            return
        try:
            os.kill(pid, kind)
        except ProcessLookupError:
            return
        except PermissionError as error:
            raise DeploymentError(f"process {pid} belongs to another user") from error
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            if start_time(pid) != started:
                return
            time.sleep(0.02)
    raise DeploymentError(f"process {pid} does not end")


def output_of_start(command: Sequence[str], seconds: float, progress: Progress) -> bytes:
    """Run a command that puts itself into the background; its output until it closes it.

    The command's processes form a session of their own. `progress("starting", 0, 1)` is called
    meanwhile; if it raises, or `seconds` pass, the whole session is killed. Of more than 64 KiB
    of output, the last are given.

    Raises:
        DeploymentError: the output was not closed in time.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            output, until = b"", time.monotonic() + seconds
            while time.monotonic() < until:
                progress("starting", 0, 1)
                if selector.select(_TICK):
                    piece = os.read(process.stdout.fileno(), _KEPT)
                    if not piece:
                        process.wait()
                        return output
                    output = (output + piece)[-_KEPT:]
            raise DeploymentError(f"the server was not ready within {seconds:g} seconds")
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # The server is no child of ours: that it is gone, and its port with it, shows here.
            until = time.monotonic() + _GRACE
            while time.monotonic() < until and selector.select(_GRACE):
                if not os.read(process.stdout.fileno(), _KEPT):
                    break
            raise
