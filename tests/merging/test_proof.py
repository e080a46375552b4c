"""Proving what was merged: before it is published, and again later."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from attrs import evolve
from peft.tuners.lora import Linear

from customized_models import (
    BaseModel,
    BaseModelMissingError,
    CompleteModel,
    CustomizedModel,
    IntegrityError,
    MergeError,
    Merger,
    ModelRegistry,
    NotFoundError,
    NotReproducible,
)
from customized_models.adapters.intake import Adapter
from customized_models.files.digests import hash_file
from customized_models.files.manifest import MANIFEST, Manifest
from customized_models.files.safetensors import Checkpoint
from customized_models.jobs.work import Work
from customized_models.merging import MergeExecution, open_merge
from customized_models.merging.merger import run_save
from customized_models.merging.proof import different, prove
from customized_models.merging.writing import write_checkpoint
from customized_models.models import no_progress
from customized_models.naming import complete_name
from customized_models.sources import merge_of
from customized_models.testing import tiny_llama, tiny_lora


def flip(directory: Path, name: str) -> None:
    """Change the lowest bit of a tensor's last element in its file."""
    checkpoint = Checkpoint.open(directory)
    info = checkpoint.infos[name]
    at = info.end - checkpoint.read(name).element_size()
    with (directory / info.file).open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def is_target(name: str) -> bool:
    return "q_proj" in name or "down_proj" in name


Saved = tuple[Path, CustomizedModel, CompleteModel]


@pytest.fixture(scope="module")
def saved(tiny_base: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A registry's root with a saved model in it: tests take copies."""
    root = tmp_path_factory.mktemp("saved") / "models"
    registry = ModelRegistry(root)
    registry.add_base_model("llama-tiny", tiny_base)
    customized = registry.register(tiny_adapter, train_name="support")
    return root, customized, Merger(registry).save(customized).result(progress=False)


@pytest.fixture
def registry(saved: Saved, tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(shutil.copytree(saved[0], tmp_path / "models"))


@pytest.fixture
def customized(saved: Saved) -> CustomizedModel:
    return saved[1]


@pytest.fixture
def complete(saved: Saved) -> CompleteModel:
    return saved[2]


# Before publishing


@pytest.mark.parametrize(
    "chosen",
    [
        lambda name: "q_proj" in name,
        lambda name: "down_proj" in name,
        lambda name: not is_target(name),
    ],
    ids=["one changed shape", "the other changed shape", "all others"],
)
def test_bytes_that_change_behind_the_writer_are_found_and_nothing_is_published(
    registry: ModelRegistry,
    customized: CustomizedModel,
    complete: CompleteModel,
    chosen: Callable[[str], bool],
) -> None:
    id, lease = str(uuid.uuid4()), registry.catalog.lease()
    staging = registry.root / ".staging" / f"save-{lease.owner}"
    flipped: set[str] = set()

    def damage(phase: str, done: int, total: int) -> None:
        if phase == "proving" and not flipped:
            flipped.update(filter(chosen, Checkpoint.open(staging).infos))
            for name in flipped:
                flip(staging, name)

    work = Work(
        id=uuid.UUID(id),
        name=complete_name(customized.name, uuid.UUID(id)),
        arguments={"customized": customized.name},
        catalog=registry.catalog,
        shelf=registry.shelf,
        lease=lease,
        progress=damage,
    )
    with pytest.raises(MergeError, match="nothing was published") as caught:
        run_save(work)

    assert any(name in str(caught.value) for name in flipped)
    assert not staging.exists()
    assert list(registry.shelf.storage.keys("complete/")) == [f"complete/{complete.name}"]
    assert list(registry.complete_models()) == [complete]


def test_peft_itself_computes_the_samples_again_one_of_each_shape(
    registry: ModelRegistry,
    customized: CustomizedModel,
    complete: CompleteModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products: list[tuple[int, ...]] = []
    original = Linear.get_delta_weight

    def counted(self: Linear, adapter: str) -> torch.Tensor:
        product: torch.Tensor = original(self, adapter)
        products.append(tuple(product.shape))
        return product

    base = registry.get(BaseModel, customized.base)
    with merge_of(registry.local_path(base), registry.local_path(customized)) as merged:
        monkeypatch.setattr(Linear, "get_delta_weight", counted)
        prove(merged, registry.local_path(complete), "seed", no_progress)
    assert sorted(products) == [(64, 64), (64, 96)]


@pytest.fixture(scope="module")
def merged(tiny_base: Path, tiny_adapter: Path) -> tuple[Checkpoint, Callable[[], MergeExecution]]:
    base = Checkpoint.open(tiny_base)
    return base, lambda: open_merge(base, Adapter.open(tiny_adapter))


def test_a_single_bit_in_any_tensor_is_found(
    merged: tuple[Checkpoint, Callable[[], MergeExecution]], tmp_path: Path
) -> None:
    base, opened = merged
    merge = opened()
    write_checkpoint(merge, base, tmp_path, no_progress, merge.changed)
    merge = opened()
    assert (
        different(Checkpoint.open(tmp_path), base, merge, merge.infos, no_progress, merge.blocks)
        == set()
    )
    for name in base.infos:
        flip(tmp_path, name)
        found = different(
            Checkpoint.open(tmp_path), base, merge, merge.infos, no_progress, merge.read
        )
        flip(tmp_path, name)
        assert found == {name}


def test_a_tensor_of_another_dtype_is_found_even_if_it_was_not_sampled(
    merged: tuple[Checkpoint, Callable[[], MergeExecution]], tmp_path: Path
) -> None:
    base, opened = merged
    merge = opened()
    write_checkpoint(merge, base, tmp_path, no_progress, merge.changed)
    written = Checkpoint.open(tmp_path)
    name = "model.norm.weight"
    other = {**written.infos, name: evolve(written.infos[name], dtype="F16")}
    assert different(evolve(written, infos=other), base, merge, (), no_progress, merge.blocks) == {
        name
    }


# Later


@contextmanager
def rewritten(registry: ModelRegistry, complete: CompleteModel) -> Iterator[Path]:
    """Its directory, to be changed; its manifest then states what is there."""
    directory = registry.local_path(complete)
    manifest = Manifest.read(directory)
    yield directory
    (directory / MANIFEST).unlink()
    content = {name: hash_file(directory / name) for name in manifest.content}
    evolve(manifest, content=content, recipe=complete.recipe).write(directory)


def stored(registry: ModelRegistry, complete: CompleteModel) -> CompleteModel:
    return evolve(complete, digest=Manifest.read(registry.local_path(complete)).digest)


def test_a_saved_model_is_what_its_base_and_adapter_give(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    Merger(registry).verify(complete)


def test_damaged_bytes_are_told_apart_from_the_manifest(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    name = "model.norm.weight"
    flip(registry.local_path(complete), name)
    with pytest.raises(IntegrityError, match="files differ from the manifest"):
        Merger(registry).verify(complete)


def test_what_the_manifest_vouches_for_is_still_compared_with_the_parents(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    with rewritten(registry, complete) as directory:
        flip(directory, name)
        (directory / "tokenizer_config.json").write_text("{}")
    with pytest.raises(IntegrityError, match="not as recorded"):
        Merger(registry).verify(complete)
    with pytest.raises(IntegrityError, match="not what its base and adapter give") as caught:
        Merger(registry).verify(stored(registry, complete))
    assert name in str(caught.value)
    assert "tokenizer_config.json" in str(caught.value)


def test_other_bytes_of_another_machine_are_not_called_damage(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    elsewhere = evolve(complete, recipe={**complete.recipe, "torch": "2.0", "threads": 96})
    with rewritten(registry, elsewhere) as directory:
        flip(directory, "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(NotReproducible, match=r"down_proj.*threads \('96' then.*torch \('2.0' "):
        Merger(registry).verify(stored(registry, elsewhere))


def test_without_its_adapter_a_model_cannot_be_merged_again(
    registry: ModelRegistry, customized: CustomizedModel, complete: CompleteModel
) -> None:
    registry.delete(customized)
    for attempt in (Merger(registry).verify, Merger(registry).rebuild):
        with pytest.raises(NotFoundError, match=customized.name):
            attempt(complete)


def test_without_its_base_a_model_cannot_be_merged_again(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("moved", base)
    adapter = tiny_lora(tmp_path / "adapter", base)
    customized = registry.register(adapter, train_name="support")
    complete = Merger(registry).save(customized).result(progress=False)
    base.rename(tmp_path / "elsewhere")

    for attempt in (Merger(registry).verify, Merger(registry).rebuild):
        with pytest.raises(BaseModelMissingError, match="relocate_base_model"):
            attempt(complete)

    registry.relocate_base_model("moved", tmp_path / "elsewhere")
    Merger(registry).verify(complete)


def test_a_deleted_model_is_rebuilt_with_the_same_digest(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    registry.delete(complete)
    rebuilt = Merger(registry).rebuild(complete).result(progress=False)

    assert rebuilt.digest == complete.digest
    assert rebuilt.name != complete.name
    assert list(registry.complete_models()) == [rebuilt]
    registry.verify(rebuilt)


def test_a_recipe_that_differs_without_changing_a_bit_rebuilds_the_same_model(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    elsewhere = evolve(complete, recipe={**complete.recipe, "threads": 96})
    with rewritten(registry, elsewhere):
        pass
    elsewhere = stored(registry, elsewhere)
    assert elsewhere.digest != complete.digest

    rebuilt = Merger(registry).rebuild(elsewhere).result(progress=False)
    assert (rebuilt.digest, rebuilt.recipe) == (elsewhere.digest, elsewhere.recipe)


def test_a_rebuild_that_comes_out_different_names_the_fields_and_publishes_nothing(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    recipe = {**complete.recipe, "torch": "2.0", "threads": 96}
    other = evolve(complete, recipe=recipe, digest="sha256:" + "0" * 64)
    with pytest.raises(NotReproducible, match=r"threads \('96' then.*torch \('2.0' then") as caught:
        Merger(registry).rebuild(other).result(progress=False)
    assert "transformers" not in str(caught.value)
    assert list(registry.complete_models()) == [complete]
    assert list((registry.root / ".staging").iterdir()) == []
