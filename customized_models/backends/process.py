"""Processes of this host that outlive whoever started them, known by number and start time."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

from ..errors import DeploymentError
from ..models import Progress
from ..processes import Process, host_id

_KEPT = 64 << 10  # bytes of a starting process's output
_GRACE = 5.0  # seconds between asking a process to end and ending it
_TICK = 0.2  # seconds between two calls of `progress`


def processes_with(mark: str) -> list[Process]:
    """The processes of this host that have `mark` as an argument of their command."""
    found = []
    for candidate in psutil.process_iter():
        with suppress(psutil.Error):
            if mark in candidate.cmdline() and (process := Process.of(candidate.pid)):
                found.append(process)
    return found


def end(process: Process) -> None:
    """End a process: first it is asked to, then it is killed. Never another of its number.

    Raises:
        DeploymentError: It belongs to someone else, survives, or runs on another host.
    """
    if process.host != host_id():
        raise DeploymentError(
            f"process {process.pid} runs, or ran, on another host or before a restart of this one"
        )
    for kind in (signal.SIGTERM, signal.SIGKILL):
        if process.is_gone:
            return
        try:
            os.kill(process.pid, kind)
        except ProcessLookupError:
            return
        except PermissionError as error:
            raise DeploymentError(f"process {process.pid} belongs to another user") from error
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            if process.is_gone:
                return
            time.sleep(0.02)
    raise DeploymentError(f"process {process.pid} does not end")


def output_of_start(
    command: Sequence[str],
    seconds: float,
    progress: Progress,
    variables: Mapping[str, str] | None = None,
) -> bytes:
    """Run a command that puts itself into the background; its output until it closes it.

    The command's processes form a session of their own. `progress("starting", 0, 0)` is called
    meanwhile; if it raises, or `seconds` pass, the whole session is killed. Of more than 64 KiB
    of output, the last are given. `variables` go into its environment.

    Raises:
        DeploymentError: the output was not closed in time.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        env={**os.environ, **(variables or {})},
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            output, until = b"", time.monotonic() + seconds
            while time.monotonic() < until:
                progress("starting", 0, 0)
                if selector.select(_TICK):
                    piece = os.read(process.stdout.fileno(), _KEPT)
                    if not piece:
                        process.wait()
                        return output
                    output = (output + piece)[-_KEPT:]
            raise DeploymentError(f"the server was not ready within {seconds:g} seconds")
        except BaseException:
            _kill_session(process)
            raise


def _kill_session(leader: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started, and wait until they are gone."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()
        # The others are no children of ours, and may have closed the output already.
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            os.killpg(leader.pid, 0)
            time.sleep(0.02)
    leader.wait()
