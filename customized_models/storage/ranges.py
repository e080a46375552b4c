"""Large objects, read by ranges: several of them ahead, or those that a reader asks for."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ..errors import StorageError, shown
from ..files.digests import BLAKE3, FileDigest, new_hash
from .objects import PIECE, NoObjectError, Objects
from .stores import AT_ONCE


def pieces(objects: Objects, name: str, size: int) -> Iterator[bytes]:
    """All bytes of an object of that size in order; raises as `Objects.range` does."""
    waiting = deque[Future[bytes]]()
    with ThreadPoolExecutor(AT_ONCE, "read ahead") as pool:
        for start in range(0, size, PIECE):
            end = min(start + PIECE, size)
            waiting.append(pool.submit(objects.range, name, start, end))
            if len(waiting) == AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def digest(objects: Objects, name: str, size: int) -> FileDigest:
    """Of an object's bytes, all of which are read; raises as `Objects.range` does."""
    hash = new_hash()
    for piece in pieces(objects, name, size):
        hash.update(piece)
    return FileDigest(size, f"{BLAKE3}:{hash.hexdigest()}")


class Ranges(io.RawIOBase):
    """An object of a known size, as a file that asks for the ranges that are read."""

    def __init__(self, objects: Objects, name: str, size: int) -> None:
        self._objects, self._name, self._size = objects, name, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"no position of a file: {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(self._size - self._position, 0))
        if count:
            start = self._position
            try:
                buffer[:count] = self._objects.range(self._name, start, start + count)
            except NoObjectError as error:
                raise StorageError(f"{shown(self._name)} was deleted while it was read") from error
            self._position += count
        return count
