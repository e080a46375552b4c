"""A registry copied to another database, another storage, or both."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from customized_models import (
    AlreadyExistsError,
    CompleteModel,
    CustomizedModel,
    Deployer,
    Event,
    FsspecStorage,
    IntegrityError,
    InUseError,
    InvalidArgumentError,
    LocalStorage,
    Merger,
    ModelRegistry,
)
from customized_models.catalog.database import Database
from customized_models.catalog.leases import Lease, Leases
from customized_models.catalog.schema import customized_models
from customized_models.outbox import Outbox
from customized_models.registering import Training
from customized_models.testing import tiny_lora
from tests.servers.artifact import TEMPLATE, at
from tests.servers.s3_server import BUCKET, S3Server, options
from tests.servers.stand_in import stand_in
from tests.test_shelf import killed_in, reopened
from tests.waiting import until


def told(registry: ModelRegistry) -> dict[str, Any]:
    """All that a registry tells of what it has, and of what has happened."""
    lists = {
        name: [value.to_dict() for value in getattr(registry, name)()]
        for name in (
            *("base_models", "customized_models", "complete_models", "live_models"),
            *("third_party_models", "environments", "events", "jobs"),
        )
    }
    models = [*registry.customized_models(), *registry.complete_models(), *registry.live_models()]
    return lists | {
        "labels": [registry.labels(model) for model in models],
        "lineage": [str(registry.lineage(model).verify()) for model in models],
    }


def stored(registry: ModelRegistry) -> dict[str, bytes]:
    """Every byte of the models, by key and file."""
    storage, found = registry.shelf.storage, {}
    for key in storage.keys():  # noqa: SIM118 -- a method, not a mapping
        with storage.checkout(key) as directory:
            files = [path for path in directory.rglob("*") if path.is_file()]
            found |= {f"{key}/{path.relative_to(directory)}": path.read_bytes() for path in files}
    return found


@pytest.fixture(scope="module")
def full(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_adapter: Path
) -> Iterator[ModelRegistry]:
    """A registry with something of every kind: copy it, never change it."""
    directory = tmp_path_factory.mktemp("full")
    registry = ModelRegistry(directory / "models")
    registry.add_base_model("tiny", tiny_base, deployment_template=TEMPLATE)
    other = tiny_lora(directory / "other", tiny_base, seed=1)
    first = registry.register(tiny_adapter, train_name="support")
    second = registry.register(other, train_name="support")
    gone = registry.register(other, train_name="gone")
    complete, evicted = [
        Merger(registry).save(model).result(progress=False) for model in (first, second)
    ]
    registry.evict(evicted)
    registry.add_evaluation(second, {"eval_loss": 0.125, "eval_accuracy": 1 / 3})
    registry.set_alias(first, "champion", protected=True)
    registry.set_alias(second, "champion")
    registry.tag(first, "keep", "b\N{LATIN SMALL LETTER U WITH DIAERESIS}")
    registry.tag(gone, "keep")
    registry.set_description(complete, "The one that is live.")
    registry.reserve(train_name="later", training_id=uuid.uuid4(), base_model="tiny")
    registry.delete(gone)
    with stand_in() as server:
        registry.add_environment(at(server))
        job = Deployer(registry).deploy(
            first, served_name="support", proofs=(), accept_failed="template"
        )
        live = job.result(progress=False)
        registry.add_third_party(live)
        [file] = registry.shelf.storage.keys("gguf/")
        with registry.catalog.database.write() as connection:  # as for a tool that has no copy
            registry.catalog.levels.note_artifact(connection, live, file)
        yield registry


@pytest.fixture
def small(registry: ModelRegistry, tiny_adapter: Path) -> ModelRegistry:
    """A registry with two customized models, of which the one has a tag."""
    registry.register(tiny_adapter, train_name="one")
    registry.tag(registry.register(tiny_adapter, train_name="two"), "keep")
    return registry


@pytest.fixture
def target(tmp_path: Path) -> ModelRegistry:
    """An empty registry."""
    return ModelRegistry(tmp_path / "target")


def assert_empty(registry: ModelRegistry) -> None:
    """Nobody sees anything of a copy that was not made."""
    again = ModelRegistry(registry.root)
    assert again.recover() == []
    assert [list(again.base_models()), list(again.customized_models())] == [[], []]
    assert list(again.events()) == []


def test_a_registry_goes_to_postgresql_and_an_object_store_and_back(
    full: ModelRegistry, databases: Callable[[str, Path], str], s3: S3Server, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    storage = FsspecStorage(url, options=options(s3.port), local=tmp_path / "local")
    shared = ModelRegistry(
        tmp_path / "shared", storage=storage, database=databases("postgresql", tmp_path)
    )
    back = ModelRegistry(tmp_path / "back")
    before = told(full)
    assert {event["action"] for event in before["events"]} >= {"deleted", "evicted", "alias set"}
    assert {job["kind"] for job in before["jobs"]} == {"save", "deploy"}
    keys = sorted(name.partition("/")[0] for name in full.shelf.storage.keys(""))
    assert keys == ["complete", "customized", "customized", "evicted", "gguf"]

    full.copy_to(shared, progress=False)
    assert told(shared) == before
    shared.copy_to(back, progress=False)
    assert told(back) == before
    assert stored(back) == stored(full)
    assert told(full) == before
    for model in (*back.customized_models(), *back.complete_models(evicted=False)):
        back.verify(model)
    assert [shared.gc(grace_seconds=0), back.gc(grace_seconds=0)] == [[], []]
    assert back.recover() == []


def test_a_copy_goes_on_where_the_first_was(
    full: ModelRegistry, tmp_path: Path, database: str, tiny_adapter: Path
) -> None:
    copy = ModelRegistry(tmp_path / "models", database=database)
    full.copy_to(copy, progress=False)
    last, newest = full.events()[0], full.customized_models()[0]
    assert copy.get(CustomizedModel, "champion@support") == full.get(
        CustomizedModel, "champion@support"
    )
    assert copy.job(full.jobs()[0].id).to_dict() == full.jobs()[0].to_dict()
    [evicted] = copy.complete_models(evicted=True)
    with copy.checkout(evicted) as directory:
        assert (directory / "config.json").is_file()
    copy.verify(copy.get(CompleteModel, evicted.name))

    events = list[Event]()
    with copy.subscribe(events.append, after=last.number):
        added = copy.register(tiny_adapter, train_name="new")
        until(lambda: events and events[-1].name == added.name)
    assert [event.action for event in events] == ["rebuilt", "created"]
    assert copy.customized_models()[:2] == [added, newest]


def test_a_registry_changes_its_database_alone(small: ModelRegistry, database: str) -> None:
    if database.startswith("sqlite"):
        database = f"sqlite:///{small.root / 'other.db'}"
    before, held = told(small), stored(small)
    other = ModelRegistry(small.root, database=database)
    small.copy_to(other, progress=False)
    assert (told(other), stored(other)) == (before, held)


@pytest.mark.parametrize(
    ("owner", "method", "after"),
    [
        (Leases, "take", True),
        (LocalStorage, "publish", False),
        (LocalStorage, "publish", True),
        (Database, "continue_numbers", True),
        (Lease, "__exit__", False),
    ],
    ids=["begun", "before bytes", "after bytes", "before the commit", "after the commit"],
)
def test_a_copy_that_is_killed_shows_nothing_and_is_finished_by_the_next(
    small: ModelRegistry, target: ModelRegistry, owner: type, method: str, after: bool
) -> None:
    killed_in(owner, method, lambda: small.copy_to(target, progress=False), after=after)
    if method == "__exit__":
        assert told(target) == told(small)
    else:
        assert_empty(target)
    small.copy_to(reopened(target), progress=False)
    assert (told(target), stored(target)) == (told(small), stored(small))
    small.copy_to(target, progress=False)  # again is fine
    assert told(target) == told(small)


def test_what_an_interrupted_copy_has_brought_is_not_copied_again(
    small: ModelRegistry, target: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in(Database, "continue_numbers", lambda: small.copy_to(target, progress=False))
    small.add_evaluation(small.customized_models()[0], {"eval_loss": 0.5})  # meanwhile
    with monkeypatch.context() as context:
        context.setattr(LocalStorage, "publish", None)
        small.copy_to(target, progress=False)
    assert (told(target), stored(target)) == (told(small), stored(small))


def test_what_comes_and_changes_while_it_is_copied_is_copied_too(
    small: ModelRegistry,
    target: ModelRegistry,
    tiny_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, published = LocalStorage.publish, []

    def publish(storage: LocalStorage, directory: Path, key: str) -> None:
        real(storage, directory, key)
        if storage.root == target.root and not published:
            published.append(key)
            with pytest.raises(InUseError, match="a copy"):
                small.delete(key.partition("/")[2])
            with pytest.raises(InUseError, match="a copy"):
                target.gc(grace_seconds=0)
            with pytest.raises(InUseError, match="a copy"):
                small.copy_to(ModelRegistry(target.root), progress=False)
            small.add_evaluation(key.partition("/")[2], {"eval_loss": 0.5})
            small.register(tiny_adapter, train_name="three")

    monkeypatch.setattr(LocalStorage, "publish", publish)
    small.copy_to(target, progress=False)
    assert len(small.customized_models()) == 3
    assert (told(target), stored(target)) == (told(small), stored(small))


def test_a_registry_that_has_something_else_is_refused(
    small: ModelRegistry, target: ModelRegistry, tiny_base: Path, tiny_adapter: Path
) -> None:
    base = target.add_base_model("other", tiny_base)
    with pytest.raises(AlreadyExistsError, match="rows of its own in 'base_models', "):
        small.copy_to(target, progress=False)
    model = target.register(tiny_adapter, train_name="other")
    target.delete(model)
    target.delete(base)
    with pytest.raises(AlreadyExistsError, match="rows of its own in 'event_subjects', 'events'"):
        small.copy_to(target, progress=False)
    assert stored(target) == {}


def test_a_copy_that_has_lived_on_is_refused(small: ModelRegistry, target: ModelRegistry) -> None:
    small.copy_to(target, progress=False)
    target.tag(target.customized_models()[0], "mine")
    with pytest.raises(AlreadyExistsError, match="rows of its own"):
        small.copy_to(target, progress=False)


def test_a_storage_that_has_something_else_is_refused(
    small: ModelRegistry, target: ModelRegistry, tmp_path: Path
) -> None:
    killed_in(Database, "continue_numbers", lambda: small.copy_to(target, progress=False))
    gone = small.customized_models()[0]
    small.delete(gone)
    with pytest.raises(AlreadyExistsError, match=f"{gone.name}.*gc\\(grace_seconds=0\\)"):
        small.copy_to(target, progress=False)
    assert_empty(target)
    assert {one.removed for one in target.gc(grace_seconds=0)} == {True}
    small.copy_to(target, progress=False)
    assert told(target) == told(small)

    another, [model] = ModelRegistry(tmp_path / "another"), small.customized_models()
    (another.root / model.key).mkdir(parents=True)
    (another.root / model.key / "manifest.json").write_bytes(b"{}")
    with pytest.raises(AlreadyExistsError, match=f"something else under '{model.key}'"):
        small.copy_to(another, progress=False)
    assert (another.root / model.key).is_dir()


@pytest.mark.parametrize("damage", ["content", "missing", "additional", "manifest", "gone"])
def test_damage_is_named_and_nothing_is_visible(
    small: ModelRegistry, target: ModelRegistry, tmp_path: Path, damage: str
) -> None:
    model = small.customized_models()[0]
    directory = small.root / model.key
    shutil.copytree(directory, tmp_path / "backup")
    weights = directory / "adapter_model.safetensors"
    match damage:
        case "content":
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
        case "missing":
            weights.unlink()
        case "additional":
            (directory / "more").write_bytes(b"")
        case "manifest":
            (directory / "manifest.json").write_bytes(b"{}")
        case "gone":
            shutil.rmtree(directory)
    with pytest.raises(IntegrityError, match=f"{model.name} is damaged.*backup"):
        small.copy_to(target, progress=False)
    assert_empty(target)

    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(tmp_path / "backup", directory)
    small.copy_to(target, progress=False)
    assert (told(target), stored(target)) == (told(small), stored(small))


def test_a_damaged_row_is_named_and_nothing_is_visible(
    small: ModelRegistry, target: ModelRegistry
) -> None:
    model = small.customized_models()[0]
    with small.catalog.database.write() as connection:
        mine = update(customized_models).where(customized_models.c.name == model.name)
        connection.execute(mine.values(train_name="x"))
    with pytest.raises(IntegrityError, match=model.name):
        small.copy_to(target, progress=False)
    assert_empty(target)


def test_what_is_under_way_is_named(
    small: ModelRegistry, target: ModelRegistry, tiny_adapter: Path, tmp_path: Path
) -> None:
    jobs, model = small.catalog.jobs, small.customized_models()[0]
    id = jobs.add("save", lambda id: f"a_s_{id.hex[:4]}", {"customized": "a"}, (), 1)
    with pytest.raises(InUseError, match=r"save of a_s_.*once they have ended, or cancel"):
        small.copy_to(target, progress=False)
    with small.catalog.database.write() as connection:
        small.catalog.leases.end(connection, str(id))  # its worker is gone
    small.copy_to(target, progress=False)
    assert target.job(id).state == small.job(id).state == "lost"

    again = ModelRegistry(tmp_path / "again")
    with small.catalog.lease() as lease:
        with small.catalog.database.write() as connection:
            small.catalog.levels.mark_deleting(connection, model, lease.owner)
            lease.take(connection, [model.key], "a deletion")
        with pytest.raises(InUseError, match=rf"{model.name}.*ModelRegistry.recover\(\)"):
            small.copy_to(again, progress=False)
    assert small.recover() == [f"finished deleting {model.name}"]

    training = Training.given("kept", "llama-tiny", None, None, None, None)
    kept = Outbox(small.root).keep("kept", shutil.copytree(tiny_adapter, tmp_path / "a"), training)
    with pytest.raises(InUseError, match=rf"{kept.parent.name}.*ModelRegistry.recover\(\)"):
        small.copy_to(again, progress=False)
    assert_empty(again)
    small.recover()
    small.copy_to(again, progress=False)
    assert told(again) == told(small)


def test_an_empty_registry_is_copied(tmp_path: Path, target: ModelRegistry) -> None:
    ModelRegistry(tmp_path / "empty").copy_to(target, progress=False)
    assert_empty(target)


def test_only_another_registry_is_copied_to(small: ModelRegistry) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^other takes a ModelRegistry"):
        small.copy_to("elsewhere")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="another database"):
        small.copy_to(ModelRegistry(small.root))
