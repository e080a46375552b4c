"""Storages: the contract for both we ship, and what only the local one promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from customized_models.storage.local import LocalStorage
from customized_models.testing import CopyingStorage, MemoryStorage, StorageContract, publish_files


class TestLocalStorage(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> LocalStorage:
        return LocalStorage(tmp_path)


class TestMemoryStorage(StorageContract):
    @pytest.fixture
    def storage(self) -> MemoryStorage:
        return MemoryStorage()


class TestCopyingStorage(StorageContract):
    """Nothing relies on a stored directory being there once its checkout has ended."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> CopyingStorage:
        return CopyingStorage(LocalStorage(tmp_path))


def test_a_checkout_of_the_local_storage_is_the_stored_directory_itself(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    publish_files(storage, "customized/a", file=b"1")

    with storage.checkout("customized/a") as directory:
        assert directory == tmp_path / "customized" / "a"


def test_published_files_can_be_read_by_other_users(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    publish_files(storage, "customized/a", file=b"1")

    assert (tmp_path / "customized/a").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "customized/a/file").stat().st_mode & 0o777 == 0o644


def test_staging_after_a_kill_finds_what_it_held(tmp_path: Path) -> None:
    script = (
        "import os, sys; from customized_models.storage.local import LocalStorage\n"
        "with LocalStorage(sys.argv[1]).staging('job') as directory:\n"
        "    (directory / 'shard').write_bytes(b'done'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert killed.returncode == -9

    with LocalStorage(tmp_path).staging("job") as directory:
        assert (directory / "shard").read_bytes() == b"done"


def test_the_root_is_made_absolute_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("models")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    publish_files(storage, "customized/a", file=b"1")

    assert (tmp_path / "models/customized/a/file").read_bytes() == b"1"
