"""A base model's directory: its content files, their digests, and whether they have changed."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from attrs import frozen

from .errors import (
    BaseModelMismatch,
    BaseModelMissingError,
    CustomizedModelsError,
    UnsupportedBaseError,
    listed,
    shown,
)
from .files.checking import Found, Identity, hashing
from .files.digests import BLAKE3, FileDigest, digest_of, hash_file
from .files.documents import to_document
from .files.links import linked_file
from .files.model_directory import Role, carried_files, checked_size, files_of, role_of
from .files.reading import opened
from .files.safetensors import INDEX, Checkpoint
from .files.streams import parallel_files
from .models import Progress


@frozen
class KnownFile:
    """A file's digest, and the modification time and inode that it had when it was hashed."""

    content: FileDigest
    mtime_ns: int
    inode: int

    @property
    def identity(self) -> Identity:
        """Its size, modification time and inode when it was hashed."""
        return Identity(self.content.size, self.mtime_ns, self.inode)


@frozen
class Location:
    """A base model's directory on this host, and its content files as they were hashed.

    Attributes:
        path: The resolved path.
        files: Its content files by name.
    """

    path: str
    files: Mapping[str, KnownFile]

    @property
    def digest(self) -> str:
        """BLAKE3 of the names, sizes and digests of the content files, as `blake3:...`."""
        return digest_of(to_document(self.digests))

    @property
    def digests(self) -> dict[str, FileDigest]:
        """Size and digest of each content file, by name."""
        return {name: file.content for name, file in self.files.items()}

    def refuse_changed(self, names: Collection[str]) -> CustomizedModelsError:
        """The error for files whose bytes are not those that were hashed."""
        return BaseModelMismatch(
            f"the base model at {shown(self.path)} is not the one that was added: "
            f"{listed(names)} changed"
        )


def hash_base_model(directory: Path, progress: Progress) -> Location:
    """Hash the content files of the base model in `directory`.

    Links are followed only to a Hub cache's blobs, and to files of the same name.

    Raises:
        BaseModelMissingError: There is no such directory.
        BaseModelMismatch: A file changed while it was read.
        MalformedError: The directory has no readable checkpoint.
        UnsafeFileError, UnsupportedBaseError: As `check_files`.
        StorageError: A file cannot be read.
    """
    if not directory.is_dir():
        raise BaseModelMissingError(f"there is no directory {shown(directory)}")
    directory = directory.resolve()
    weights = Checkpoint.open(directory)
    names = [*weights.shards, *check_files(directory, weights)]
    if (directory / INDEX).is_file():
        names.append(INDEX)
    for name in names:
        linked_file(directory, name, trusted=True)
    total = sum((directory / name).stat().st_size for name in names)
    algorithms = dict.fromkeys(sorted(names), BLAKE3)
    with hashing(directory, algorithms, parallel_files()) as finish:
        found = finish(lambda done: progress("hashing the base model", min(done, total), total))
    return Location(str(directory), {name: _known(directory / name, found[name]) for name in found})


def check_files(directory: Path, weights: Checkpoint) -> dict[str, Path]:
    """What is carried from a base model beside its weights, looked at before anything is read.

    Raises:
        MalformedError: A file is missing: a link leads nowhere.
        UnsafeFileError: A link leads elsewhere, or a file is not regular, or too large for what it
            is.
        UnsupportedBaseError: The directory has an adapter, which transformers would load as well.
        StorageError: The directory cannot be read.
    """
    if "adapter_config.json" in files_of(directory, Role.ADAPTER):
        raise UnsupportedBaseError(
            "the directory has an adapter_config.json: transformers would load that adapter with "
            "the model; move the adapter's files elsewhere, or merge it first"
        )
    files = carried_files(directory, weights.shards)
    for name in files:
        with opened(linked_file(directory, name, trusted=True)) as fd:
            if role_of(name) is not Role.UNKNOWN:  # of which nobody knows how large it may be
                checked_size(name, os.fstat(fd).st_size)
    return files


def verified_path(location: Location) -> Path:
    """The base model's directory, after a check that its files have not changed.

    Files with the recorded size, modification time and inode count as unchanged. Others are hashed
    again.

    Raises:
        BaseModelMissingError: The directory or a file is gone.
        BaseModelMismatch: A file has other bytes.
    """
    directory, different = Path(location.path), set()
    for name, known in location.files.items():
        try:
            status = (directory / name).stat()
        except OSError as error:
            raise BaseModelMissingError(
                f"the base model's file {shown(directory / name)} is gone; if its directory was "
                f"moved, set the new one with ModelRegistry.relocate_base_model"
            ) from error
        if Identity.of(status) == known.identity:
            continue
        if hash_file(directory / name, known.content.algorithm) != known.content:
            different.add(name)
    if different:
        raise location.refuse_changed(different)
    return directory


def _known(path: Path, found: Found) -> KnownFile:
    if Identity.of(path.stat()) != found.identity or found.identity.size != found.digest.size:
        raise BaseModelMismatch(f"{shown(path.name)} changed while it was read")
    return KnownFile(found.digest, found.identity.mtime_ns, found.identity.inode)


def same_path(stated: object, location: str) -> bool:
    """Whether the path that an adapter states leads to `location`."""
    try:
        return isinstance(stated, str) and bool(stated) and os.path.realpath(stated) == location
    except (OSError, ValueError):  # no file can have this path
        return False
