"""Files as a host has them in memory, for work that many of its processes do with the same ones.

Whoever asks first starts a keeper (`keeper`). It is found by a name that says which files, when
they were last changed and what they hold; the system gives the name to one process, and takes it
back when that ends. Linux alone has such names, and memory that can be sealed.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import CustomizedModelsError
from ..models import Progress
from ..processes import available_memory, start_server
from .digests import FileDigest, digest_of
from .keeper import FILES, is_of_this_user, seals

SHARE = 0.25
"""How much of the memory that this host has left a keeper may take."""

IDLE_SECONDS = 30.0
"""For how long a keeper stays when nobody is connected: a fleet's next job begins at once."""

_TRIES, _TRY_SECONDS = 40, 0.05  # to find a keeper that has just begun, or is about to end
_SILENT_SECONDS = 30.0  # it says several times a second how far it is
_MESSAGE = 1 << 17  # bytes: a hundred names

_log = logging.getLogger(__name__)


def can_keep() -> bool:
    """Whether this Python knows of memory that can be sealed.

    That of other systems does not, nor one that was built for old Linuxes.
    """
    if not hasattr(os, "memfd_create"):
        return False
    import fcntl  # Windows, where the package can be imported, has none

    return hasattr(fcntl, "F_GET_SEALS")


@contextmanager
def kept_in_memory(
    directory: Path, files: Mapping[str, FileDigest], progress: Progress
) -> Iterator[Path | None]:
    """A directory of files that were compared and cannot be changed, while the block lasts.

    Args:
        directory: Where the files are.
        files: What each of them must hold.
        progress: Told how many bytes have been read; raises an error of ours to stop.

    Yields:
        The directory, for this process alone. None if that cannot be, for whatever reason: there is
        too little memory, a file is not what it must be, the keeper has gone. Whoever then reads
        the files finds out what is wrong with them.
    """
    with ExitStack() as stack:
        view = None
        if can_keep():
            try:
                view = _view(directory, files, progress, stack)
            except CustomizedModelsError:
                raise
            except (OSError, RuntimeError, ValueError):  # RuntimeError: no more threads
                _log.debug("the keeper of %s", directory, exc_info=True)
        if view is None:
            stack.close()
        _log.info("%skept in memory: %s", "" if view else "not ", directory)
        yield view


def _view(
    directory: Path, files: Mapping[str, FileDigest], progress: Progress, stack: ExitStack
) -> Path | None:
    """The directory to yield; `stack` ends it."""
    connection = _connection(directory, files)
    if connection is None:
        return None
    stack.enter_context(connection)
    kept = _received(connection, files, progress, stack)
    if kept is None:
        return None
    # Of the same name, by which transformers calls the code of a base.
    view = Path(stack.enter_context(tempfile.TemporaryDirectory()), directory.name)
    for name, fd in kept.items():
        link = view / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"/proc/self/fd/{fd}")
        if not os.path.samestat(link.stat(), os.fstat(fd)):
            return None
    return view


def _connection(directory: Path, files: Mapping[str, FileDigest]) -> socket.socket | None:
    """A connection to the keeper of the files; one is started if there is none, and room for it."""
    name = _name(directory, files)
    for _ in range(_TRIES):
        with _unconnected() as listener:
            if _takes(listener, name):
                if sum(digest.size for digest in files.values()) > SHARE * available_memory():
                    return None
                listener.listen()
                _start_keeper(listener, directory, files)
        connection = _unconnected()
        with suppress(OSError):
            connection.connect(name)
            if is_of_this_user(connection):
                return connection
        connection.close()
        time.sleep(_TRY_SECONDS)
    return None


def _name(directory: Path, files: Mapping[str, FileDigest]) -> str:
    facts = {}
    for file, digest in files.items():
        now = (directory / file).stat()
        facts[file] = [digest.digest, now.st_size, now.st_mtime_ns, now.st_ino, now.st_dev]
    return f"\0customized-models {os.getuid()} {digest_of([str(directory), facts])}"


def _unconnected() -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.settimeout(_SILENT_SECONDS)
    return one


def _takes(listener: socket.socket, name: str) -> bool:
    """Whether the name was free, and is the listener's now."""
    try:
        listener.bind(name)
    except OSError:
        return False
    return True


def _start_keeper(
    listener: socket.socket, directory: Path, files: Mapping[str, FileDigest]
) -> None:
    digests = {name: [digest.size, digest.digest] for name, digest in files.items()}
    with tempfile.TemporaryFile("w+") as task:
        json.dump([os.path.abspath(directory), digests, IDLE_SECONDS], task)
        task.seek(0)
        start_server("customized_models.files.keeper", listener.fileno(), stdin=task, cwd="/")


def _received(
    connection: socket.socket,
    files: Mapping[str, FileDigest],
    progress: Progress,
    stack: ExitStack,
) -> dict[str, int] | None:
    """Descriptors of the files' memory, which `stack` closes; None if they are not all there."""
    kept: dict[str, int] = {}
    total = sum(digest.size for digest in files.values())
    while True:
        data, fds, _, _ = socket.recv_fds(connection, _MESSAGE, FILES)
        for fd in fds:
            stack.callback(os.close, fd)
        if not data:
            return None
        message = json.loads(data)
        if message is None:
            return kept if _are_sealed(kept, files) else None
        if isinstance(message, int):
            progress("reading the base into memory", message, total)
        else:
            kept.update(zip(message, fds, strict=False))


def _are_sealed(kept: Mapping[str, int], files: Mapping[str, FileDigest]) -> bool:
    """Whether these are the files, none of which can change any more."""
    import fcntl

    if kept.keys() != files.keys():
        return False
    return all(  # hardened systems add one seal more
        fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals() == seals()
        and os.fstat(fd).st_size == files[name].size
        for name, fd in kept.items()
    )
