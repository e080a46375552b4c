"""What files hold, and whether it is what was recorded, each of them read once."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from attrs import frozen

from ..errors import CustomizedModelsError, listed
from ..models import Progress
from .digests import NO_HASH, FileDigest
from .kept import kept_in_memory
from .streams import FileReader, parallel_files, reading

_REPORT_SECONDS = 0.2  # between two reports


@frozen
class Identity:
    """By what a file is taken for one that was not touched since.

    Attributes:
        size: In bytes.
        mtime_ns: Of its last change.
        inode: Its number in the file system.
    """

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """That of a file of which the system says this."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@frozen
class Found:
    """What a file held when it was read, and by what it is known again."""

    digest: FileDigest
    identity: Identity


@contextmanager
def hashing(
    directory: Path, algorithms: Mapping[str, str], threads: int
) -> Iterator[Callable[[Callable[[int], None]], dict[str, Found]]]:
    """Hash files in threads of their own, while the block does something else.

    Args:
        directory: Where the files are.
        algorithms: By which algorithm to hash each file.
        threads: How many files to read side by side.

    Yields:
        What waits until all are hashed, and returns what they hold. It is called with a function
        that it tells now and then how many bytes have been hashed.

    Raises:
        MalformedError: One is missing.
        StorageError: One cannot be read.
    """
    readers, stopped = set[FileReader](), Event()

    def hash_one(name: str) -> Found:
        with reading(directory / name, algorithms[name]) as reader:
            readers.add(reader)
            while reader.skim():
                if stopped.is_set():
                    raise CancelledError
            return Found(reader.finish(), Identity.of(reader.status))

    with ThreadPoolExecutor(threads) as pool:
        futures = {name: pool.submit(hash_one, name) for name in algorithms}

        def finish(told: Callable[[int], None]) -> dict[str, Found]:
            while wait(futures.values(), timeout=_REPORT_SECONDS).not_done:
                told(sum(reader.position for reader in [*readers]))
            return {name: future.result() for name, future in futures.items()}

        try:
            yield finish
        finally:
            stopped.set()


class FileCheck:
    """Compares files with their recorded digests: while others read them, or afterwards.

    Any thread may read. A file that was touched after it was read does not pass.
    """

    def __init__(
        self,
        directory: Path,
        expected: Mapping[str, FileDigest],
        refuse: Callable[[Collection[str]], CustomizedModelsError],
    ) -> None:
        """Begin a check.

        Args:
            directory: Where the files are.
            expected: What each of them must hold.
            refuse: Gives the error for files, by name, that hold anything else.
        """
        self._directory, self._expected, self._refuse = directory, expected, refuse
        self._passed: dict[str, Identity] = {}

    @classmethod
    def of_nothing(cls, directory: Path) -> FileCheck:
        """A check that every file passes."""
        return cls(directory, {}, lambda names: CustomizedModelsError(listed(names)))

    @contextmanager
    def from_memory(self, progress: Progress) -> Iterator[tuple[Path, FileCheck]]:
        """The files as this host keeps them in memory, for all that read them at about one time.

        They are read and compared once, by whoever comes first, and cannot change. Where the host
        does not keep them, these are the files as they are, and this check.

        Args:
            progress: Told how many bytes have been read; raises to stop.
        """
        with kept_in_memory(self._directory, self._expected, progress) as kept:
            yield (kept, FileCheck.of_nothing(kept)) if kept else (self._directory, self)

    def only(self, names: Collection[str]) -> FileCheck:
        """A check of these files alone."""
        expected = {name: self._expected[name] for name in names}
        return FileCheck(self._directory, expected, self._refuse)

    @contextmanager
    def reading(self, name: str) -> Iterator[FileReader]:
        """Read a file front to back for another end; it is compared when the block is left.

        A file of which nothing is recorded is not compared.

        Raises:
            CustomizedModelsError: Of `refuse`: it holds something else.
            MalformedError: It is missing, or ends too early.
            StorageError: It cannot be read.
        """
        expected = self._expected.get(name)
        algorithm = expected.algorithm if expected else NO_HASH
        with reading(self._directory / name, algorithm) as reader:
            yield reader
            self._compare({name: Found(reader.finish(), Identity.of(reader.status))})

    def finish(self, progress: Progress, *, but: Collection[str] = ()) -> None:
        """Read what nobody has read, and see that no file was touched since.

        Args:
            progress: Told how many bytes have been read.
            but: Files that need not be read, because others compare them.

        Raises: as `reading`.
        """
        with self.beside(parallel_files(), but=but) as finish:
            finish(progress)

    def compared(self) -> frozenset[str]:
        """The files that have been compared so far.

        Raises:
            CustomizedModelsError: Of `refuse`: one was touched since.
        """
        self._refuse_touched()
        return frozenset(self._passed)

    @contextmanager
    def beside(
        self, threads: int = 1, *, but: Collection[str] = ()
    ) -> Iterator[Callable[[Progress], None]]:
        """Read all that nobody has read yet, in threads of their own, while the block goes on.

        Args:
            threads: How many files to read side by side.
            but: As for `finish`.

        Yields:
            What the block calls once it has read all; it waits and raises as `finish` does.
        """
        done = {*self._passed, *but}
        rest = {n: d.algorithm for n, d in self._expected.items() if n not in done}
        total = sum(self._expected[name].size for name in rest)
        with hashing(self._directory, rest, threads) as wait_for_all:

            def finish(progress: Progress) -> None:
                phase = "comparing files with their digests"
                self._compare(wait_for_all(lambda done: progress(phase, min(done, total), total)))
                self._refuse_touched()

            yield finish

    def _compare(self, found: Mapping[str, Found]) -> None:
        differ = {n for n, one in found.items() if self._expected.get(n, one.digest) != one.digest}
        if differ:
            raise self._refuse(differ)
        self._passed.update((name, one.identity) for name, one in found.items())

    def _refuse_touched(self) -> None:
        paths = {name: self._directory / name for name in self._passed}
        if touched := {n for n, was in self._passed.items() if _identity_now(paths[n]) != was}:
            raise self._refuse(touched)


def _identity_now(path: Path) -> Identity | None:
    return Identity.of(path.stat()) if path.is_file() else None
