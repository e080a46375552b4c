"""What is published, deleted and recovered, also when a process is killed on its way."""

from __future__ import annotations

import errno
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from customized_models import (
    AlreadyExistsError,
    BaseModel,
    CustomizedModel,
    CustomizedModelsError,
    DatabaseError,
    InUseError,
    LocalStorage,
    ModelRegistry,
    NotFoundError,
    StorageError,
)
from customized_models.catalog.database import Database
from customized_models.catalog.levels import Levels
from customized_models.files.digests import SHA256, hash_file
from customized_models.files.manifest import Manifest

TRAINING = uuid.UUID("a1b2c3d4-0000-4000-8000-000000000000")


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    return registry.register(tiny_adapter, train_name="support", training_id=TRAINING)


def killed_in(owner: type, method: str, call: Callable[[], object], *, after: bool = False) -> None:
    """Make the call in a process of its own that is killed before, or after, it runs `method`."""
    child = os.fork()
    if child == 0:
        real = getattr(owner, method)

        def kill(*arguments: object, **named: object) -> None:
            if after:
                real(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, method, kill)
        try:
            call()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def reopened(registry: ModelRegistry) -> ModelRegistry:
    """As another process opens it."""
    return ModelRegistry(registry.root)


def stored(registry: ModelRegistry) -> list[str]:
    return list(LocalStorage(registry.root).keys())


# Publishing


@pytest.mark.parametrize(
    ("owner", "method", "after", "finished"),
    [
        (Levels, "insert_pending", False, False),
        (LocalStorage, "publish", False, False),
        (LocalStorage, "publish", True, True),
        (Levels, "make_visible", True, True),  # before the commit
    ],
    ids=["before it is announced", "before its bytes", "after its bytes", "before it is visible"],
)
def test_a_registration_that_is_killed_is_finished_or_undone_by_whoever_comes_next(
    registry: ModelRegistry,
    tiny_adapter: Path,
    owner: type,
    method: str,
    after: bool,
    finished: bool,
) -> None:
    def call() -> CustomizedModel:
        return registry.register(tiny_adapter, train_name="support", training_id=TRAINING)

    killed_in(owner, method, call, after=after)

    again = reopened(registry)
    names = [model.name for model in again.customized_models()]
    assert stored(again) == [f"customized/{name}" for name in names]
    assert bool(names) is finished
    model = again.register(tiny_adapter, train_name="support", training_id=TRAINING)
    again.verify(model)
    assert list(again.customized_models()) == [model]


def test_what_a_living_process_publishes_is_left_to_it(
    registry: ModelRegistry, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = LocalStorage.publish

    def publish(storage: LocalStorage, directory: Path, key: str) -> None:
        seen.append((reopened(registry).recover(), list(reopened(registry).customized_models())))
        real(storage, directory, key)

    monkeypatch.setattr(LocalStorage, "publish", publish)
    registry.register(tiny_adapter, train_name="support")
    assert seen == [([], [])]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_while_it_is_published_is_an_error_of_ours_and_nothing_is_left(
    registry: ModelRegistry, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from customized_models.storage import local

    with monkeypatch.context() as patch:

        def fail(path: Path) -> None:
            raise OSError(number, os.strerror(number))

        patch.setattr(local, "fsync", fail)
        with pytest.raises(StorageError, match=os.strerror(number)):
            registry.register(tiny_adapter, train_name="support")
    assert stored(registry) == []
    assert list(registry.customized_models()) == []
    registry.register(tiny_adapter, train_name="support")


def test_a_commit_of_which_nothing_was_heard_is_looked_up(
    registry: ModelRegistry, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database took the change and failed to say so."""
    real_write, real_visible = Database.write, Levels.make_visible
    made = []

    @contextmanager
    def write(database: Database) -> Iterator[object]:
        with real_write(database) as connection:
            yield connection
        if made:
            raise DatabaseError("the connection was lost", outcome_unknown=made.pop())

    def make_visible(levels: Levels, *arguments: object, **columns: object) -> None:
        real_visible(levels, *arguments, **columns)
        made.append(True)

    monkeypatch.setattr(Database, "write", write)
    monkeypatch.setattr(Levels, "make_visible", make_visible)
    model = registry.register(tiny_adapter, train_name="support")
    assert list(registry.customized_models()) == [model]


def test_a_database_that_fails_before_the_commit_leaves_nothing(
    registry: ModelRegistry, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DatabaseError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(Levels, "make_visible", fail)
        with pytest.raises(DatabaseError):
            registry.register(tiny_adapter, train_name="support")
    assert stored(registry) == []
    assert reopened(registry).recover() == []
    assert list(registry.customized_models()) == []


def test_registering_takes_three_transactions_and_reads_each_file_once(
    registry: ModelRegistry, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    for kind in ("read", "write"):
        real = getattr(Database, kind)

        def counted(database: Database, real: Callable[[Database], object] = real) -> object:
            nonlocal count
            count += 1
            return real(database)

        monkeypatch.setattr(Database, kind, counted)
    registry.shelf  # noqa: B018 -- looks for what killed processes left
    count = 0
    registry.register(tiny_adapter, train_name="support")
    assert count == 3


# Deleting


@pytest.mark.parametrize("after", [False, True])
def test_a_deletion_that_is_killed_is_finished_by_whoever_comes_next(
    registry: ModelRegistry, customized: CustomizedModel, tiny_adapter: Path, after: bool
) -> None:
    killed_in(LocalStorage, "delete", lambda: registry.delete(customized), after=after)

    again = reopened(registry)
    assert list(again.customized_models()) == []
    with pytest.raises(NotFoundError):
        again.get(CustomizedModel, customized.name)
    assert stored(again) == []
    assert again.recover() == []
    assert again.register(tiny_adapter, train_name="support", training_id=TRAINING) == customized
    again.delete(customized)
    again.delete(again.get(BaseModel, "llama-tiny"))


def test_a_disk_that_fails_while_it_is_deleted_leaves_a_way_out(
    registry: ModelRegistry, customized: CustomizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            registry.delete(customized)
        with pytest.raises(StorageError):
            registry.recover()
    assert stored(registry) == [customized.key]
    registry.delete(customized)
    assert stored(registry) == []
    with pytest.raises(NotFoundError):
        registry.delete(customized)


def test_a_training_that_is_being_deleted_cannot_be_registered_over(
    registry: ModelRegistry,
    customized: CustomizedModel,
    tiny_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither wins silently: the new one is registered once the old one is gone."""
    real = LocalStorage.delete
    tried = []

    def delete(storage: LocalStorage, key: str) -> None:
        try:
            registry.delete(customized)
        except CustomizedModelsError as error:
            tried.append(type(error))
        real(storage, key)

    monkeypatch.setattr(LocalStorage, "delete", delete)
    registry.delete(customized)
    assert tried == [InUseError]
    assert registry.register(tiny_adapter, train_name="support", training_id=TRAINING) == customized


# Litter


def test_bytes_without_a_row_are_removed_after_a_time_of_grace_and_nothing_else_is(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    storage = LocalStorage(registry.root)
    for key in ("customized/orphan", "complete/orphan", "gguf/orphan"):
        with storage.staging("orphan") as directory:
            (directory / "bytes").write_bytes(b"1")
            storage.publish(directory, key)

    listed = registry.gc()
    assert [(litter.key, litter.removed) for litter in listed] == [
        ("complete/orphan", False),
        ("customized/orphan", False),
        ("gguf/orphan", False),
    ]
    assert all(litter.removed is False for litter in registry.gc(grace_seconds=0, dry_run=True))
    assert all(litter.removed for litter in registry.gc(grace_seconds=0))
    assert stored(registry) == [customized.key]
    assert registry.gc(grace_seconds=0) == []
    registry.verify(customized)


def test_litter_that_is_found_again_later_has_its_time_of_grace_anew(
    registry: ModelRegistry, customized: CustomizedModel, tiny_adapter: Path
) -> None:
    storage = LocalStorage(registry.root)
    (registry.root / "complete" / "orphan").mkdir(parents=True)
    registry.gc()
    storage.delete("complete/orphan")
    assert registry.gc() == []
    (registry.root / "complete" / "orphan").mkdir(parents=True)
    (found,) = registry.gc(grace_seconds=60)
    assert not found.removed


def test_of_files_that_can_be_made_again_those_used_last_are_kept_as_many_as_fit(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    storage, shelf = LocalStorage(registry.root), registry.shelf
    for number in range(4):
        with storage.staging("cached") as directory:
            (directory / "model.gguf").write_bytes(b"1234567890")
            content = {"model.gguf": hash_file(directory / "model.gguf", SHA256)}
            Manifest("gguf", content, {}, {"number": number}, {}).write(directory)
            storage.publish(directory, f"gguf/{number}")
        shelf.trim("gguf/")  # it is unused from now on
    with storage.staging("damaged") as directory:
        (directory / "manifest.json").write_bytes(b"{")
        storage.publish(directory, "gguf/damaged")

    with registry.catalog.lease() as lease:
        with registry.catalog.database.write() as connection:
            lease.take(connection, ["gguf/0"], "a deployment")
        shelf.trim("gguf/", 25)
        assert list(storage.keys("gguf/")) == ["gguf/0", "gguf/2", "gguf/3"]
    with registry.catalog.database.write() as connection:
        registry.catalog.litter.forget(connection, "gguf/0")  # as when a deployment uses it
    shelf.trim("gguf/", 15)
    assert list(storage.keys("gguf/")) == ["gguf/0"]
    assert stored(registry) == [customized.key, "gguf/0"]


def test_a_name_is_taken_while_it_is_published(
    registry: ModelRegistry, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike = uuid.UUID("a1b2ffff-0000-4000-8000-000000000000")
    real = LocalStorage.publish

    def publish(storage: LocalStorage, directory: Path, key: str) -> None:
        with pytest.raises(AlreadyExistsError):
            registry.register(tiny_adapter, train_name="support", training_id=alike)
        real(storage, directory, key)

    monkeypatch.setattr(LocalStorage, "publish", publish)
    registry.register(tiny_adapter, train_name="support", training_id=TRAINING)
