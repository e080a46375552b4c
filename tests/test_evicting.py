"""Complete models whose bytes are dropped, and made again when they are needed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from attrs import evolve

from customized_models import (
    BaseModel,
    BaseModelMissingError,
    CompleteModel,
    CustomizedModel,
    EvictedError,
    InUseError,
    Job,
    Merger,
    ModelRegistry,
    NotFoundError,
    NotReproducible,
)
from customized_models.catalog.leases import Lease
from customized_models.catalog.levels import Levels
from customized_models.shelf import Shelf
from tests.test_shelf import killed_in, reopened


@pytest.fixture
def complete(registry: ModelRegistry, tiny_adapter: Path) -> CompleteModel:
    registry.register(tiny_adapter, train_name="support")
    return Merger(registry).save(registry.customized_models()[0]).result(progress=False)


def stored(registry: ModelRegistry) -> list[str]:
    """The names of the files with weights of complete models."""
    return [path.name for path in (registry.root / "complete").rglob("*.safetensors")]


def test_an_evicted_model_is_rebuilt_to_the_same_bytes(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    with registry.checkout(complete) as directory:
        before = {path.name: path.read_bytes() for path in directory.iterdir()}

    evicted = registry.evict(complete)
    assert evicted.evicted
    assert evicted == complete
    assert registry.evict(complete.name) == complete  # again is fine
    assert stored(registry) == []
    assert list(registry.complete_models()) == [complete]
    assert list(registry.complete_models(evicted=True)) == [complete]
    assert list(registry.complete_models(evicted=False)) == []
    with pytest.raises(EvictedError, match="rebuild"):
        registry.verify(complete)
    assert registry.gc(grace_seconds=0) == []
    link = registry.lineage(complete).verify().model
    assert (link.state, link.note) == ("claimed", "evicted")

    with registry.checkout(complete) as directory:
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert not registry.get(CompleteModel, complete.name).evicted
    registry.verify(complete)
    assert registry.gc(grace_seconds=0) == []
    actions = [event.action for event in registry.events(complete)]
    assert actions == ["rebuilt", "evicted", "created"]
    job = registry.jobs()[0]
    assert (job.kind, job.name, job.state) == ("rebuild", complete.name, "succeeded")


def test_what_an_evicted_model_is_rebuilt_from_is_not_deleted(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    registry.evict(complete)
    customized = registry.customized_models()[0]
    with pytest.raises(InUseError, match="rebuild"):
        registry.delete(customized)
    registry.delete(complete)
    assert not (registry.root / "evicted" / complete.name).exists()
    registry.delete(customized)


def test_a_model_that_cannot_be_rebuilt_is_not_evicted(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    registry.delete(registry.get(CustomizedModel, complete.customized))
    with pytest.raises(NotFoundError, match="cannot be merged again"):
        registry.evict(complete)
    registry.verify(complete)


def test_a_model_that_is_read_is_not_evicted(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    with registry.checkout(complete), pytest.raises(InUseError):
        registry.evict(complete)
    registry.verify(complete)


def during_an_eviction(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let something happen while the next eviction publishes what it keeps."""
    real = Shelf.put

    def put(shelf: Shelf, staging: Path, key: str, lease: Lease) -> None:
        if key.startswith("evicted/"):
            monkeypatch.setattr(Shelf, "put", real)
            act()
        real(shelf, staging, key, lease)

    monkeypatch.setattr(Shelf, "put", put)


@pytest.mark.parametrize("kind", [BaseModel, CustomizedModel])
def test_what_a_model_was_made_of_is_not_deleted_while_it_is_evicted(
    registry: ModelRegistry,
    complete: CompleteModel,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[BaseModel | CustomizedModel],
) -> None:
    parent = registry.get(kind, complete.base if kind is BaseModel else complete.customized)

    def delete() -> None:
        with pytest.raises(InUseError):
            reopened(registry).delete(parent)

    during_an_eviction(monkeypatch, delete)
    assert registry.evict(complete).evicted
    with registry.checkout(complete):
        pass


def test_a_model_whose_base_or_adapter_is_gone_is_not_evicted(
    registry: ModelRegistry, complete: CompleteModel, tiny_base: Path, tmp_path: Path
) -> None:
    """Its bytes may be the last that there are."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    registry.relocate_base_model("llama-tiny", copy)
    copy.rename(tmp_path / "gone")
    with pytest.raises(BaseModelMissingError):
        registry.evict(complete)

    (registry.root / "registry.db").unlink()
    again = reopened(registry)
    again.reindex()
    assert again.usage().reclaimable == 0  # it is not known where the base lies
    with pytest.raises(BaseModelMissingError):
        again.evict(complete)

    again.relocate_base_model("llama-tiny", tiny_base)
    assert again.usage().reclaimable == again.usage().complete
    shutil.rmtree(again.root / "customized" / complete.customized)
    with pytest.raises(NotFoundError):
        again.evict(complete)
    again.verify(complete)
    assert not again.get(CompleteModel, complete.name).evicted


def test_a_card_that_changes_during_an_eviction_is_kept(
    registry: ModelRegistry, complete: CompleteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    during_an_eviction(
        monkeypatch, lambda: reopened(registry).add_evaluation(complete, {"acc": 0.9})
    )
    with pytest.raises(InUseError, match="changed"):
        registry.evict(complete)
    registry.evict(complete)
    registry.rebuild(complete).result(progress=False)
    (registry.root / "registry.db").unlink()
    again = reopened(registry)
    again.reindex()
    assert again.get(CompleteModel, complete.name).card.evaluation.metrics == {"acc": 0.9}


def test_a_model_that_somebody_begins_to_read_is_not_evicted(
    registry: ModelRegistry, complete: CompleteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as reading:
        during_an_eviction(
            monkeypatch, lambda: reading.enter_context(reopened(registry).checkout(complete))
        )
        with pytest.raises(InUseError):
            registry.evict(complete)
        registry.verify(complete)
    registry.evict(complete)


def test_other_bytes_are_never_put_back(registry: ModelRegistry, complete: CompleteModel) -> None:
    """A record that promises other bytes stands for a library whose sums are others."""
    promised = evolve(complete, digest="blake3:" + "0" * 64)
    registry.evict(complete)
    with registry.catalog.database.write() as connection:
        registry.catalog.levels.put(connection, evolve(promised, evicted=True))
    with pytest.raises(NotReproducible, match="merging again gives"):
        registry.rebuild(complete.name).result(progress=False)
    assert stored(registry) == []


def test_many_that_need_an_evicted_model_have_it_rebuilt_once(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    registry.evict(complete)
    jobs: list[Job[CompleteModel]] = []
    threads = [
        threading.Thread(target=lambda: jobs.append(registry.rebuild(complete))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [job.result(progress=False) for job in jobs] == [complete] * 3
    assert [event.action for event in registry.events(complete)].count("rebuilt") == 1
    registry.verify(complete)


@pytest.mark.parametrize(
    ("owner", "method", "is_evicted"), [(Levels, "put", False), (Shelf, "remove", True)]
)
def test_an_eviction_that_is_killed_loses_nothing(
    registry: ModelRegistry,
    complete: CompleteModel,
    owner: type,
    method: str,
    is_evicted: bool,
) -> None:
    killed_in(owner, method, lambda: registry.evict(complete))
    again = reopened(registry)
    assert again.get(CompleteModel, complete.name).evicted == is_evicted
    assert again.gc(grace_seconds=0) != []
    with again.checkout(complete):
        pass
    again.verify(complete)
    again.evict(complete)


def test_a_lost_database_is_made_again_with_its_evicted_models(
    registry: ModelRegistry, complete: CompleteModel, tiny_base: Path
) -> None:
    registry.evict(complete)
    (registry.root / "registry.db").unlink()
    again = reopened(registry)
    assert complete.name in again.reindex()
    assert again.get(CompleteModel, complete.name).evicted
    again.relocate_base_model("llama-tiny", tiny_base)
    with again.checkout(complete):
        pass
    again.verify(complete)


def test_a_fleet_on_one_base_costs_its_adapters(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    whole = registry.usage()
    assert whole.reclaimable == whole.complete > whole.customized > 0
    registry.evict(complete)
    left = registry.usage()
    assert (left.complete, left.reclaimable, left.evicted) == (0, 0, whole.complete)
    assert left.customized == whole.customized


def test_an_evicted_model_whose_base_has_changed_says_so(
    registry: ModelRegistry, complete: CompleteModel, tmp_path: Path, tiny_base: Path
) -> None:
    registry.evict(complete)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_base, moved)
    registry.relocate_base_model("llama-tiny", moved)
    with (moved / "config.json").open("a") as config:
        config.write(" ")
    with pytest.raises(ValueError, match="not the one that was added"):
        registry.rebuild(complete).result(progress=False)
