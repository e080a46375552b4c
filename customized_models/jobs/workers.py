"""Processes for this library's work, asked for by the process that has the work.

Merging sets globals of torch, transformers and PEFT, so nothing is merged in the caller's process;
and no process does a second piece of work, so that none finds what another one left. Importing the
libraries takes seconds. So one process imports them, the fork server (`fork_server`), and forks a
child for each piece of work. It is started with the first, or ahead of it.

Work is sent to the server as open files: a connection on which the child answers, the caller's
working directory, the pickled work, and where output goes.
"""

from __future__ import annotations

import os
import pickle
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from attrs import frozen

from ..errors import JobFailed, shown
from ..files.writing import disk_errors
from ..processes import start_server

FORKS = sys.platform == "linux"
"""Whether a process may fork after the imports: the frameworks of macOS do not work in a fork."""

PID = struct.Struct("<q")
"""A child's first message on its connection: its process id."""

_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),  # glibc gives a tensor's memory back at once
    "THP_MEM_ALLOC_ENABLE": "1",  # and torch takes it in pages of two megabytes, if there are any
}


class Worker:
    """A process that does one piece of work. Any number of threads may wait for it."""

    def __init__(self, connection: socket.socket) -> None:
        """`connection`: to the process; nothing has been read from it."""
        self._connection = connection
        self._pid: int | None = None
        self._reading = threading.RLock()  # of one message, by one thread

    @property
    def pid(self) -> int | None:
        """Its process id, once it has begun; None if it never did. Waits for it."""
        with self._reading:
            if self._pid is None and self._connection.fileno() >= 0:
                message = self._connection.recv(PID.size, socket.MSG_WAITALL)
                if len(message) == PID.size:
                    (self._pid,) = PID.unpack(message)
            return self._pid

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, as far as it is known without waiting."""
        return self.wait(0)

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended, but not longer than that; returns whether it has.

        One that has been closed meanwhile, by another thread that saw it end, has.
        """
        if seconds and not self._has_said(seconds):
            return False
        with self._reading:
            if self._connection.fileno() < 0:
                return True
            if not self._has_said(0):
                return False
            if self._pid is None:
                return self.pid is None  # a worker that has just begun has not ended
            return not self._connection.recv(1, socket.MSG_PEEK)

    def _has_said(self, seconds: float) -> bool:
        """Whether there is something to read, or it has been closed."""
        fd = self._connection.fileno()
        if fd < 0:
            return True
        said = select.poll()  # `select.select` takes no descriptors beyond 1023
        said.register(fd, select.POLLIN)
        return bool(said.poll(seconds * 1000))

    def answer(self, seconds: float | None = None) -> bytes:
        """Wait until it ends; returns all that it has sent.

        Raises:
            TimeoutError: It has begun, and sent nothing for `seconds`, if not None.
        """
        if self.pid is None:  # the libraries may take minutes to import, from a slow disk
            return b""
        self._connection.settimeout(seconds)
        with self._connection.makefile("rb") as answer:
            return answer.read()

    def kill(self) -> None:
        """End it at once, if it has begun."""
        if self._pid is not None and not self.has_ended:
            os.kill(self._pid, 9)

    def close(self) -> None:
        """Forget it; it goes on."""
        with self._reading:
            self._connection.close()


def start_worker(function: str, arguments: bytes, output: IO[bytes]) -> Worker:
    """Have a process of its own do some work; returns at once.

    Args:
        function: What does the work, as `module:name`, so that it is imported there alone. It is
            called with a socket to send its answer on.
        arguments: Its further arguments, as `pickled` gives them.
        output: Takes what the process prints.
    """
    here, there = socket.socketpair()
    directory = os.open(os.curdir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with tempfile.TemporaryFile() as file, there:
            file.write(pickle.dumps((search_path(), function)) + arguments)
            file.seek(0)
            _send([there.fileno(), directory, file.fileno(), output.fileno()])
    finally:
        os.close(directory)
    return Worker(here)


def open_output(log: Path) -> IO[bytes]:
    """The file for what a job's workers print, to be added to.

    Raises:
        StorageError: The disk failed, or is full.
    """
    with disk_errors("the job's output has no place"):
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return log.open("ab")


def warm_up() -> int:
    """Start the fork server now, if none runs that could do the next piece of work.

    Returns:
        Its process id.
    """
    with _lock:
        return _fitting_server().process.pid


def environment() -> dict[str, str]:
    """The environment of this process, and how tensors get their memory unless it says so."""
    return _MEMORY | os.environ


def search_path() -> list[str]:
    """Where modules are found here, such as a caller's storage beside its script."""
    return [os.path.abspath(entry) for entry in sys.path]


def add_search_path(entries: Iterable[str]) -> None:
    """Find modules there as well, after all that is found already."""
    sys.path += [entry for entry in entries if entry not in sys.path]


def pickled(*objects: Any) -> bytes:
    """Objects as another interpreter can load them.

    Raises:
        JobFailed: One does not pickle, or is defined in `__main__`.
    """
    try:
        payload = pickle.dumps(objects)
    except Exception as error:
        raise JobFailed(
            f"a job needs a storage and backends that pickle; {shown(error)}"
        ) from error
    if b"__main__" in payload:
        raise JobFailed(
            "a job cannot import a storage or backend defined in __main__; put it in a module"
        )
    return payload


# The server, of which a process has one at most


@frozen
class _Server:
    process: subprocess.Popen[bytes]
    control: socket.socket
    environment: dict[str, str]

    @classmethod
    def start(cls) -> _Server:
        here, there = socket.socketpair()
        inherited = environment()
        with there:
            process = start_server(
                "customized_models.jobs.fork_server", there.fileno(), env=inherited
            )
        return cls(process, here, inherited)

    def fits(self) -> bool:
        """Whether it runs, and its children inherit what they should."""
        return self.process.poll() is None and self.environment == environment()


_server: _Server | None = None
_lock = threading.Lock()


def _fitting_server() -> _Server:
    global _server
    if _server is not None and not _server.fits():
        _server.control.close()
        _server = None
    if _server is None:
        _server = _Server.start()
    return _server


def _send(fds: list[int]) -> None:
    global _server
    with _lock:
        while True:
            server = _fitting_server()
            try:
                socket.send_fds(server.control, [b"w"], fds)
            except (BrokenPipeError, ConnectionResetError):  # it has just ended
                server.control.close()
                _server = None
                continue
            if not FORKS:  # it does this piece of work itself, and no other
                server.control.close()
                _server = None
            return


def _forget() -> None:
    """In a forked process: the server is its parent's, which it must see end."""
    global _server, _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    if _server is not None:
        _server.control.close()
        _server = None


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forget)
