"""Processes: which one of which host, what they may take, and Pythons of our own."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil
from attrs import frozen

from .errors import UnsupportedError


def cores() -> int:
    """How many this process may use."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def available_memory() -> int:
    """How many bytes this process may still take: of the host's, and within its control groups."""
    left: int = psutil.virtual_memory().available
    with suppress(OSError):  # not Linux
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8")
        left = min([left, *_left_in(groups)])
    return max(0, left)


def _left_in(groups: str) -> Iterator[int]:
    """What the limit of each control group leaves, with the page cache, which gives way.

    Source: Linux, `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`.

    Args:
        groups: As `/proc/self/cgroup` names them.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in _GROUPS.keys() & {*controllers.split(",")}:
            mount, limit, used, cache, shared = _GROUPS[controller]
            innermost = Path(mount, path.lstrip("/"))  # not there where a container has its own
            for group in (innermost, *innermost.parents):
                with suppress(OSError, ValueError, KeyError):  # none here, or no limit: "max"
                    rows = (group / "memory.stat").read_text(encoding="ascii").splitlines()
                    stat = {name: int(value) for name, value in map(str.split, rows)}
                    most, taken = (int((group / file).read_text()) for file in (limit, used))
                    yield most - taken + stat[cache] - stat[shared]


_GROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "file", "shmem"),
    "memory": (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_cache",
        "total_shmem",
    ),
}
"""By controller, none for version 2: where groups are, and the names of their numbers."""


def start_server(
    module: str,
    fd: int,
    *,
    stdin: int | IO[str] = subprocess.DEVNULL,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a Python of its own, in a session of its own, that calls `main(fd)` of a module.

    Args:
        module: Its name, of this package.
        fd: An open file, which the process inherits.
        stdin: As for `subprocess.Popen`, and so are the others.
        cwd: Where it runs.
        env: Its environment.
    """
    package = str(Path(__file__).parent.parent)
    code = f"import sys; sys.path.append({package!r}); from {module} import main; main({fd})"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[fd],
        cwd=cwd,
        env=env,
        start_new_session=True,
    )
    threading.Thread(target=process.wait, daemon=True, name="reaper").start()  # no zombies
    return process


def refuse_windows() -> None:
    """Registries need what Linux and macOS have: `fsync` of directories, links, signals.

    Raises:
        UnsupportedError: This is Windows.
    """
    if sys.platform == "win32":
        raise UnsupportedError(
            "registries work on Linux and macOS; on Windows, use the Windows Subsystem for Linux"
        )


@frozen
class Process:
    """A process, as a record of it has it.

    A number is given out again in time, and after a restart of the host; host, number and start
    time together are not.

    Attributes:
        host: Which running system, and which numbering of its processes, it is one of.
        pid: Its number there.
        started: When it started, as that system tells it; comparable on the same host alone.
    """

    host: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> Process:
        """This process."""
        return _current(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process of this host that has that number; None if none runs."""
        started = _started(pid)
        return None if started is None else cls(host_id(), pid, started)

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended; False for one of another host."""
        return self.host == host_id() and Process.of(self.pid) != self


@functools.lru_cache(maxsize=1)
def _current(pid: int) -> Process:
    process = Process.of(pid)
    assert process is not None
    return process


@functools.cache
def host_id() -> str:
    """Identifies a running system and, of containers on it, those that share their processes."""
    if sys.platform == "linux":
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{platform.node()} {uuid.getnode():x} {int(psutil.boot_time())}"


def _started(pid: int) -> str | None:
    if sys.platform == "linux":
        # psutil adds the wall clock's time of the boot, which moves whenever the clock is set.
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The command's name, in parentheses, may hold anything; see proc(5).
        state, *others = stat.rpartition(b")")[2].split()
        return None if state in (b"Z", b"X") else str(int(others[18]))
    try:
        process = psutil.Process(pid)
        zombie = process.status() == psutil.STATUS_ZOMBIE
        return None if zombie else repr(process.create_time())
    except psutil.NoSuchProcess:
        return None
