"""The database: made by the first write, empty where there is none, refused if it is not ours."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from customized_models import DatabaseError, ModelRegistry, StorageError, UnsupportedError
from customized_models.catalog.database import Database


def test_the_first_write_makes_what_reading_did_not(tmp_path: Path, tiny_base: Path) -> None:
    registry = ModelRegistry(tmp_path / "a/b")
    assert list(registry.base_models()) == []
    base = registry.add_base_model("llama-tiny", tiny_base)
    assert list(registry.base_models()) == [base]


def test_two_that_have_read_nothing_see_what_one_writes(tmp_path: Path, tiny_base: Path) -> None:
    reading, writing = ModelRegistry(tmp_path / "a"), ModelRegistry(tmp_path / "a")
    assert not reading.base_models()
    writing.add_base_model("llama-tiny", tiny_base)
    assert len(reading.base_models()) == 1


def test_a_file_without_tables_is_read_as_empty(tmp_path: Path) -> None:
    """Another process may be about to make them."""
    (tmp_path / "registry.db").touch()
    assert list(ModelRegistry(tmp_path).base_models()) == []
    assert (tmp_path / "registry.db").stat().st_size == 0


def test_a_registry_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(StorageError, match="not a directory"):
        list(ModelRegistry(tmp_path / "models").base_models())


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "registry.db")) as connection, connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(DatabaseError, match="version 99"):
        list(ModelRegistry(tmp_path).base_models())


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:SECRET@host/db",
        "SECRET",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///~/SECRET.db",
        "sqlite:///SECRET.db?mode=ro",
        "sqlite+aiosqlite:///SECRET.db",
    ],
)
def test_a_database_of_another_kind_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UnsupportedError, match="sqlite:///") as refused:
        Database(url)
    assert "SECRET" not in str(refused.value)
