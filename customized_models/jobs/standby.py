"""Fresh interpreters for this library's work: started when it comes, or ahead of it.

Merging sets globals of torch, transformers and PEFT, so nothing is merged in the caller's process;
and no interpreter does a second piece of work, so that none finds what another one left.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from attrs import frozen

_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),  # glibc gives a tensor's memory back at once
    "THP_MEM_ALLOC_ENABLE": "1",  # and torch takes it in pages of two megabytes, if there are such
}

_ahead: list[_Ahead] = []  # one at most
_taking = threading.Lock()


def environment() -> dict[str, str]:
    """What is set here, and how tensors have their memory unless that says so."""
    return _MEMORY | os.environ


def search_path() -> list[str]:
    """Where modules are found here, such as a caller's storage beside its script."""
    return [os.path.abspath(entry) for entry in sys.path]


def add_search_path(entries: Iterable[str]) -> None:
    """Find modules there as well, after all that is found already."""
    sys.path += [entry for entry in entries if entry not in sys.path]


def command(module: str, function: str = "main") -> list[str]:
    """What runs `function()` of a module of `customized_models.jobs`."""
    package = str(Path(__file__).parent.parent.parent)
    code = f"from customized_models.jobs.{module} import {function}; {function}()"
    return [sys.executable, "-P", "-c", f"import sys; sys.path.append({package!r}); {code}"]


def start(command: list[str], output: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """A process in a session of its own, which waits to be told on its stdin what to do."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment(),
    )
    threading.Thread(target=child.wait, daemon=True, name="reaper").start()  # no zombies
    return child


def start_ahead(command: list[str]) -> None:
    """Start an interpreter for the work to come, if none waits that could do it.

    It must end by itself when its stdin ends without any work, as it does when this process ends.
    """
    with _taking:
        _drop_unfit()
        if not _ahead:
            _ahead.append(_Ahead(start(command, subprocess.DEVNULL), _Inherited.now()))


def take_started() -> subprocess.Popen[bytes] | None:
    """The interpreter that was started ahead, if what it would inherit now is the same."""
    with _taking:
        _drop_unfit()
        return _ahead.pop().process if _ahead else None


def _drop_unfit() -> None:
    if _ahead and not _ahead[0].fits():
        _ahead.pop().let_go()


def _forget() -> None:
    """In a forked process: what waits there waits for the other one, and must see it end."""
    global _taking
    _taking = threading.Lock()  # another thread of the other process may have it
    if _ahead:
        _ahead.pop().let_go()


os.register_at_fork(after_in_child=_forget)


@frozen
class _Inherited:
    """What an interpreter has of the process that starts it."""

    directory: tuple[int, int]
    environment: dict[str, str]

    @classmethod
    def now(cls) -> _Inherited:
        here = os.stat(os.curdir)
        return cls((here.st_dev, here.st_ino), environment())


@frozen
class _Ahead:
    process: subprocess.Popen[bytes]
    inherited: _Inherited

    def fits(self) -> bool:
        return self.process.poll() is None and self.inherited == _Inherited.now()

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
