"""Files as a host has them in memory, for work that many of its processes do with the same ones.

Whoever asks first starts a keeper (`keeper`). It is found by a name that says which files, when
they were last changed and what they hold; the system gives the name to one process, and takes it
back when that ends. Linux alone has such names, and memory that can be sealed.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..models import Progress
from ..processes import available_memory
from .digests import FileDigest, digest_of
from .keeper import FILES, SEALS, is_of_this_user

SHARE = 0.25
"""How much of the memory that this host has left a keeper may take."""

IDLE_SECONDS = 30.0
"""For how long a keeper stays when nobody is connected: a fleet's next job begins at once."""

_TRIES, _TRY_SECONDS = 40, 0.05  # to find a keeper that has just begun, or is about to end
_SILENT_SECONDS = 30.0  # it says several times a second how far it is
_MESSAGE = 1 << 17  # bytes: a hundred names


@contextmanager
def kept_in_memory(
    directory: Path, files: Mapping[str, FileDigest], progress: Progress
) -> Iterator[Path | None]:
    """A directory of files that were compared and cannot be changed, while the block lasts.

    Args:
        directory: Where the files are.
        files: What each of them must hold.
        progress: Told how many bytes have been read; raises to stop.

    Yields:
        The directory. None if there is too little memory, if a file is not what it must be or
        cannot be read, or if the keeper has gone: whoever reads the files finds out.
    """
    with ExitStack() as stack:
        connection = _connection(directory, files)
        if connection is None:
            yield None
            return
        stack.enter_context(connection)
        kept = _received(connection, files, progress, stack)
        if kept is None:
            yield None
            return
        view = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, fd in kept.items():
            (view / name).parent.mkdir(parents=True, exist_ok=True)
            (view / name).symlink_to(f"/proc/{os.getpid()}/fd/{fd}")
        yield view


def _connection(directory: Path, files: Mapping[str, FileDigest]) -> socket.socket | None:
    """A connection to the keeper of the files; one is started if there is none, but memory."""
    try:
        name = _name(directory, files)
    except OSError:  # one is missing
        return None
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
    fd, package = listener.fileno(), str(Path(__file__).parent.parent.parent)
    code = (
        f"import sys; sys.path.append({package!r}); "
        f"from customized_models.files.keeper import main; main({fd})"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        pass_fds=[fd],
        cwd="/",
        start_new_session=True,
        text=True,
    )
    threading.Thread(target=process.wait, daemon=True, name="reaper").start()  # no zombies
    digests = {name: [digest.size, digest.digest] for name, digest in files.items()}
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as task:
        json.dump([os.path.abspath(directory), digests, IDLE_SECONDS], task)


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
        try:
            data, fds, _, _ = socket.recv_fds(connection, _MESSAGE, FILES)
        except OSError:
            return None
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
    if kept.keys() != files.keys():
        return False
    with suppress(OSError):  # no such memory at all
        return all(
            fcntl.fcntl(fd, fcntl.F_GET_SEALS) == SEALS and os.fstat(fd).st_size == files[name].size
            for name, fd in kept.items()
        )
    return False
