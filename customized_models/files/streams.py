"""Large files read and written front to back, hashed on the way, past the page cache if possible.

A page cache that fills up is what makes writing slow: copying a gigabyte into it took 0.45 seconds
of a processor, and up to 2 more while the system searched for memory. Written directly to the disk
from aligned buffers it takes 0.10, leaves in memory what others have there, and leaves little to
be done by the `fsync` at the end. Where a file system refuses that, files are written as usual.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self

from ..errors import AlreadyExistsError, MalformedError, shown
from .digests import BLAKE3, FileDigest, new_hash
from .reading import opened, read_into, read_some
from .writing import disk_errors

BUFFER = 4 << 20
"""Bytes of each of a file's two buffers: enough that a write's time is in the disk."""

PUSHED = 64 << 20
"""Bytes after which a file is pushed to the disk while it goes on, not all of it at the end.

The disk has a cache too, so this is not of the page cache alone.
"""

DIRECT = getattr(os, "O_DIRECT", 0)
"""The flag of direct writes, where the system has it, as Linux does."""

_CHUNK = 1 << 20  # bytes read and hashed at once: they stay in a processor's cache
_ALIGNED = 4096  # bytes: what direct writes are multiples of; no disk in use has larger sectors


_MOST_FILES = 8  # side by side: more would only take more memory, for the disk is the limit then


def parallel_files() -> int:
    """How many files are read or written side by side: one for each processor, up to a limit."""
    known = hasattr(os, "sched_getaffinity")  # of those that this process may use
    return min(len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1, _MOST_FILES)


class Sink(Protocol):
    """What takes a stream of bytes."""

    def room(self) -> memoryview:
        """Memory for the next bytes, at least one; valid until `advance` is called."""

    def advance(self, count: int) -> None:
        """Take the first `count` bytes of `room`."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take some bytes."""

    def finish(self) -> FileDigest:
        """State that these are all bytes; returns their digest."""


class HashSink:
    """Takes bytes, and keeps nothing but their digest.

    It has two buffers: a thread of its own hashes one while the other fills. To be closed.
    """

    def __init__(self, algorithm: str = BLAKE3) -> None:
        self._algorithm = algorithm
        self._hash = new_hash(algorithm)
        self._size = 0
        self._buffers = [memoryview(mmap.mmap(-1, BUFFER)) for _ in range(2)]
        self._filled = 0
        self._thread = ThreadPoolExecutor(1, "put out")
        self._pending: Future[None] | None = None

    def room(self) -> memoryview:
        """See `Sink`."""
        return self._buffers[0][self._filled :]

    def advance(self, count: int) -> None:
        """See `Sink`."""
        self._filled += count
        self._size += count
        if self._filled == BUFFER:
            self._flush()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See `Sink`."""
        view = memoryview(data).cast("B")
        while view:
            room = self.room()
            count = min(len(room), len(view))
            room[:count] = view[:count]
            self.advance(count)
            view = view[count:]

    def finish(self) -> FileDigest:
        """See `Sink`."""
        if self._filled:
            self._flush()
        self._wait()
        return FileDigest(self._size, f"{self._algorithm}:{self._hash.hexdigest()}")

    def _flush(self) -> None:
        self._wait()
        self._pending = self._thread.submit(self._take, self._buffers[0], self._filled)
        self._buffers.reverse()
        self._filled = 0

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _take(self, buffer: memoryview, count: int) -> None:
        self._hash.update(buffer[:count])

    def close(self) -> None:
        """Wait for the thread; bytes that were not finished are lost."""
        self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileWriter(HashSink):
    """A new file, hashed while it is written; all of it is on the disk once `finish` returns.

    To be closed. A file that was not finished stays, cut short somewhere.
    """

    def __init__(self, path: Path, algorithm: str = BLAKE3) -> None:
        """Create the file.

        Raises:
            AlreadyExistsError: Something is there.
            StorageError: It cannot be created.
        """
        super().__init__(algorithm)
        self._path = path
        with self._errors():
            self._fd, self._direct = _create(path)
        self._pusher = ThreadPoolExecutor(1, "push to the disk")
        self._push: Future[None] | None = None
        self._unpushed = 0

    def finish(self) -> FileDigest:
        """See `Sink`; the file is on the disk.

        Raises:
            StorageError: The disk failed, or is full.
        """
        digest = super().finish()
        with self._errors():
            if self._push is not None:
                self._push.result()  # the system tells of a failed write once
            os.ftruncate(self._fd, digest.size)
            os.fsync(self._fd)
        if not self._direct and hasattr(os, "posix_fadvise"):
            # Whoever reads the file to prove it shall read the disk.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return digest

    def close(self) -> None:
        """See `HashSink`."""
        super().close()
        self._pusher.shutdown()
        os.close(self._fd)

    def _take(self, buffer: memoryview, count: int) -> None:
        super()._take(buffer, count)
        with self._errors():
            start = os.lseek(self._fd, 0, os.SEEK_CUR)
            try:
                # The last write is of whole sectors too; `finish` cuts the file off.
                self._write(buffer[: -(-count // _ALIGNED) * _ALIGNED if self._direct else count])
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._direct = False  # some file systems say so only now
                import fcntl  # Windows, where the package can be imported, has none

                flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~DIRECT)
                os.lseek(self._fd, start, os.SEEK_SET)  # some of the buffer may be written
                self._write(buffer[:count])
            self._unpushed += count
            if self._unpushed >= PUSHED and (self._push is None or self._push.done()):
                if self._push is not None:
                    self._push.result()
                self._unpushed = 0
                self._push = self._pusher.submit(os.fsync, self._fd)

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self._fd, view) :]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with disk_errors(f"{shown(self._path.name)} cannot be written"):
            yield


def _create(path: Path) -> tuple[int, bool]:
    """A descriptor of a new file, and whether it writes directly to the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        if DIRECT:
            try:
                return os.open(path, flags | DIRECT, 0o666), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                path.unlink(missing_ok=True)  # Linux creates the file before it refuses
        return os.open(path, flags, 0o666), False
    except FileExistsError as error:
        raise AlreadyExistsError(f"{shown(path.name)} already exists") from error


class FileReader:
    """A file read front to back, once, through a hash.

    Attributes:
        position: How many bytes have been read.
        status: What the system said of the file when it was opened.
    """

    def __init__(self, path: Path, fd: int, algorithm: str) -> None:
        """See `reading`."""
        self.position = 0
        self.status = os.fstat(fd)
        self._path, self._fd = path, fd
        self._algorithm = algorithm
        self._hash = new_hash(algorithm)
        self._skipped = memoryview(bytearray(_CHUNK))

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes.

        Raises:
            MalformedError: The file ends before.
            StorageError: It cannot be read.
        """
        while view:
            count = self._read_some(view[:_CHUNK])
            if not count:
                raise MalformedError(
                    f"{shown(self._path.name)} ends at byte {self.position}, too early"
                )
            view = view[count:]

    def copy_to(self, sink: Sink, count: int) -> None:
        """Give `sink` the next `count` bytes; raises as `read_into` does."""
        while count:
            room = sink.room()[: min(count, _CHUNK)]
            self.read_into(room)
            sink.advance(len(room))
            count -= len(room)

    def skip_to(self, position: int) -> None:
        """Read up to that byte; raises as `read_into` does."""
        while self.position < position:
            self.read_into(self._skipped[: min(_CHUNK, position - self.position)])

    def skim(self) -> bool:
        """Read some more, for its digest alone; returns whether there was any."""
        return self._read_some(self._skipped) > 0

    def finish(self) -> FileDigest:
        """Read the rest; returns the digest of the whole file."""
        while self.skim():
            pass
        return FileDigest(self.position, f"{self._algorithm}:{self._hash.hexdigest()}")

    def _read_some(self, view: memoryview) -> int:
        count = read_some(view, self._fd, self.position, shown(self._path.name))
        self._hash.update(view[:count])
        self.position += count
        return count


@contextmanager
def reading(path: Path, algorithm: str = BLAKE3) -> Iterator[FileReader]:
    """A file to be read front to back.

    Raises:
        MalformedError: There is no such file.
        UnsafeFileError: It is not a regular file.
    """
    with opened(path) as fd:
        yield FileReader(path, fd, algorithm)


def copy_range(fd: int, start: int, count: int, sink: Sink, what: str) -> None:
    """Give `sink` some bytes of an open file.

    Args:
        fd: The file's descriptor.
        start: The first byte.
        count: How many bytes.
        sink: What takes them.
        what: The name that a message has for the file.

    Raises:
        MalformedError: The file ends before.
        StorageError: It cannot be read.
    """
    while count:
        room = sink.room()[: min(count, _CHUNK)]
        read_into(room, fd, start, what)
        sink.advance(len(room))
        start += len(room)
        count -= len(room)


def copy_file(source: Path, target: Path) -> FileDigest:
    """Copy a file; the copy is on the disk.

    Raises:
        MalformedError: There is no such file.
        AlreadyExistsError: There is something at `target`.
        StorageError: A disk failed, or is full.
    """
    with reading(source) as reader, FileWriter(target) as writer:
        reader.copy_to(writer, reader.status.st_size)
        return writer.finish()
