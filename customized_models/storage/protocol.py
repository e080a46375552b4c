"""What a registry asks of a place that keeps its bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from ..errors import InvalidNameError, shown

_KEY = re.compile(r"[a-z]+/[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)


class Storage(Protocol):
    """Directories under keys such as `customized/<name>`, whose weights never change.

    To add one, write these seven methods and run `customized_models.testing.StorageContract`
    against them. Jobs run in processes of their own, so a storage must pickle to one that sees
    the same keys.

    Every method may raise `StorageError` where the disk or the server fails; its
    `outcome_unknown` says whether the change may have been made all the same.
    """

    def staging(self, name: str) -> AbstractContextManager[Path]:
        """A private directory to write into, on the side that `publish` can take it from.

        Removed at the end unless published. After a kill the same name finds what it held, until
        the storage sweeps it after a week or more. Workers that share a save look for each other's
        by name, and work together if what they find is the same directory.
        """

    def publish(self, directory: Path, key: str) -> None:
        """Make a staged directory visible under `key`, durably, all of it or nothing.

        Raises:
            AlreadyExistsError: The key is taken, even by a concurrent publisher.
        """

    def checkout(self, key: str) -> AbstractContextManager[Path]:
        """The directory as local read-only files while the block lasts; they may be gone after it.

        Raises:
            NotFoundError: Nothing is stored under the key.
        """

    def open(self, key: str, file: str) -> BinaryIO:
        """One file of a stored directory, seekable; `file` is its path there, with `/`.

        Raises:
            NotFoundError: No such key or file.
        """

    def rewrite(self, key: str, file: str, data: bytes) -> None:
        """Replace one small file of a stored directory, durably, all of it or nothing.

        For a model's card, to which evaluations are added. Whoever has checked the directory out
        may see the old file or the new one.

        Raises:
            NotFoundError: No such key or file.
        """

    def delete(self, key: str) -> None:
        """Remove the key; no error if absent. A kill in between leaves it whole or gone."""

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The keys that start with `prefix`, sorted."""


def checked_key(key: str) -> str:
    """`key` if it is a kind, a slash and a name.

    Raises:
        InvalidNameError: It is not.
    """
    if not _KEY.fullmatch(key):
        raise InvalidNameError(f"not a key: {shown(key)}")
    return key


def is_key(key: str) -> bool:
    """Whether `checked_key` would take it."""
    return _KEY.fullmatch(key) is not None
