"""Lists: sequences that read the registry when they are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from customized_models import CustomizedModel, IntegrityError, ModelRegistry
from customized_models.catalog.listing import DamagedRowWarning
from customized_models.catalog.schema import customized_models as table

COUNT = 5


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def sweep(
    request: pytest.FixtureRequest,
    databases: Callable[[str, Path], str],
    tiny_base: Path,
    tiny_adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> ModelRegistry:
    """Five models, each with another loss."""
    root = tmp_path_factory.mktemp("sweep") / "models"
    registry = ModelRegistry(root, database=databases(request.param, root))
    registry.add_base_model("llama-tiny", tiny_base)
    for number in range(COUNT):
        registry.register(
            tiny_adapter,
            train_name=f"run-{number}",
            base_model="llama-tiny",
            evaluation={"eval_loss": (number - 2) ** 2},
        )
    return registry


def names(models: object) -> list[str]:
    return [model.train_name for model in models]  # type: ignore[attr-defined]


def test_a_list_can_be_read_again_and_sees_what_has_changed(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    listing = registry.customized_models()
    assert (list(listing), len(listing), bool(listing), listing.first()) == ([], 0, False, None)
    model = registry.register(tiny_adapter, train_name="a")
    assert list(listing) == list(listing) == [model]
    assert (len(listing), bool(listing), listing.first()) == (1, True, model)
    assert model in listing


@settings(max_examples=30, deadline=None)  # each asks a server several times
@given(index=st.integers(-7, 7), part=st.slices(COUNT))
def test_a_list_is_a_sequence(sweep: ModelRegistry, index: int, part: slice) -> None:
    """Law: it answers as the Python list of the same models."""
    listing, expected = sweep.customized_models(), list(sweep.customized_models())
    assert listing[part] == expected[part]
    assert list(reversed(listing)) == expected[::-1]
    assert listing[: 10**30] == listing[-(10**30) :] == expected
    assert listing[10**30 :] == []
    for beyond in (10**30, -(10**30)):
        with pytest.raises(IndexError):
            listing[beyond]
    try:
        wanted = expected[index]
    except IndexError:
        with pytest.raises(IndexError):
            listing[index]
    else:
        assert listing[index] == wanted


def test_a_loop_sees_what_there_was_when_it_began(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    """So that deleting while it runs skips nothing, and registering ends."""
    for number in range(3):
        registry.register(tiny_adapter, train_name=f"run-{number}")
    seen = []
    for model in registry.customized_models():
        seen.append(model.train_name)
        registry.delete(model)
        registry.register(tiny_adapter, train_name=f"new-{model.train_name}")
    assert seen == ["run-2", "run-1", "run-0"]


def test_the_best_of_a_sweep_is_found_with_pandas(sweep: ModelRegistry) -> None:
    table = sweep.customized_models().to_pandas()
    best = table.sort_values("card.evaluation.metrics.eval_loss").iloc[0]
    assert best["train_name"] == "run-2"
    assert str(table["created"].dtype).endswith("UTC]")
    assert sweep.get(CustomizedModel, best["name"]).train_name == "run-2"
    assert len(sweep.jobs().to_pandas()) == 0


def test_a_damaged_row_has_its_place_in_a_list(registry: ModelRegistry, tiny_adapter: Path) -> None:
    made = [registry.register(tiny_adapter, train_name=f"run-{n}") for n in range(3)]
    with registry.catalog.database.write() as connection:
        second = table.c.name == made[1].name
        connection.execute(update(table).where(second).values(value="{}"))
    listing = registry.customized_models()
    assert len(listing) == 3
    with pytest.raises(IntegrityError, match=made[1].name):
        listing[1]
    with pytest.warns(DamagedRowWarning, match=made[1].name):
        assert listing[:] == [made[2], made[0]]


def test_complete_models_are_told_apart_by_whether_they_are_evicted(sweep: ModelRegistry) -> None:
    assert [list(sweep.complete_models(evicted=e)) for e in (True, False)] == [[], []]


def test_a_list_shows_how_many_there_are(sweep: ModelRegistry) -> None:
    assert repr(sweep.customized_models()) == "<5 CustomizedModels, newest first>"
    assert repr(sweep.base_models()) == "<1 BaseModel, newest first>"
    assert "run-4" in sweep.customized_models()._repr_html_()
