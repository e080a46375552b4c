"""What a storage must do, as tests to subclass; and the storage that keeps everything in memory."""

from __future__ import annotations

import io
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from ..errors import AlreadyExistsError, InvalidNameError, NotFoundError, shown
from ..storage import Storage


class MemoryStorage:
    """A storage for tests that need no second process: keys to files to bytes."""

    def __init__(self) -> None:
        self._directories: dict[str, dict[str, bytes]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<MemoryStorage of {len(self._directories)} keys>"

    def __reduce__(self) -> str:
        raise TypeError("a MemoryStorage belongs to one process")

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """See `Storage.staging`."""
        with tempfile.TemporaryDirectory(prefix=f"{name}-") as directory:
            yield Path(directory)

    def publish(self, directory: Path, key: str) -> None:
        """See `Storage.publish`."""
        _check(key)
        files = {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file()
        }
        with self._lock:
            if key in self._directories:
                raise AlreadyExistsError(f"{shown(key)} already exists")
            self._directories[key] = files

    @contextmanager
    def checkout(self, key: str) -> Iterator[Path]:
        """See `Storage.checkout`."""
        files = self._files(key)
        with tempfile.TemporaryDirectory() as directory:
            for name, data in files.items():
                path = Path(directory, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            yield Path(directory)

    def open(self, key: str, file: str) -> BinaryIO:
        """See `Storage.open`."""
        if file not in (files := self._files(key)):
            raise NotFoundError(f"{shown(key)} has no file {shown(file)}")
        return io.BytesIO(files[file])

    def delete(self, key: str) -> None:
        """See `Storage.delete`."""
        _check(key)
        with self._lock:
            self._directories.pop(key, None)

    def keys(self, prefix: str = "") -> Iterator[str]:
        """See `Storage.keys`."""
        with self._lock:
            return iter(sorted(key for key in self._directories if key.startswith(prefix)))

    def _files(self, key: str) -> dict[str, bytes]:
        _check(key)
        with self._lock:
            if key not in self._directories:
                raise NotFoundError(f"nothing is stored under {shown(key)}")
            return self._directories[key]


def _check(key: str) -> None:
    if len(key.split("/")) != 2 or ".." in key or not all(key.split("/")):
        raise InvalidNameError(f"not a key: {shown(key)}")


def publish_files(storage: Storage, key: str, **files: bytes) -> None:
    """Stage files of these contents and publish them under `key`."""
    with storage.staging("contract") as directory:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        storage.publish(directory, key)


class StorageContract:
    """Subclass as `TestMyStorage` with a `storage` fixture that starts empty."""

    def test_a_published_directory_reads_back(self, storage: Storage) -> None:
        publish_files(storage, "customized/a", weights=b"123", config=b"{}")

        with storage.checkout("customized/a") as directory:
            found = {path.name: path.read_bytes() for path in directory.iterdir()}

        assert found == {"weights": b"123", "config": b"{}"}

    def test_a_key_is_published_once(self, storage: Storage) -> None:
        publish_files(storage, "customized/a", weights=b"first")

        with pytest.raises(AlreadyExistsError):
            publish_files(storage, "customized/a", weights=b"second")

        with storage.open("customized/a", "weights") as file:
            assert file.read() == b"first"

    def test_an_empty_directory_counts_as_published(self, storage: Storage) -> None:
        publish_files(storage, "customized/a")

        with pytest.raises(AlreadyExistsError):
            publish_files(storage, "customized/a", weights=b"second")

    def test_one_of_many_concurrent_publishers_wins(self, storage: Storage) -> None:
        def publish(n: int) -> bool:
            with storage.staging(f"contract-{n}") as directory:
                (directory / "n").write_bytes(b"%d" % n)
                try:
                    storage.publish(directory, "customized/a")
                except AlreadyExistsError:
                    return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(publish, range(16))) == 1

    def test_what_is_staged_is_not_visible(self, storage: Storage) -> None:
        with storage.staging("contract") as directory:
            (directory / "weights").write_bytes(b"1")
            assert list(storage.keys()) == []
        assert list(storage.keys()) == []

    def test_a_staging_that_fails_leaves_nothing(self, storage: Storage) -> None:
        staged = []

        def fail() -> None:
            with storage.staging("contract") as directory:
                staged.append(directory)
                (directory / "weights").write_bytes(b"1")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert not staged[0].exists()
        assert list(storage.keys()) == []

    def test_a_file_is_read_by_ranges(self, storage: Storage) -> None:
        publish_files(storage, "customized/a", weights=b"0123456789")

        with storage.open("customized/a", "weights") as file:
            file.seek(4)
            assert file.read(3) == b"456"

    def test_what_is_not_there_is_not_found(self, storage: Storage) -> None:
        publish_files(storage, "customized/a", weights=b"1")

        with pytest.raises(NotFoundError), storage.checkout("customized/b"):
            pass
        with pytest.raises(NotFoundError):
            storage.open("customized/a", "config")

    def test_lists_keys_by_prefix_in_order(self, storage: Storage) -> None:
        for key in ("gguf/b", "customized/b", "customized/a"):
            publish_files(storage, key, file=b"")

        assert list(storage.keys("customized/")) == ["customized/a", "customized/b"]
        assert list(storage.keys()) == ["customized/a", "customized/b", "gguf/b"]

    def test_deleting_removes_one_key_and_may_be_repeated(self, storage: Storage) -> None:
        publish_files(storage, "customized/a", file=b"")
        publish_files(storage, "customized/b", file=b"")

        storage.delete("customized/a")
        storage.delete("customized/a")

        assert list(storage.keys()) == ["customized/b"]

    def test_a_deleted_key_can_be_published_again(self, storage: Storage) -> None:
        publish_files(storage, "customized/a", file=b"old")
        storage.delete("customized/a")
        publish_files(storage, "customized/a", file=b"new")

        with storage.open("customized/a", "file") as file:
            assert file.read() == b"new"

    @pytest.mark.parametrize("key", ["", "a", "../a", "a/../b", "/etc/passwd", "a/b/c", "a/"])
    def test_what_is_no_key_is_refused(self, storage: Storage, key: str) -> None:
        with pytest.raises(InvalidNameError):
            storage.delete(key)
