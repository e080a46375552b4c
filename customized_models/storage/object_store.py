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
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from attrs import evolve

from .. import arguments
from ..errors import AlreadyExistsError, IntegrityError, NotFoundError, StorageError, shown
from ..files.digests import digest_of_bytes
from ..files.streams import FileWriter
from .keys import CHANGES, Keys
from .local import LocalStorage
from .markers import Marker, StoredFile
from .objects import Objects
from .ranges import Ranges, pieces
from .read_cache import Fetched, ReadCache
from .uploads import Uploads

CACHE_BYTES = 100 * 10**9  # a model of 8 billion parameters and its base have about 32
_SMALL = 8 << 20  # bytes: a file of so many is read at once, and its digest compared
_BUFFER = 1 << 20  # bytes that a larger one is read ahead by: most headers are shorter


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
        self._keys = Keys(self._objects)
        self._uploads = Uploads(self._objects, self._keys)
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
        self._uploads.sweep(self.local / "uploads")
        with LocalStorage(self.local).staging(name) as directory:
            yield directory

    def publish(self, directory: Path, key: str) -> None:
        """See `Storage.publish`."""
        if self._keys.taken(key):
            raise AlreadyExistsError(f"{shown(key)} already exists")
        marker = self._uploads.send(directory, key, self.local / "uploads")
        try:
            self._keys.create(key, marker)
        except AlreadyExistsError:  # of any other failure the sweep finds out what became
            self._uploads.discard(key, marker.upload)
            raise
        self._uploads.settle(marker.upload)

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

            yield self._keys.with_marker(key, hold)

    def _fetch(self, key: str, marker: Marker, path: str, target: Path) -> None:
        file, name = marker.files[path], _object(key, marker, path)
        for _ in range(2):  # what was damaged on the way is asked for again, once
            target.unlink(missing_ok=True)
            with FileWriter(target) as writer:
                for piece in pieces(self._objects, name, file.size):
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
                ranges = Ranges(self._objects, name, stored.size)
                return cast(BinaryIO, io.BufferedReader(ranges, _BUFFER))

            def proven(data: bytes) -> bytes:
                if digest_of_bytes(data) != stored.digest:
                    raise IntegrityError(f"{shown(file)} of {shown(key)} is damaged")
                return data

            return io.BytesIO(self._objects.read(name, proven) if stored.size else b"")

        return self._keys.with_marker(key, opened)

    def rewrite(self, key: str, file: str, data: bytes) -> None:
        """See `Storage.rewrite`: another object, and a marker that names it in place of the old.

        On S3 the marker is replaced only if nobody has changed it meanwhile. Other stores have the
        last of several markers; a registry keeps others from deleting what it changes.
        """
        new = StoredFile(f".rewritten/{uuid.uuid4().hex}/{file}", len(data), digest_of_bytes(data))
        for _ in range(CHANGES):
            version, marker = self._keys.version(key), self._keys.marker(key)
            if file not in marker.files:
                raise NotFoundError(f"{shown(key)} has no file {shown(file)}")
            changed = evolve(marker, files={**marker.files, file: new})
            self._objects.write(_object(key, changed, file), data)
            made = self._keys.replace(key, changed, file, version)
            with suppress(StorageError):  # the key's deletion removes it as well
                self._objects.remove(_object(key, marker if made else changed, file))
            if made:
                return
        raise StorageError(f"{shown(file)} of {shown(key)} is replaced by others all the time")

    def delete(self, key: str) -> None:
        """See `Storage.delete`: the marker first; what fails after that is left to the sweep."""
        known = None
        try:
            known = self._keys.marker(key).upload
            uploads = {known}
        except NotFoundError:
            return
        except IntegrityError:  # whose it was cannot be told, and one of them may just be made
            uploads = self._uploads.of(key)
        for upload in uploads:
            self._uploads.expect(key, upload)
        self._keys.remove(key)
        if known is not None:
            self._uploads.discard(key, known)

    def keys(self, prefix: str = "") -> Iterator[str]:
        """See `Storage.keys`."""
        return iter(self._keys.names(prefix))


def _object(key: str, marker: Marker, file: str) -> str:
    return f"files/{key}/{marker.upload}/{marker.files[file].object}"
