"""Storages: the contract for both we ship, and what only the local one promises."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from customized_models.errors import InvalidOptionError, StorageError
from customized_models.storage import LocalStorage, local, open_storage
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


@pytest.mark.parametrize(
    ("url", "root"),
    [("file:///srv/models", "/srv/models"), ("file:///a%20b", "/a b"), ("/a b", "/a b")],
)
def test_a_url_of_files_is_an_absolute_path(url: str, root: str) -> None:
    storage = open_storage(url)
    assert isinstance(storage, LocalStorage)
    assert storage.root == Path(root)


@pytest.mark.parametrize(
    "url", ["file://localhost/x", "file:/x", "s3:/b", "file://", "file:///x?y", "nope://y"]
)
def test_what_is_no_url_as_it_stands_is_refused(url: str) -> None:
    with pytest.raises(InvalidOptionError, match="storage"):
        open_storage(url)


CHANGES: dict[str, tuple[Callable[[LocalStorage], None], set[str]]] = {
    "publish": (
        lambda storage: publish_files(storage, "customized/b", file=b"new"),
        {"customized/a", "customized/b"},
    ),
    "rewrite": (lambda storage: storage.rewrite("customized/a", "file", b"new"), {"customized/a"}),
    "delete": (lambda storage: storage.delete("customized/a"), set()),
}


@pytest.mark.parametrize(("change", "left"), CHANGES.values(), ids=CHANGES)
def test_what_fails_after_the_change_was_made_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[LocalStorage], None],
    left: set[str],
) -> None:
    storage = LocalStorage(tmp_path)
    publish_files(storage, "customized/a", file=b"old")
    parents = {tmp_path / "customized", tmp_path / "customized" / "a"}
    real = local.fsync

    def failing(path: Path) -> None:
        if path in parents:
            raise OSError(errno.EIO, "the disk failed")
        real(path)

    monkeypatch.setattr(local, "fsync", failing)
    with pytest.raises(StorageError) as caught:
        change(storage)
    assert caught.value.outcome_unknown
    assert set(storage.keys()) == left
