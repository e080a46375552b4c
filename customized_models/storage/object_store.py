"""`FsspecStorage`: keys in an object store, read through a cache of this host.

    keys/<key>                             the marker: a key is stored if, and only if, it is there
    files/<key>/<upload>/<file>            what a marker of that upload names
    pending/<upload>                       while that upload is made or removed; `Pending`

A directory is uploaded under a name that nobody else has, read back, and becomes visible by one
put of its marker that replaces none. It is removed the other way round: its marker first.
"""

from __future__ import annotations

import io
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from attrs import evolve

from .. import arguments
from ..errors import AlreadyExistsError, IntegrityError, NotFoundError, StorageError, shown
from ..files.digests import digest_of_bytes, hash_file
from ..files.streams import FileWriter
from .local import STAGING_GRACE, LocalStorage
from .markers import Marker, Pending, StoredFile, parsed, to_bytes
from .objects import NoObjectError, Objects
from .protocol import checked_key, is_key
from .read_cache import Fetched, ReadCache

T = TypeVar("T")

CACHE_BYTES = 100 * 10**9  # a model of 8 billion parameters and its base have about 32
_SMALL = 8 << 20  # bytes: a file of so many is read at once, and its digest compared
_BUFFER = 1 << 20  # bytes that a larger one is read ahead by: most headers are shorter
_CHANGES = 8  # times that others may change a key under a call, before something else is wrong


class FsspecStorage:
    """Keeps each key as objects below a URL, such as `s3://bucket/prefix`.

    Every byte is compared with its digest after it was uploaded and when it is downloaded.
    """

    def __init__(
        self,
        url: str,
        *,
        options: Mapping[str, Any] | None = None,
        local: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Nothing is connected to yet.

        Args:
            url: Of an object store, `s3://`, `gs://`, `az://` or `hf://`: a bucket that exists,
                and a prefix that is this registry's alone.
            options: What the store's fsspec filesystem takes, such as `endpoint_url`. They are
                pickled with jobs, so keys had better come from the environment.
            local: A directory of this host, for what is about to be published and for what was
                read. `customized-models/storage` in $XDG_CACHE_HOME or ~/.cache if None.
            cache_bytes: How much of what was read is kept there. What is checked out stays, even
                beyond it.

        Raises:
            InvalidOptionError: It is no such URL.
            MissingDependencyError: The store's package is not installed.
        """
        self.url = arguments.text("url", url)
        self._objects = Objects(self.url, arguments.mapping("options", options or {}))
        self._local = None if local is None else arguments.path("local", local).absolute()
        self._cache_bytes = arguments.whole("cache_bytes", cache_bytes)

    def __repr__(self) -> str:
        return f"FsspecStorage({self.url!r})"

    @property
    def local(self) -> Path:
        """The directory of this host that it writes to."""
        if self._local is not None:
            return self._local
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache).absolute() / "customized-models" / "storage"

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """See `Storage.staging`: a directory of this host.

        What others have begun to upload or remove, and left for a week, is removed on the way.
        """
        self._sweep()
        with LocalStorage(self.local).staging(name) as directory:
            yield directory

    def publish(self, directory: Path, key: str) -> None:
        """See `Storage.publish`."""
        if self._exists(key):
            raise AlreadyExistsError(f"{shown(key)} already exists")
        upload, begun = uuid.uuid4().hex, time.time()
        self._objects.write(f"pending/{upload}", to_bytes(Pending(key, begun)))
        try:
            files = {
                path.relative_to(directory).as_posix(): self._upload(path, directory, key, upload)
                for path in sorted(directory.rglob("*"))
                if path.is_file()
            }
            if time.time() - begun > STAGING_GRACE / 2:
                raise StorageError(f"{shown(key)} took days to upload, and may have been swept")
        except Exception:
            self._discard(key, upload)
            raise
        try:
            self._make_visible(key, Marker(upload, files))
        except AlreadyExistsError:  # of any other failure the sweep finds out what became
            self._discard(key, upload)
            raise
        with suppress(StorageError):  # it is published all the same
            self._objects.remove(f"pending/{upload}")

    def _upload(self, path: Path, directory: Path, key: str, upload: str) -> StoredFile:
        """Upload one file, read it back, and compare."""
        name = path.relative_to(directory).as_posix()
        expected, stored = hash_file(path), f"files/{key}/{upload}/{name}"
        for _ in range(2):  # what was damaged on one of the two ways is sent again, once
            self._objects.upload(path, stored)
            with suppress(NoObjectError):
                if self._objects.digest(stored, expected.size) == expected:
                    return StoredFile(name, expected.size, expected.digest)
        raise StorageError(f"{shown(name)} of {shown(key)} is not in the store as it was sent")

    def _make_visible(self, key: str, marker: Marker) -> None:
        """Put the marker; whose it is then decides, whatever the answer was, or if it was lost."""
        failed: StorageError | None = None
        try:
            self._objects.create(f"keys/{key}", to_bytes(marker))
        except FileExistsError:
            pass
        except StorageError as error:
            failed = error
        try:
            winner = self._marker(key).upload
        except (NotFoundError, IntegrityError, StorageError) as error:
            why = failed or error
            raise StorageError(f"{shown(key)} may not be published: {why}", True) from why
        if winner != marker.upload:
            raise AlreadyExistsError(f"{shown(key)} already exists")

    @contextmanager
    def checkout(self, key: str) -> Iterator[Path]:
        """See `Storage.checkout`: fetched into the cache of this host, or found there.

        Raises:
            IntegrityError: A file does not have the bytes that were published.
        """
        cache = ReadCache(self.local / "cache", self._cache_bytes)
        with ExitStack() as stack:

            def hold(marker: Marker) -> Path:
                def fetch(path: str, target: Path) -> None:
                    self._fetch(key, marker, path, target)

                files = {
                    path: Fetched(file.size, file.digest, file.object == path)
                    for path, file in marker.files.items()
                }
                return stack.enter_context(cache.holding(marker.upload, files, fetch))

            yield self._with_marker(key, hold)

    def _fetch(self, key: str, marker: Marker, path: str, target: Path) -> None:
        file, name = marker.files[path], _object(key, marker, path)
        for _ in range(2):  # what was damaged on the way is asked for again, once
            target.unlink(missing_ok=True)
            with FileWriter(target) as writer:
                for piece in self._objects.pieces(name, file.size):
                    writer.write(piece)
                if writer.finish().digest == file.digest:
                    return
        raise IntegrityError(f"{shown(path)} of {shown(key)} is not what was published")

    def open(self, key: str, file: str) -> BinaryIO:
        """See `Storage.open`: a small file is read whole and proven, of a larger one ranges."""

        def opened(marker: Marker) -> BinaryIO:
            if file not in marker.files:
                raise NotFoundError(f"{shown(key)} has no file {shown(file)}")
            stored, name = marker.files[file], _object(key, marker, file)
            if stored.size > _SMALL:
                ranges = self._objects.ranges(name, stored.size)
                return cast(BinaryIO, io.BufferedReader(ranges, _BUFFER))

            def proven(data: bytes) -> bytes:
                if digest_of_bytes(data) != stored.digest:
                    raise IntegrityError(f"{shown(file)} of {shown(key)} is damaged")
                return data

            return io.BytesIO(self._objects.read(name, proven) if stored.size else b"")

        return self._with_marker(key, opened)

    def rewrite(self, key: str, file: str, data: bytes) -> None:
        """See `Storage.rewrite`: another object, and a marker that names it in place of the old.

        On S3 the marker is replaced only if nobody has changed it meanwhile. Other stores have the
        last of several markers; a registry keeps others from deleting what it changes.
        """
        new = StoredFile(f".rewritten/{uuid.uuid4().hex}/{file}", len(data), digest_of_bytes(data))
        for _ in range(_CHANGES):
            try:
                version = self._objects.version(f"keys/{checked_key(key)}")
            except NoObjectError:
                raise NotFoundError(f"nothing is stored under {shown(key)}") from None
            marker = self._marker(key)
            if file not in marker.files:
                raise NotFoundError(f"{shown(key)} has no file {shown(file)}")
            changed = evolve(marker, files={**marker.files, file: new})
            self._objects.write(_object(key, changed, file), data)
            if self._replace(key, changed, file, version):
                with suppress(StorageError):  # the key's deletion removes it as well
                    self._objects.remove(_object(key, marker, file))
                return
        raise StorageError(f"{shown(file)} of {shown(key)} is replaced by others all the time")

    def _replace(self, key: str, marker: Marker, file: str, version: Any) -> bool:
        """Put a changed marker; whether it is the one that counts, whatever the answer was."""
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
            made = self._marker(key).files.get(file) == marker.files[file]
        except (NotFoundError, IntegrityError, StorageError):
            made = False
        if failed is not None and not made:
            what = f"{shown(file)} of {shown(key)} may not be replaced"
            raise StorageError(f"{what}: {failed}", True) from failed
        if not made:
            with suppress(StorageError):
                self._objects.remove(_object(key, marker, file))
        return made

    def delete(self, key: str) -> None:
        """See `Storage.delete`: the marker first; what fails after that is left to the sweep."""
        known = None
        try:
            known = self._marker(key).upload
            uploads = {known}
        except NotFoundError:
            return
        except IntegrityError:  # whose it was cannot be told, and one of them may just be made
            names = self._objects.names(f"files/{key}")
            uploads = {name.removeprefix(f"files/{key}/").partition("/")[0] for name in names}
        for upload in uploads:
            self._objects.write(f"pending/{upload}", to_bytes(Pending(key, time.time())))
        self._objects.remove(f"keys/{key}")
        if known is not None:
            self._discard(key, known)

    def keys(self, prefix: str = "") -> Iterator[str]:
        """See `Storage.keys`."""
        kind, slash, _ = prefix.partition("/")
        names = self._objects.names(f"keys/{kind}" if slash else "keys")
        every = (name.removeprefix("keys/") for name in names)
        return iter(sorted(key for key in every if key.startswith(prefix) and is_key(key)))

    # Markers, and what has none

    def _marker(self, key: str) -> Marker:
        try:
            return self._objects.read(f"keys/{checked_key(key)}", _parsed_marker)
        except NoObjectError:
            raise NotFoundError(f"nothing is stored under {shown(key)}") from None

    def _exists(self, key: str) -> bool:
        try:
            self._marker(key)
        except NotFoundError:
            return False
        except IntegrityError:
            return True  # damaged, but there until it is deleted
        return True

    def _with_marker(self, key: str, use: Callable[[Marker], T]) -> T:
        """What `use` makes of the marker, read again if an object was replaced or removed."""
        for _ in range(_CHANGES):
            try:
                return use(self._marker(key))
            except NoObjectError as error:
                missing = error
        raise IntegrityError(f"the store has lost a file of {shown(key)}") from missing

    def _discard(self, key: str, upload: str) -> None:
        """Remove an upload that no marker names; what fails now is swept later."""
        with suppress(StorageError):
            self._objects.remove_all(f"files/{key}/{upload}")
            self._objects.remove(f"pending/{upload}")

    def _sweep(self) -> None:
        """Remove uploads that were left without a marker a week ago; later, if that fails now."""
        with suppress(StorageError, IntegrityError):
            for name in self._objects.names("pending"):
                try:
                    left = self._objects.read(name, _parsed_pending)
                except NoObjectError:
                    continue  # its owner finished meanwhile
                if left.since < time.time() - STAGING_GRACE:
                    self._settle(left.key, name.removeprefix("pending/"))

    def _settle(self, key: str, upload: str) -> None:
        """End what is pending of an upload: it has its marker, or goes."""
        with suppress(NotFoundError):
            if self._marker(key).upload == upload:
                self._objects.remove(f"pending/{upload}")
                return
        self._discard(key, upload)


def _object(key: str, marker: Marker, file: str) -> str:
    return f"files/{key}/{marker.upload}/{marker.files[file].object}"


def _parsed_marker(data: bytes) -> Marker:
    return parsed(Marker, data)


def _parsed_pending(data: bytes) -> Pending:
    return parsed(Pending, data)
