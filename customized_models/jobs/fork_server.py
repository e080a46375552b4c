"""The fork server: it imports what work needs, and forks a child for each piece of work.

A child has the imported libraries and nothing else: no state of earlier work, none of the caller's,
and no `__main__`. It shares the memory of the libraries with the server, and starts in about 20
milliseconds instead of some seconds. (The standard library's `multiprocessing.forkserver` does the
same, but imports the caller's `__main__` in each child, which unguarded scripts do not survive.)

Forking is safe as long as the server has one thread. Two more are there after the imports, of
OpenBLAS in numpy and in scipy, which stops them before a fork. Where any other is left, and on
systems where forking is not safe after the imports, the server does one piece of work itself.

It ends when nobody has asked it for anything for some minutes. If the process that started it ends,
it does so with the last of its children; if it is killed, they go on.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import pkgutil
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from attrs import define, field

from ..merging import preload
from .workers import FORKS, PID, add_search_path

IDLE_SECONDS = 600.0
"""How long the server waits for work; a gigabyte of memory is not held longer for nothing."""

_FDS = 4  # open files that come with each piece of work


def main(fd: int) -> None:
    """Serve until the other end of the socket `fd` is closed and all children have ended."""
    control = socket.socket(fileno=fd)
    _import_all()
    if _may_fork():
        _Server(control).serve()
        return
    received = _receive(control)
    if received is not None:
        control.shutdown(socket.SHUT_RD)  # whoever sends from now on starts another server
        while (sent_before := _receive(control)) is not None:
            _start_fresh(sent_before)
        control.close()
        work(received)


def _start_fresh(received: list[int]) -> None:
    """Do a piece of work in an interpreter that imports for itself what it needs."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from customized_models.jobs.fork_server import work; work({received!r})"
    )
    subprocess.Popen([sys.executable, "-P", "-c", code], pass_fds=received)
    for fd in received:
        os.close(fd)


def _import_all() -> None:
    """Import what most work needs. What fails here fails again in the child that needs it."""
    with suppress(Exception):
        importlib.import_module(f"{__package__}.worker")

    with suppress(Exception):
        preload()
    gc.freeze()  # a child's collections would write to the pages of all these objects


def _may_fork() -> bool:
    """Whether a fork leaves this process with one thread, on a system where that is enough."""
    if not FORKS:
        return False
    pid = os.fork()  # OpenBLAS stops its threads before
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return len(os.listdir("/proc/self/task")) == 1


@define
class _Server:
    control: socket.socket
    running: set[int] = field(factory=set, init=False)

    def serve(self) -> None:
        woken, wake = socket.socketpair()
        for end in (woken, wake):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # so that the next line has an effect
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        is_open = True
        while is_open or self.running:  # a child that has just begun is not the holder of its job
            idle = None if self.running else IDLE_SECONDS
            ready, _, _ = select.select([woken, *([self.control] if is_open else [])], [], [], idle)
            if not ready:
                return
            with suppress(BlockingIOError):
                woken.recv(4096)
            self._reap()
            if self.control in ready:
                received = _receive(self.control)
                if received is None:
                    is_open = False
                else:
                    self._fork(received)

    def _fork(self, received: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.control.close()
            work(received)
        for fd in received:
            os.close(fd)
        self.running.add(pid)

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)[0]) > 0:
                self.running.discard(ended)


def _receive(control: socket.socket) -> list[int] | None:
    """The open files of the next piece of work; None at the end."""
    with suppress(ConnectionResetError):
        message, fds, _, _ = socket.recv_fds(control, 1, _FDS)
        if message:
            return fds
    return None


def work(received: list[int]) -> None:
    """Do the piece of work that these open files are in this process, and exit."""
    connection_fd, directory, task, output = received
    code = 1
    try:
        if os.getsid(0) != os.getpid():
            os.setsid()
        os.fchdir(directory)
        os.dup2(output, 1)
        os.dup2(output, 2)
        connection = socket.socket(fileno=connection_fd)
        with suppress(OSError):  # who asked may be gone: a job goes on
            connection.sendall(PID.pack(os.getpid()))
        with os.fdopen(task, "rb") as file:
            path, function = pickle.load(file)
            add_search_path(path)
            pkgutil.resolve_name(function)(connection, *pickle.load(file))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # what the server registered to do at its exit is not this one's
