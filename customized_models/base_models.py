"""A base model where it lies: which of its files count, their digests, and whether they changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TypeAlias

from attrs import frozen

from .errors import (
    BaseModelMismatch,
    BaseModelMissingError,
    CustomizedModelsError,
    StorageError,
    UnsafeFileError,
    listed,
    shown,
)
from .files.digests import FileDigest, digest_of, hash_file, new_hash
from .files.documents import to_document
from .files.model_directory import CARRIED, files_of
from .files.reading import opened
from .files.safetensors import INDEX, Checkpoint
from .models import Progress

_PIECE = 16 << 20  # bytes: while others import, each look at the interpreter's lock takes 5 ms
_REPORT_SECONDS = 0.2  # between two calls of `progress`

_Seen: TypeAlias = "tuple[int, int, int]"


@frozen
class KnownFile:
    """A file's digest, and by what we see that it has not been touched since."""

    content: FileDigest
    mtime_ns: int
    inode: int


@frozen
class Location:
    """Where a base model lies on this host, and what its files were when they were hashed."""

    path: str
    files: Mapping[str, KnownFile]

    @property
    def digest(self) -> str:
        """`blake3:` over the names, sizes and digests of the content files."""
        return digest_of(to_document(self.digests))

    @property
    def digests(self) -> dict[str, FileDigest]:
        """Size and digest of each content file."""
        return {name: file.content for name, file in self.files.items()}

    def refuse_changed(self, names: Collection[str]) -> CustomizedModelsError:
        """The error that says that these of its files have other bytes now."""
        return BaseModelMismatch(
            f"the base model at {shown(self.path)} is not the one that was added: "
            f"{listed(names)} changed"
        )


def hash_base_model(directory: Path, progress: Progress) -> Location:
    """Hash the content files of the base model in `directory`.

    Links are followed only inside a Hub cache, from its snapshots to its blobs.

    Raises:
        BaseModelMissingError: No such directory.
        BaseModelMismatch: A file changes meanwhile.
        MalformedError: It holds no readable checkpoint.
        UnsafeFileError: A link leads elsewhere.
        StorageError: A file cannot be read.
    """
    if not directory.is_dir():
        raise BaseModelMissingError(f"no directory {shown(directory)}")
    directory = directory.resolve()
    names = [*Checkpoint.open(directory).shards, *files_of(directory, *CARRIED)]
    if (directory / INDEX).is_file():
        names.append(INDEX)
    for name in names:
        refuse_stray_link(directory, name)
    total = sum((directory / name).stat().st_size for name in names)
    files: dict[str, KnownFile] = {}
    for name in sorted(names):
        progress("hashing the base model", sum(f.content.size for f in files.values()), total)
        files[name] = _known(directory / name)
    return Location(str(directory), files)


def verified_path(location: Location) -> Path:
    """The base's directory, once its files are seen to be those that were hashed.

    Files whose size, time and inode are as recorded count as unchanged; others are hashed again.

    Raises:
        BaseModelMissingError: The directory or a file is gone.
        BaseModelMismatch: Other bytes lie there.
    """
    directory, different = Path(location.path), set()
    for name, known in location.files.items():
        try:
            status = (directory / name).stat()
        except OSError as error:
            raise BaseModelMissingError(
                f"the base model has no file {shown(directory / name)} any more; "
                f"name its new place with relocate_base_model"
            ) from error
        touched = _seen(status) != (known.content.size, known.mtime_ns, known.inode)
        if touched and _known(directory / name).content != known.content:
            different.add(name)
    if different:
        raise location.refuse_changed(different)
    return directory


@contextmanager
def hash_concurrently(
    directory: Path,
    expected: Mapping[str, FileDigest],
    refused: Callable[[Collection[str]], CustomizedModelsError],
) -> Iterator[Callable[[Progress], None]]:
    """Hash files in a thread of their own, while the block reads them for another end.

    Args:
        directory: Where the files lie.
        expected: What each must be.
        refused: The error for files that are something else.

    Yields:
        What the block calls once it has read all. It waits until all is hashed, and raises what
        `refused` gives if any file is not what is expected, or was changed meanwhile;
        `MalformedError` if a file is gone.
    """
    stopped, done = Event(), 0
    total = sum(digest.size for digest in expected.values())

    def hash_all() -> dict[str, _Seen]:
        nonlocal done
        seen, buffer = {}, memoryview(bytearray(_PIECE))
        for name, digest in expected.items():
            hash, size = new_hash(digest.algorithm), 0
            with opened(directory / name) as fd:
                seen[name] = _seen(os.fstat(fd))
                while not stopped.is_set() and (count := os.readv(fd, [buffer])):
                    hash.update(buffer[:count])
                    size += count
                    done += count
            found = FileDigest(size, f"{digest.algorithm}:{hash.hexdigest()}")
            if found != digest and not stopped.is_set():
                raise refused({name})
        return seen

    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(hash_all)

        def finish(progress: Progress) -> None:
            while not wait([hashing], timeout=_REPORT_SECONDS).done:
                progress("hashing what was read", done, total)
            try:
                seen = hashing.result()
            except OSError as error:
                if isinstance(error, CustomizedModelsError):
                    raise
                raise StorageError(f"a file cannot be read: {error.strerror}") from error
            if changed := {n for n in seen if seen[n] != _seen_now(directory / n)}:
                raise refused(changed)

        try:
            yield finish
        finally:
            stopped.set()


def _seen(status: os.stat_result) -> _Seen:
    """By what a file is taken for one that was not touched since."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def _seen_now(path: Path) -> _Seen | None:
    return _seen(path.stat()) if path.is_file() else None


def _known(path: Path) -> KnownFile:
    before = path.stat()
    digest = hash_file(path)
    after = path.stat()
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, digest.size):
        raise BaseModelMismatch(f"{shown(path.name)} changed while it was read")
    return KnownFile(digest, after.st_mtime_ns, after.st_ino)


def refuse_stray_link(directory: Path, name: str) -> None:
    """A snapshot's links go to `<repository>/blobs`, or on to the cache's shared `blobs`.

    Raises:
        UnsafeFileError: A link leads elsewhere.
    """
    path = directory / name
    if not path.is_symlink():
        return
    repository = directory.parent.parent
    target = path.resolve()
    blobs = (repository / "blobs", repository.parent / "blobs")
    if directory.parent.name != "snapshots" or not any(target.is_relative_to(b) for b in blobs):
        raise UnsafeFileError(f"{shown(name)} links out of the model's directory or Hub cache")


def same_path(stated: object, location: str) -> bool:
    """Whether a path that a training wrote down leads to `location`."""
    return isinstance(stated, str) and bool(stated) and os.path.realpath(stated) == location
