"""Where models come from: claimed by records, verified by bytes, missing where they are gone."""

from __future__ import annotations

import os
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub import ModelCard as HubCard
from safetensors import safe_open

from customized_models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    InUseError,
    Lineage,
    LiveModel,
    LocalStorage,
    Merger,
    ModelRegistry,
    NotFoundError,
    Served,
    StorageError,
)
from customized_models.testing import tiny_llama, tiny_lora


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    return registry.register(tiny_adapter, train_name="My <run>")


@pytest.fixture
def complete(registry: ModelRegistry, customized: CustomizedModel) -> CompleteModel:
    return Merger(registry).save(customized).result(progress=False)


def states(lineage: Lineage) -> list[tuple[str, str]]:
    return [(link.level, link.state) for link in lineage.links]


def test_a_lineage_leads_to_the_training_and_the_base(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    base = registry.get(BaseModel, "llama-tiny")
    lineage = registry.lineage(complete)
    assert states(lineage) == [
        ("complete", "claimed"),
        ("customized", "claimed"),
        ("training", "claimed"),
        ("base", "claimed"),
    ]
    assert [link.digest for link in lineage.links] == [
        complete.digest,
        complete.customized_digest,
        "",
        base.digest,
    ]
    assert str(lineage) == (
        f"complete  {complete.name}  {complete.digest[:15]}  claimed\n"
        f"└─ made of\n"
        f"   └─ customized  {complete.customized}  {complete.customized_digest[:15]}  claimed\n"
        f"      ├─ training  {registry.customized_models()[0].training_id}  claimed (My <run>)\n"
        f"      └─ base  llama-tiny  {base.digest[:15]}  claimed"
    )
    assert states(lineage.verify()) == [
        ("complete", "verified"),
        ("customized", "verified"),
        ("training", "claimed"),
        ("base", "verified"),
    ]


def test_a_lineage_leads_to_what_was_made(
    registry: ModelRegistry, customized: CustomizedModel, complete: CompleteModel
) -> None:
    base = registry.lineage("llama-tiny")
    (child,) = base.model.children
    assert (child.level, child.name) == ("customized", customized.name)
    assert [link.name for link in child.children] == [complete.name]
    assert f"made into\n   └─ customized  {customized.name}" in str(base)
    picture = base._repr_html_()
    assert picture.startswith("<svg")
    assert complete.name in picture
    assert "My &lt;run&gt;" in registry.lineage(complete)._repr_html_()


def test_what_was_deleted_keeps_its_facts(
    registry: ModelRegistry, customized: CustomizedModel, complete: CompleteModel
) -> None:
    registry.delete(customized)
    lineage = registry.lineage(complete)
    assert states(lineage) == [
        ("complete", "claimed"),
        ("customized", "missing"),
        ("training", "claimed"),
        ("base", "claimed"),
    ]
    gone, training = lineage.links[1:3]
    assert (gone.name, gone.digest) == (customized.name, customized.digest)
    assert "deleted" in gone.note
    assert training.name == str(customized.training_id)
    assert states(lineage.verify())[1] == ("customized", "missing")
    registry.delete(registry.get(BaseModel, "llama-tiny"))
    assert states(registry.lineage(complete))[3] == ("base", "missing")


def test_another_base_of_the_name_is_not_taken_for_that_of_a_deleted_model(
    registry: ModelRegistry, customized: CustomizedModel, tmp_path: Path
) -> None:
    """An adapter that is live by itself has nothing else to say what its base was."""
    base = registry.get(BaseModel, "llama-tiny")
    live = LiveModel(
        name="live",
        source=customized.name,
        source_digest=customized.digest,
        base=base.name,
        train_name=customized.train_name,
        quantization="q8_0",
        environment="here",
        served=Served("live", "http://127.0.0.1", "openai", "sha256:0"),
        deploying_id=uuid.uuid4(),
        created=datetime.now(UTC),
        state="undeployed",
    )
    with registry.catalog.database.write() as connection:
        registry.catalog.levels.insert_pending(connection, live, "")
        registry.catalog.levels.make_visible(connection, live, "")
    registry.delete(customized)
    registry.delete(base)
    tiny_llama(tmp_path / "other", intermediate_size=128)
    registry.add_base_model(base.name, tmp_path / "other")
    link = registry.lineage(live).verify().links[-1]
    assert (link.level, link.digest, link.state) == ("base", base.digest, "missing")


def test_what_cannot_be_read_now_is_not_called_damaged(
    registry: ModelRegistry, customized: CustomizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(storage: LocalStorage, key: str) -> None:
        raise StorageError("timeout")

    monkeypatch.setattr(LocalStorage, "checkout", fail)
    link = registry.lineage(customized).verify().model
    assert (link.state, "timeout" in link.note) == ("claimed", True)


def test_another_model_of_the_same_name_is_not_taken_for_a_parent(
    registry: ModelRegistry,
    customized: CustomizedModel,
    complete: CompleteModel,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    registry.delete(customized)
    other = tiny_lora(tmp_path / "other", tiny_base, seed=7)
    again = registry.register(other, train_name="My <run>", training_id=customized.training_id)
    assert again.name == customized.name
    assert states(registry.lineage(complete))[1] == ("customized", "missing")
    assert registry.lineage(again).model.children == ()


def test_without_a_log_a_missing_parent_is_still_named(
    registry: ModelRegistry, customized: CustomizedModel, complete: CompleteModel, tiny_base: Path
) -> None:
    registry.delete(customized)
    (registry.root / "registry.db").unlink()
    again = ModelRegistry(registry.root)
    again.reindex()
    lineage = again.lineage(complete.name)
    assert states(lineage) == [
        ("complete", "claimed"),
        ("customized", "missing"),
        ("base", "claimed"),
    ]
    assert lineage.links[1].digest == customized.digest
    assert states(lineage.verify())[2] == ("base", "missing")  # it is not known where it lies


def test_verifying_says_what_is_damaged(
    registry: ModelRegistry, customized: CustomizedModel, complete: CompleteModel
) -> None:
    weights = registry.local_path(customized) / "adapter_model.safetensors"
    os.chmod(weights, 0o600)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    lineage = registry.lineage(complete).verify()
    assert dict(states(lineage))["customized"] == "damaged"
    assert "adapter_model.safetensors" in lineage.links[1].note
    assert dict(states(lineage))["complete"] == "verified"


def test_a_lineage_becomes_json(registry: ModelRegistry, complete: CompleteModel) -> None:
    document = registry.lineage(complete).model.to_dict()
    assert document["parents"][0]["parents"][1]["name"] == "llama-tiny"
    with pytest.raises(NotFoundError):
        registry.lineage("nothing")


def test_a_copy_of_the_files_says_where_they_come_from(
    registry: ModelRegistry, customized: CustomizedModel, complete: CompleteModel
) -> None:
    """In its weights as well as in its card, and the weights are still what a merge gives."""
    base = registry.get(BaseModel, "llama-tiny")
    directory = registry.local_path(complete)
    for weights in directory.glob("*.safetensors"):
        with safe_open(weights, "pt") as opened:
            assert opened.metadata() == {
                "format": "pt",
                "customized_models.base": base.digest,
                "customized_models.customized": customized.digest,
            }
    said = HubCard.load(directory / "README.md").data.to_dict()["customized_models"]
    assert (said["customized_digest"], said["base_digest"]) == (customized.digest, base.digest)
    assert said["digest"] == complete.digest
    of_adapter = HubCard.load(registry.local_path(customized) / "README.md").data.to_dict()
    assert of_adapter["customized_models"]["training_id"] == str(customized.training_id)
    Merger(registry).verify(complete)


# Deleting and bytes


def test_a_deletion_is_planned_before_it_is_done(
    registry: ModelRegistry, customized: CustomizedModel, complete: CompleteModel
) -> None:
    base = registry.plan_deletion("llama-tiny")
    assert "is the base of" in base.refused
    assert (base.dependents, base.freed) == ((customized.name,), 0)

    plan = registry.plan_deletion(customized)
    assert (plan.refused, plan.dependents) == ("", (complete.name,))
    usage = registry.usage()
    assert plan.freed == usage.customized > 0
    registry.set_alias(customized, "champion", protected=True)
    refused = registry.plan_deletion(customized).refused
    with pytest.raises(InUseError) as raised:
        registry.delete(customized)
    assert str(raised.value) == refused
    registry.remove_alias(customized, "champion")
    registry.delete(customized)
    assert registry.usage().customized == 0


def test_usage_counts_the_bytes_of_all_files(
    registry: ModelRegistry, customized: CustomizedModel, complete: CompleteModel
) -> None:
    def size(model: CustomizedModel | CompleteModel) -> int:
        named = ("manifest.json", "README.md")
        files = registry.local_path(model).rglob("*")
        return sum(f.stat().st_size for f in files if f.is_file() and f.name not in named)

    usage = registry.usage()
    assert (usage.customized, usage.complete) == (size(customized), size(complete))
    assert usage.total == usage.customized + usage.complete
    assert usage.reclaimable == usage.complete
    assert registry.gc(grace_seconds=0) == []
    damaged = registry.root / "gguf" / "damaged"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{")
    assert registry.usage() == usage
    registry.delete(customized)
    assert registry.usage().reclaimable == 0
    (registry.root / "registry.db").unlink()
    again = ModelRegistry(registry.root)
    again.reindex()
    assert again.usage().complete == usage.complete
