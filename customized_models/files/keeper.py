"""The keeper: a process that has files in memory, for all processes of its user on this host.

It reads each file once, front to back, and compares it with its digest. Then the system seals the
memory: nobody can change it any more, not even the keeper. Whoever connects is given it as open
files. When nobody has been connected for a while the keeper ends, and with it the memory; nothing
is left behind, whatever ends it.

A message is JSON: a number says how many bytes have been read so far, a list of names comes with as
many open files, and null is the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import socket
import struct
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ..errors import IntegrityError, shown
from .digests import FileDigest
from .streams import FileReader, parallel_files, reading

REPORT_SECONDS = 0.2
"""Between two messages of how many bytes have been read."""

FILES = 100
"""The most open files that come with a message; the system takes 253."""

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
"""What the system promises of memory: it stays as it is, and so does this promise."""

_PIECE = 1 << 20  # bytes that are read, hashed and kept at once


def main(fd: int) -> None:
    """Keep files for whoever connects to the socket `fd`.

    Standard input says in JSON which directory they are in, the size and the digest of each by its
    name, and for how many seconds to stay when nobody is connected.
    """
    directory, digests, idle_seconds = json.load(sys.stdin)
    keeper = _Keeper(socket.socket(fileno=fd))
    keeper.read(Path(directory), {name: FileDigest(*digest) for name, digest in digests.items()})
    while keeper.meet(None if keeper.clients else idle_seconds):
        pass


def is_of_this_user(connection: socket.socket) -> bool:
    """Whether the process at the other end is of the user of this one."""
    size = struct.calcsize("3i")
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return bool(struct.unpack("3i", peer)[1] == os.getuid())


class _Keeper:
    def __init__(self, listener: socket.socket) -> None:
        self.clients: set[socket.socket] = set()
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._readers: list[FileReader] = []
        self._kept: dict[str, int] = {}  # descriptors

    def read(self, directory: Path, files: Mapping[str, FileDigest]) -> None:
        """Read all files, and give them to whoever has connected meanwhile.

        Raises:
            CustomizedModelsError: One cannot be read, or is not what was recorded.
        """
        with ThreadPoolExecutor(parallel_files()) as pool:
            kept = {n: pool.submit(self._read_one, directory / n, files[n]) for n in files}
            while wait(kept.values(), timeout=0).not_done:
                self.meet(REPORT_SECONDS)
                for client in [*self.clients]:
                    self._send(client, sum(reader.position for reader in [*self._readers]))
            self._kept = {name: future.result() for name, future in kept.items()}
        for client in [*self.clients]:
            self._give(client)

    def _read_one(self, path: Path, expected: FileDigest) -> int:
        fd = os.memfd_create(path.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        piece = memoryview(bytearray(_PIECE))
        with reading(path, expected.algorithm) as reader:
            self._readers.append(reader)
            while part := piece[: min(_PIECE, expected.size - reader.position)]:
                reader.read_into(part)
                while part:
                    part = part[os.write(fd, part) :]
            if reader.finish() != expected:
                raise IntegrityError(f"{shown(path.name)} is not what was recorded")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return fd

    def meet(self, seconds: float | None) -> bool:
        """Wait until somebody comes or goes, but not longer than that; returns whether one did."""
        events = self._selector.select(seconds)
        for key, _ in events:
            if key.fileobj is not self._listener:
                self._drop(key.fileobj)
                continue
            client, _ = self._listener.accept()
            client.setblocking(False)  # whoever does not listen delays nobody
            self.clients.add(client)
            self._selector.register(client, selectors.EVENT_READ)
            if not is_of_this_user(client):
                self._drop(client)
            elif self._kept:
                self._give(client)
        return bool(events)

    def _give(self, client: socket.socket) -> None:
        names = sorted(self._kept)
        for start in range(0, len(names), FILES):
            some = names[start : start + FILES]
            self._send(client, some, [self._kept[name] for name in some])
        self._send(client, None)

    def _send(self, client: socket.socket, message: object, fds: list[int] | None = None) -> None:
        try:
            socket.send_fds(client, [json.dumps(message).encode()], fds or [])
        except OSError:  # it has gone
            self._drop(client)

    def _drop(self, client: Any) -> None:
        if client in self.clients:
            self.clients.remove(client)
            self._selector.unregister(client)
            client.close()
