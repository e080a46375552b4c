"""The contract of storages as a test class to subclass, and storages for tests."""

from __future__ import annotations

import io
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from ..deploying.artifacts import RegistryArtifact
from ..errors import AlreadyExistsError, InUseError, InvalidNameError, NotFoundError, shown
from ..models import CustomizedModel, no_progress
from ..registry import ModelRegistry
from ..storage import Storage, checked_key
from .tiny_models import tiny_llama, tiny_lora


class MemoryStorage:
    """A storage that keeps everything in memory, for tests with a single process."""

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
        checked_key(key)
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

    def rewrite(self, key: str, file: str, data: bytes) -> None:
        """See `Storage.rewrite`."""
        with self._lock:
            files = self._directories.get(key, {})
            if file not in files:
                raise NotFoundError(f"{shown(key)} has no file {shown(file)}")
            self._directories[key] = {**files, file: data}

    def delete(self, key: str) -> None:
        """See `Storage.delete`."""
        checked_key(key)
        with self._lock:
            self._directories.pop(key, None)

    def keys(self, prefix: str = "") -> Iterator[str]:
        """See `Storage.keys`."""
        with self._lock:
            return iter(sorted(key for key in self._directories if key.startswith(prefix)))

    def _files(self, key: str) -> dict[str, bytes]:
        checked_key(key)
        with self._lock:
            if key not in self._directories:
                raise NotFoundError(f"nothing is stored under {shown(key)}")
            return self._directories[key]


def publish_files(storage: Storage, key: str, **files: bytes) -> None:
    """Stage files of these contents and publish them under `key`."""
    with storage.staging("contract") as directory:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        storage.publish(directory, key)


class CopyingStorage:
    """Wraps a storage so that a checkout is a copy that is removed when its block ends.

    A storage on another host behaves like this, so code that works here works there.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __repr__(self) -> str:
        return f"CopyingStorage({self._storage!r})"

    def staging(self, name: str) -> AbstractContextManager[Path]:
        """See `Storage.staging`."""
        return self._storage.staging(name)

    def publish(self, directory: Path, key: str) -> None:
        """See `Storage.publish`."""
        self._storage.publish(directory, key)

    @contextmanager
    def checkout(self, key: str) -> Iterator[Path]:
        """See `Storage.checkout`."""
        with (
            self._storage.checkout(key) as directory,
            tempfile.TemporaryDirectory() as scratch,
        ):
            yield Path(shutil.copytree(directory, Path(scratch, "copy")))

    def open(self, key: str, file: str) -> BinaryIO:
        """See `Storage.open`."""
        return self._storage.open(key, file)

    def rewrite(self, key: str, file: str, data: bytes) -> None:
        """See `Storage.rewrite`."""
        self._storage.rewrite(key, file, data)

    def delete(self, key: str) -> None:
        """See `Storage.delete`."""
        self._storage.delete(key)

    def keys(self, prefix: str = "") -> Iterator[str]:
        """See `Storage.keys`."""
        return self._storage.keys(prefix)


class StorageContract:
    """The contract of a storage. Subclass it as `TestMyStorage`, with a fixture `storage`.

    The fixture gives an empty storage. The last tests use it in a registry; they need torch and
    peft.
    """

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

    def test_one_file_of_a_published_directory_is_replaced(self, storage: Storage) -> None:
        publish_files(storage, "customized/a", weights=b"123", card=b"old")

        storage.rewrite("customized/a", "card", b"new and longer")

        with storage.checkout("customized/a") as directory:
            found = {path.name: path.read_bytes() for path in directory.iterdir()}
        assert found == {"weights": b"123", "card": b"new and longer"}
        assert list(storage.keys()) == ["customized/a"]

    @pytest.mark.parametrize("key", ["customized/a", "customized/b"])
    def test_nothing_is_added_by_replacing(self, storage: Storage, key: str) -> None:
        publish_files(storage, "customized/a", weights=b"123")

        with pytest.raises(NotFoundError):
            storage.rewrite(key, "card", b"new")

        with storage.checkout("customized/a") as directory:
            assert [path.name for path in directory.iterdir()] == ["weights"]

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

    def test_files_in_directories_are_kept(self, storage: Storage) -> None:
        with storage.staging("contract") as directory:
            (directory / "templates").mkdir()
            (directory / "templates" / "tool.jinja").write_bytes(b"{{ x }}")
            storage.publish(directory, "customized/a")

        with storage.checkout("customized/a") as directory:
            assert (directory / "templates" / "tool.jinja").read_bytes() == b"{{ x }}"
        with storage.open("customized/a", "templates/tool.jinja") as file:
            assert file.read() == b"{{ x }}"

    def test_a_file_outside_of_the_directory_is_not_opened(self, storage: Storage) -> None:
        publish_files(storage, "customized/a", file=b"1")
        publish_files(storage, "customized/b", file=b"2")
        with pytest.raises(NotFoundError):
            storage.open("customized/a", "../b/file")

    @pytest.mark.parametrize("key", ["", "a", "../a", "a/../b", "/etc/passwd", "a/b/c", "a/"])
    def test_what_is_no_key_is_refused(self, storage: Storage, key: str) -> None:
        with pytest.raises(InvalidNameError):
            storage.delete(key)

    # A registry on it

    @pytest.fixture
    def registered(self, storage: Storage, tmp_path: Path) -> tuple[ModelRegistry, CustomizedModel]:
        """A registry on the storage, with a tiny model in it."""
        base = tiny_llama(tmp_path / "contract-base")
        registry = ModelRegistry(tmp_path / "contract-registry", storage=storage)
        registry.add_base_model("tiny", base)
        adapter = tiny_lora(tmp_path / "contract-adapter", base)
        return registry, registry.register(adapter, train_name="contract")

    def test_a_model_is_registered_read_and_deleted_through_it(
        self, storage: Storage, registered: tuple[ModelRegistry, CustomizedModel]
    ) -> None:
        registry, model = registered
        registry.verify(model)
        with registry.checkout(model) as directory:
            assert (directory / "adapter_model.safetensors").is_file()
        registry.delete(model)
        assert list(storage.keys()) == []

    def test_the_database_is_made_again_from_it(
        self, registered: tuple[ModelRegistry, CustomizedModel]
    ) -> None:
        registry, model = registered
        (registry.root / "registry.db").unlink()
        again = ModelRegistry(registry.root, storage=registry.shelf.storage)
        assert again.reindex() == ["tiny", model.name]
        assert list(again.customized_models()) == [model]

    def test_what_a_deployment_asks_for_is_there_until_its_push_ends(
        self, registered: tuple[ModelRegistry, CustomizedModel]
    ) -> None:
        registry, model = registered
        for _ in range(2):  # made, and found again
            with RegistryArtifact(
                registry.catalog, registry.shelf, model, "live", "no_quantization", _hold_nothing
            ) as artifact:
                with artifact.gguf(no_progress, chat_template=True) as file:
                    pass
                assert file.path.stat().st_size == file.size
                with artifact.adapter() as beside:
                    assert (beside.adapter / "adapter_model.safetensors").is_file()
                    assert (beside.base / "config.json").is_file()

    def test_an_evaluation_is_added_to_what_is_stored(
        self, registered: tuple[ModelRegistry, CustomizedModel]
    ) -> None:
        registry, model = registered
        changed = registry.add_evaluation(model, {"eval_accuracy": 0.5})
        registry.verify(changed)
        with registry.checkout(changed) as directory:
            assert "eval_accuracy" in (directory / "README.md").read_text()

    def test_a_slow_publish_keeps_nobody_from_the_registry(
        self, storage: Storage, registered: tuple[ModelRegistry, CustomizedModel], tmp_path: Path
    ) -> None:
        """While one process uploads, others register, list, check out and are refused."""
        registry, model = registered
        publishing, go_on = threading.Event(), threading.Event()

        class Slow(CopyingStorage):
            def publish(self, directory: Path, key: str) -> None:
                publishing.set()
                assert go_on.wait(60)
                super().publish(directory, key)

        slow = ModelRegistry(registry.root, storage=Slow(storage))
        with ThreadPoolExecutor(1) as pool:
            try:
                adapter = tmp_path / "contract-adapter"
                upload = pool.submit(slow.register, adapter, train_name="slow")
                assert publishing.wait(60)
                with registry.checkout(model), pytest.raises(InUseError):
                    registry.delete(model)
                assert list(registry.customized_models()) == [model]
                other = registry.register(adapter, train_name="other")
            finally:
                go_on.set()
            late = upload.result()
        assert list(registry.customized_models()) == [other, late, model]


def _hold_nothing(key: str) -> None:
    """Nobody else removes anything here."""
