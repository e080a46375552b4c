"""The keeper: a process that has files in memory, for all processes of its user on this host.

It reads each file once, front to back, and compares it with its digest. Then the system seals the
memory: nobody can change it any more, not even the keeper. Whoever connects is given it as open
files. When nobody has been connected for a while the keeper ends, and with it the memory; nothing
is left behind, whatever ends it.

A message is JSON: a number says how many bytes have been read so far, a list of names comes with as
many open files, and null is the end.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, TypeAlias

from ..errors import IntegrityError, shown
from ..processes import available_memory
from .digests import FileDigest
from .streams import FileReader, parallel_files, reading

REPORT_SECONDS = 0.2
"""Between two messages of how many bytes have been read."""

FILES = 100
"""The most open files that come with a message; the system takes 253."""

_PIECE = 1 << 20  # bytes that are read, hashed and kept at once

_Message: TypeAlias = "tuple[object, list[int]]"  # and the descriptors that come with it


def seals() -> int:
    """What the system promises of memory: it stays as it is, and so does this promise."""
    import fcntl  # Windows, where the package can be imported, has none

    return fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def is_of_this_user(connection: socket.socket) -> bool:
    """Whether the process at the other end is of the user of this one."""
    credentials = struct.Struct("iII")  # process, user, group; see unix(7)
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    return bool(credentials.unpack(peer)[1] == os.getuid())


def main(fd: int) -> None:
    """Keep files for whoever connects to the socket `fd`.

    Standard input says in JSON which directory they are in, the size and the digest of each by its
    name, and for how many seconds to stay when nobody is connected.
    """
    import resource  # as above

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    directory, digests, idle_seconds = json.load(sys.stdin)
    files = {name: FileDigest(*digest) for name, digest in digests.items()}
    _Keeper(socket.socket(fileno=fd), idle_seconds).keep(Path(directory), files)


class _Keeper:
    def __init__(self, listener: socket.socket, idle_seconds: float) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._idle_seconds = idle_seconds
        self._needed_until = time.monotonic() + idle_seconds
        self._unsent: dict[socket.socket, deque[_Message]] = {}  # to each that is connected
        self._kept: dict[str, int] = {}  # descriptors
        self._stopped = Event()

    def keep(self, directory: Path, files: Mapping[str, FileDigest]) -> None:
        """Read all files, and give them away for as long as anybody needs them.

        Raises:
            CustomizedModelsError: One cannot be read, or is not what was recorded.
            MemoryError: Others have taken what there was.
        """
        self._kept = self._read_all(directory, files)
        for client in self._unsent:
            self._give(client)
        while self._meet(None):
            pass

    def _read_all(self, directory: Path, files: Mapping[str, FileDigest]) -> dict[str, int]:
        total, readers = sum(digest.size for digest in files.values()), list[FileReader]()
        with ThreadPoolExecutor(parallel_files()) as pool:
            read = {n: pool.submit(self._read, directory / n, files[n], readers) for n in files}
            try:
                while not all(future.done() for future in read.values()):
                    for future in read.values():
                        if future.done():
                            future.result()  # raises what went wrong, not waiting for the others
                    done = sum(reader.position for reader in [*readers])
                    if available_memory() < total - done:
                        raise MemoryError
                    for unsent in self._unsent.values():
                        if not unsent:  # whoever does not listen is not told again
                            unsent.append((done, []))
                    if not self._meet(REPORT_SECONDS):
                        sys.exit()
            finally:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return {name: future.result() for name, future in read.items()}

    def _read(self, path: Path, expected: FileDigest, readers: list[FileReader]) -> int:
        import fcntl

        fd = os.memfd_create(path.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        piece = memoryview(bytearray(_PIECE))
        with reading(path, expected.algorithm) as reader:
            readers.append(reader)
            while part := piece[: min(_PIECE, expected.size - reader.position)]:
                if self._stopped.is_set():
                    raise CancelledError
                reader.read_into(part)
                while part:
                    part = part[os.write(fd, part) :]
            if reader.finish() != expected:
                raise IntegrityError(f"{shown(path.name)} is not what was recorded")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals())
        return fd

    def _meet(self, seconds: float | None) -> bool:
        """Send what is unsent, and see who comes and goes; returns whether anybody needs this.

        Args:
            seconds: How long to wait; until something happens if None.
        """
        for client in [*self._unsent]:
            self._send(client)
        if seconds is None and any(self._unsent.values()):
            seconds = REPORT_SECONDS
        elif seconds is None and not self._unsent:
            seconds = max(0.0, self._needed_until - time.monotonic())
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._welcome(self._listener.accept()[0])
            else:
                self._drop(key.fileobj)  # it says nothing but that it goes
        return bool(self._unsent) or time.monotonic() < self._needed_until

    def _welcome(self, client: socket.socket) -> None:
        if not is_of_this_user(client):
            client.close()
            return
        client.setblocking(False)
        self._unsent[client] = deque()
        self._selector.register(client, selectors.EVENT_READ)
        if self._kept:
            self._give(client)

    def _give(self, client: socket.socket) -> None:
        names = sorted(self._kept)
        for start in range(0, len(names), FILES):
            some = names[start : start + FILES]
            self._unsent[client].append((some, [self._kept[name] for name in some]))
        self._unsent[client].append((None, []))

    def _send(self, client: socket.socket) -> None:
        unsent = self._unsent[client]
        try:
            while unsent:
                message, fds = unsent[0]
                socket.send_fds(client, [json.dumps(message).encode()], fds)
                unsent.popleft()
        except OSError as error:
            # It does not listen just now, or too many open files are on their way to others.
            if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS):
                self._drop(client)

    def _drop(self, client: Any) -> None:
        del self._unsent[client]
        self._selector.unregister(client)
        client.close()
        self._needed_until = time.monotonic() + self._idle_seconds
