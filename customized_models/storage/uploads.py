"""Directories on their way into an object store, or out of it: no marker tells of them."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ..errors import IntegrityError, NotFoundError, StorageError, shown
from ..files.digests import digest_of, hash_file
from ..files.locks import lock
from ..files.writing import disk_errors
from .keys import Keys
from .local import STAGING_GRACE
from .markers import Marker, Pending, StoredFile, parsed, to_bytes
from .objects import NoObjectError, Objects
from .ranges import digest
from .stores import AT_ONCE


class Uploads:
    """Uploads, of which `pending/<upload>` tells as long as they may have no marker.

    What a process has begun to upload is noted in a directory of its host. If it is killed, or the
    store stays away, whoever publishes that key from that host goes on with it.
    """

    def __init__(self, objects: Objects, keys: Keys) -> None:
        self._objects, self._keys = objects, keys

    def send(self, directory: Path, key: str, notes: Path) -> Marker:
        """Upload a directory, read it back, and compare; what its marker is to say.

        Some files at once: of an adapter's, which are small, most of the time goes into answers.
        """
        with self._noted(key, notes) as upload:
            begun = time.time()
            names = [p.relative_to(directory) for p in sorted(directory.rglob("*")) if p.is_file()]
            send = partial(self._send, directory, f"files/{key}/{upload}")
            with ThreadPoolExecutor(AT_ONCE, "upload files") as pool:
                files = {file.object: file for file in pool.map(send, names)}
            if time.time() - begun > STAGING_GRACE / 2:
                raise StorageError(f"{shown(key)} took days to upload, and may have been swept")
        return Marker(upload, files)

    @contextmanager
    def _noted(self, key: str, notes: Path) -> Iterator[str]:
        """An upload that is the caller's alone; from the end of the block on it may have a marker.

        The note goes before that: what has a marker may be deleted, and is not for others to use.
        """
        note = notes / digest_of(self._objects.url(key)).partition(":")[2]
        with disk_errors(f"{shown(key)} cannot be uploaded"):
            note.mkdir(parents=True, exist_ok=True, mode=0o700)
            with lock(note, wait=False) as alone:  # or another publishes that key from here now
                upload = (alone and self._left(key, note)) or uuid.uuid4().hex
                self.expect(key, upload)
                if alone:
                    (note / upload).touch()
                yield upload
                if alone:
                    shutil.rmtree(note)

    def _left(self, key: str, note: Path) -> str | None:
        """The upload that a note is of, if it will not be swept while it is taken up."""
        for path in note.iterdir():
            with suppress(NoObjectError, IntegrityError):
                left = self._objects.read(f"pending/{path.name}", _parsed)
                if left.key == key and left.since > time.time() - STAGING_GRACE / 2:
                    return path.name
            path.unlink()
        return None

    def _send(self, directory: Path, place: str, path: Path) -> StoredFile:
        name, expected = path.as_posix(), hash_file(directory / path)
        for _ in range(3):  # one may find what was there, and one be damaged on one of the two ways
            self._objects.upload(directory / path, f"{place}/{name}")
            with suppress(NoObjectError):
                if digest(self._objects, f"{place}/{name}", expected.size) == expected:
                    return StoredFile(name, expected.size, expected.digest)
            self._objects.remove(f"{place}/{name}")
        raise StorageError(f"{shown(name)} is not in the store as it was sent: {shown(place)}")

    def expect(self, key: str, upload: str) -> None:
        """Say of an upload that it may have no marker, so that it goes after a week."""
        self._objects.write(f"pending/{upload}", to_bytes(Pending(key, time.time())))

    def settle(self, upload: str) -> None:
        """Say of an upload that it has its marker; the sweep finds that out if this fails."""
        with suppress(StorageError):
            self._objects.remove(f"pending/{upload}")

    def discard(self, key: str, upload: str) -> None:
        """Remove an upload that has no marker; what fails now is swept later."""
        with suppress(StorageError):
            self._objects.remove_all(f"files/{key}/{upload}")
            self._objects.remove(f"pending/{upload}")

    def of(self, key: str) -> set[str]:
        """The uploads for a key that have files, whether or not its marker is theirs."""
        names = self._objects.names(f"files/{key}")
        return {name.removeprefix(f"files/{key}/").partition("/")[0] for name in names}

    def sweep(self, notes: Path) -> None:
        """Remove what was left without a marker a week ago; later, if that fails now."""
        for note in notes.glob("*"):
            with suppress(OSError):
                if note.stat().st_mtime < time.time() - STAGING_GRACE:
                    with lock(note, wait=False) as alone:
                        if alone:
                            shutil.rmtree(note)
        with suppress(StorageError, IntegrityError):
            for name in self._objects.names("pending"):
                try:
                    left = self._objects.read(name, _parsed)
                except NoObjectError:
                    continue  # its owner finished meanwhile
                if left.since < time.time() - STAGING_GRACE:
                    self._sweep(left.key, name.removeprefix("pending/"))

    def _sweep(self, key: str, upload: str) -> None:
        with suppress(NotFoundError):
            if self._keys.marker(key).upload == upload:
                self.settle(upload)
                return
        self.discard(key, upload)


def _parsed(data: bytes) -> Pending:
    return parsed(Pending, data)
