"""The keys of an object store: each has one small object, its marker, and is there with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import AlreadyExistsError, IntegrityError, NotFoundError, StorageError, shown
from .markers import Marker, parsed, to_bytes
from .objects import NoObjectError, Objects
from .protocol import checked_key, is_key

T = TypeVar("T")

CHANGES = 8  # times that others may change a key under a call, before something else is wrong


class Keys:
    """Keys, and what their markers say.

    Every method may raise `StorageError`. Where it says so by `outcome_unknown`, an answer was lost
    and what became of the request could not be found out.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def marker(self, key: str) -> Marker:
        """What is stored under a key.

        Raises:
            NotFoundError: Nothing is.
            IntegrityError: It is damaged.
        """
        try:
            return self._objects.read(f"keys/{checked_key(key)}", _parsed)
        except NoObjectError:
            raise NotFoundError(f"nothing is stored under {shown(key)}") from None

    def taken(self, key: str) -> bool:
        """Whether something is stored under a key, be it damaged: until it is deleted."""
        try:
            self.marker(key)
        except NotFoundError:
            return False
        except IntegrityError:
            return True
        return True

    def names(self, prefix: str) -> list[str]:
        """The keys that start with `prefix`, sorted."""
        kind, slash, _ = prefix.partition("/")
        names = self._objects.names(f"keys/{kind}" if slash else "keys")
        every = (name.removeprefix("keys/") for name in names)
        return sorted(key for key in every if key.startswith(prefix) and is_key(key))

    def with_marker(self, key: str, use: Callable[[Marker], T]) -> T:
        """What `use` makes of the marker, read again if an object was replaced or removed."""
        for _ in range(CHANGES):
            try:
                return use(self.marker(key))
            except NoObjectError as error:
                missing = error
        raise IntegrityError(f"the store has lost a file of {shown(key)}") from missing

    def create(self, key: str, marker: Marker) -> None:
        """Put a marker; whose it is then decides, whatever the answer was, or if it was lost.

        Raises:
            AlreadyExistsError: It is another's.
        """
        failed: StorageError | None = None
        try:
            self._objects.create(f"keys/{key}", to_bytes(marker))
        except FileExistsError:
            pass
        except StorageError as error:
            failed = error
        try:
            winner = self.marker(key).upload
        except (NotFoundError, IntegrityError, StorageError) as error:
            why = failed or error
            raise StorageError(f"{shown(key)} may not be published: {why}", True) from why
        if winner != marker.upload:
            raise AlreadyExistsError(f"{shown(key)} already exists")

    def version(self, key: str) -> Any:
        """The version of a marker, for `replace`; None where the store tells none.

        Raises:
            NotFoundError: Nothing is stored under the key.
        """
        try:
            return self._objects.version(f"keys/{checked_key(key)}")
        except NoObjectError:
            raise NotFoundError(f"nothing is stored under {shown(key)}") from None

    def replace(self, key: str, marker: Marker, file: str, version: Any) -> bool:
        """Put a marker that has another `file`; whether it counts, whatever the answer was."""
        failed: StorageError | None = None
        try:
            self._objects.replace(f"keys/{key}", to_bytes(marker), version)
        except (FileExistsError, NoObjectError):
            pass
        except StorageError as error:
            failed = error
        else:
            return True
        try:
            made = self.marker(key).files.get(file) == marker.files[file]
        except (NotFoundError, IntegrityError, StorageError):
            made = False
        if failed is not None and not made:
            what = f"{shown(file)} of {shown(key)} may not be replaced"
            raise StorageError(f"{what}: {failed}", True) from failed
        return made

    def remove(self, key: str) -> None:
        """Remove a marker; no error if absent."""
        self._objects.remove(f"keys/{key}")


def _parsed(data: bytes) -> Marker:
    return parsed(Marker, data)
