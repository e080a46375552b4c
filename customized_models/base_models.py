"""A base model where it lies: which of its files count, their digests, and whether they changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TypeAlias

from attrs import frozen

from .errors import BaseModelMismatch, BaseModelMissingError, UnsafeFileError, listed, shown
from .files.manifest import digest_of, hash_file, to_document
from .files.safetensors import INDEX, Checkpoint, FileDigest, opened
from .models import Progress

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What a model directory has beside its weights that changes what the model does."""

_CHUNK = 16 << 20  # bytes: while others import, each look at the lock of the interpreter takes 5 ms
_PATIENCE = 0.2  # seconds between two calls of `progress`

_Seen: TypeAlias = "tuple[int, int, int]"


@frozen
class KnownFile:
    """A file's digest, and by what we see that it has not been touched since."""

    size: int
    sha256: str
    mtime_ns: int
    inode: int


@frozen
class Location:
    """Where a base model lies on this host, and what its files were when they were hashed."""

    path: str
    files: Mapping[str, KnownFile]

    @property
    def digest(self) -> str:
        """`sha256:` over the names, sizes and digests of the content files."""
        files = {name: FileDigest(file.size, file.sha256) for name, file in self.files.items()}
        return digest_of(to_document(files))


def small_files(directory: Path) -> dict[str, Path]:
    """The files of `SMALL_FILES` that `directory` has."""
    return {name: directory / name for name in SMALL_FILES if (directory / name).is_file()}


def locate(directory: Path, progress: Progress) -> Location:
    """Hash the content files of the base model in `directory`.

    Links are followed only inside a Hub cache, from its snapshots to its blobs.

    Raises:
        BaseModelMissingError: no such directory.
        MalformedError: it holds no readable checkpoint.
        UnsafeFileError: a link leads elsewhere.
    """
    if not directory.is_dir():
        raise BaseModelMissingError(f"no directory {shown(directory)}")
    directory = directory.resolve()
    names = [*Checkpoint.open(directory).shards, *small_files(directory)]
    if (directory / INDEX).is_file():
        names.append(INDEX)
    for name in names:
        refuse_stray_link(directory, name)
    total = sum((directory / name).stat().st_size for name in names)
    files: dict[str, KnownFile] = {}
    for name in sorted(names):
        progress("hashing the base model", sum(f.size for f in files.values()), total)
        files[name] = _known(directory / name)
    return Location(str(directory), files)


def unchanged(location: Location) -> Path:
    """The base's directory, once its files are seen to be those that were hashed.

    Files whose size, time and inode are as recorded count as unchanged; others are hashed again.

    Raises:
        BaseModelMissingError: the directory or a file is gone.
        BaseModelMismatch: other bytes lie there.
    """
    directory, different = Path(location.path), set()
    for name, known in location.files.items():
        try:
            status = (directory / name).stat()
        except FileNotFoundError as error:
            raise BaseModelMissingError(
                f"the base model has no file {shown(directory / name)} any more; "
                f"name its new place with relocate_base_model"
            ) from error
        if _seen(status) != (known.size, known.mtime_ns, known.inode):
            found = _known(directory / name)
            if (found.size, found.sha256) != (known.size, known.sha256):
                different.add(name)
    if different:
        raise _mismatch(directory, different)
    return directory


@contextmanager
def hashed_beside(location: Location) -> Iterator[Callable[[Progress], None]]:
    """Hash a base's files in a thread of their own, while the block reads them for another end.

    The block calls what it is given once it has read all: that waits until all is hashed, and
    raises `BaseModelMismatch` if any of it is not what was added, or was changed meanwhile, and
    `MalformedError` if a file is gone.
    """
    directory, stopped, done = Path(location.path), Event(), 0
    total = sum(known.size for known in location.files.values())

    def hash_all() -> dict[str, _Seen]:
        nonlocal done
        seen, buffer = {}, memoryview(bytearray(_CHUNK))
        for name, known in location.files.items():
            sha256 = hashlib.sha256()
            with opened(directory / name) as fd:
                seen[name] = _seen(os.fstat(fd))
                while not stopped.is_set() and (count := os.readv(fd, [buffer])):
                    sha256.update(buffer[:count])
                    done += count
            if sha256.hexdigest() != known.sha256 and not stopped.is_set():
                raise _mismatch(directory, {name})
        return seen

    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(hash_all)

        def finish(progress: Progress) -> None:
            while not wait([hashing], timeout=_PATIENCE).done:
                progress("hashing the base model", done, total)
            seen = hashing.result()
            if changed := {n for n in seen if seen[n] != _seen_now(directory / n)}:
                raise _mismatch(directory, changed)

        try:
            yield finish
        finally:
            stopped.set()


def _seen(status: os.stat_result) -> _Seen:
    """By what a file is taken for one that was not touched since."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def _seen_now(path: Path) -> _Seen | None:
    return _seen(path.stat()) if path.is_file() else None


def _mismatch(directory: Path, different: Collection[str]) -> BaseModelMismatch:
    return BaseModelMismatch(
        f"the base model at {shown(directory)} is not the one that was added: "
        f"{listed(different)} changed"
    )


def _known(path: Path) -> KnownFile:
    before = path.stat()
    digest = hash_file(path)
    after = path.stat()
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, digest.size):
        raise BaseModelMismatch(f"{shown(path.name)} changed while it was read")
    return KnownFile(digest.size, digest.sha256, after.st_mtime_ns, after.st_ino)


def refuse_stray_link(directory: Path, name: str) -> None:
    """A snapshot's links go to `<repository>/blobs`, or on to the cache's shared `blobs`."""
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
