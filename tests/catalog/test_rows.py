"""Rows of the database: damage is found, named, and hurts nobody else."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, update

from customized_models import (
    BaseModel,
    CustomizedModel,
    CustomizedModelsError,
    IntegrityError,
    ModelRegistry,
)
from customized_models.catalog.listing import DamagedRowWarning
from customized_models.catalog.schema import customized_models as table
from tests.models import only_sqlite

COLUMNS = ("base", "train_name", "training_id", "stage", "operation", "value", "digest", "name")


@pytest.fixture
def models(registry: ModelRegistry, tiny_adapter: Path) -> list[CustomizedModel]:
    return [registry.register(tiny_adapter, train_name=f"run-{n}") for n in range(3)]


@pytest.fixture
def without_its_database(
    registry: ModelRegistry, databases: Callable[[str, Path], str], tmp_path: Path
) -> ModelRegistry:
    """The registry with an empty database of the same kind."""
    kind = registry.catalog.database.url.partition(":")[0].partition("+")[0]
    return ModelRegistry(registry.root, database=databases(kind, tmp_path / "new"))


def damage(registry: ModelRegistry, name: str, old: str, new: str) -> None:
    """Replace text in the value of a customized model's row, as rot or a hand may do."""
    with registry.catalog.database.write() as connection:
        damaged = {"value": func.replace(table.c.value, old, new)}
        connection.execute(update(table).where(table.c.name == name).values(damaged))


def test_a_damaged_row_is_named_and_not_another_value(
    registry: ModelRegistry, models: list[CustomizedModel]
) -> None:
    damage(registry, models[1].name, '"peft_type":"LORA"', '"peft_type":"LORB"')
    with pytest.raises(IntegrityError, match=f"{models[1].name}.*reindex"):
        registry.get(CustomizedModel, models[1].name)


def test_a_damaged_row_does_not_keep_the_others_from_being_listed(
    registry: ModelRegistry, models: list[CustomizedModel]
) -> None:
    damage(registry, models[1].name, '"peft_type":"LORA"', '"peft_type":"LORB"')
    with pytest.warns(DamagedRowWarning, match=models[1].name):
        assert list(registry.customized_models()) == [models[2], models[0]]
    assert models[0].name in registry.customized_models()._repr_html_()


@only_sqlite
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    column=st.sampled_from(COLUMNS),
    position=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 6),
)
def test_a_flipped_bit_in_a_row_is_an_error_of_ours_or_does_not_show(
    registry: ModelRegistry,
    models: list[CustomizedModel],
    column: str,
    position: float,
    bit: int,
) -> None:
    path = registry.root / "registry.db"
    sound = path.read_bytes()
    name = models[1].name
    with closing(sqlite3.connect(path)) as connection:
        query = f"SELECT {column} FROM customized_models WHERE name = ?"
        text = str(connection.execute(query, (name,)).fetchone()[0]).encode()
    if not text:
        return
    data = bytearray(text)
    data[int(position * len(data))] ^= 1 << bit
    try:
        with closing(sqlite3.connect(path)) as connection, connection:
            statement = f"UPDATE customized_models SET {column} = CAST(? AS TEXT) WHERE name = ?"
            connection.execute(statement, (bytes(data), name))
        with suppress(CustomizedModelsError):
            assert registry.get(CustomizedModel, name) == models[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DamagedRowWarning)
            others = [model for model in registry.customized_models() if model.name != name]
        assert [model for model in others if model in models] == [models[2], models[0]]
    finally:
        path.write_bytes(sound)


# The manifests can make the rows again


def test_the_database_is_made_again_from_what_is_stored(
    without_its_database: ModelRegistry, models: list[CustomizedModel], tiny_base: Path
) -> None:
    again = without_its_database
    assert list(again.customized_models()) == []

    made = again.reindex()

    assert sorted(made) == sorted(["llama-tiny", *(model.name for model in models)])
    assert sorted(again.customized_models(), key=str) == sorted(models, key=str)
    assert again.reindex() == []
    with pytest.raises(CustomizedModelsError, match="relocate_base_model"):
        again.local_path(again.get(BaseModel, "llama-tiny"))
    again.relocate_base_model("llama-tiny", tiny_base)
    again.verify(models[0])


def test_a_damaged_row_is_made_again(
    registry: ModelRegistry, models: list[CustomizedModel]
) -> None:
    damage(registry, models[1].name, '"peft_type":"LORA"', '"peft_type":"LORB"')
    assert registry.reindex() == [models[1].name]
    assert registry.get(CustomizedModel, models[1].name) == models[1]


def test_a_damaged_manifest_does_not_keep_the_others_from_being_indexed(
    registry: ModelRegistry, models: list[CustomizedModel], without_its_database: ModelRegistry
) -> None:
    manifest = registry.local_path(models[1]) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"train_name": "run-1"', '"train_name": "x"'))
    again = without_its_database
    with pytest.raises(IntegrityError, match=models[1].name):
        again.reindex()
    assert sorted(again.customized_models(), key=str) == sorted([models[0], models[2]], key=str)
