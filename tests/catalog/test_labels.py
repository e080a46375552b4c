"""Tags, descriptions and aliases: said of models, never part of them."""

from __future__ import annotations

import threading
import uuid
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest

from customized_models import (
    CompleteModel,
    CustomizedModel,
    Deployer,
    DeploymentEnvironment,
    InUseError,
    InvalidNameError,
    Labels,
    LiveModel,
    Merger,
    ModelRegistry,
    NotFoundError,
    Served,
)
from customized_models.testing import tiny_lora


@pytest.fixture
def pair(
    registry: ModelRegistry, tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> tuple[CustomizedModel, CustomizedModel]:
    """Two models of one training's name."""
    other = tiny_lora(tmp_path / "other", tiny_base, seed=1)
    return (
        registry.register(tiny_adapter, train_name="support"),
        registry.register(other, train_name="support"),
    )


def test_what_is_said_of_a_model_changes_nothing_of_it(
    registry: ModelRegistry, pair: tuple[CustomizedModel, CustomizedModel]
) -> None:
    model, _ = pair
    manifest = (registry.local_path(model) / "manifest.json").read_bytes()

    registry.tag(model, "keep", "team:nlp")
    registry.tag(model, "keep")
    registry.set_description(model, "The first that <answers>.")
    registry.set_alias(model, "champion")

    assert registry.labels(model) == Labels(
        ("keep", "team:nlp"), ("champion@support",), "The first that <answers>."
    )
    assert "&lt;answers&gt;" in registry.labels(model)._repr_html_()
    assert registry.get(CustomizedModel, model.name) == model
    assert (registry.local_path(model) / "manifest.json").read_bytes() == manifest
    registry.verify(model)

    registry.untag(model, "keep", "never-there")
    registry.set_description(model, "")
    registry.remove_alias(model, "champion")
    assert registry.labels(model) == Labels(("team:nlp",))


def test_an_alias_means_a_model_wherever_a_name_is_taken(
    registry: ModelRegistry, pair: tuple[CustomizedModel, CustomizedModel]
) -> None:
    model, other = pair
    registry.set_alias(model, "champion")
    assert registry.get(CustomizedModel, "champion@support") == model
    registry.verify("champion@support")
    with registry.checkout("champion@support") as directory:
        assert directory == registry.local_path(model)
    assert Merger(registry).plan("champion@Support").customized == model.name

    registry.set_alias(other, "champion")
    assert registry.get(CustomizedModel, "champion@support") == other
    assert registry.labels(model).aliases == ()
    registry.delete("champion@support")
    assert [m.name for m in registry.customized_models()] == [model.name]
    with pytest.raises(NotFoundError, match="set_alias"):
        registry.get(CustomizedModel, "champion@support")


def test_an_alias_belongs_to_one_level(
    registry: ModelRegistry, pair: tuple[CustomizedModel, CustomizedModel]
) -> None:
    model, _ = pair
    registry.set_alias(model, "champion")
    complete = Merger(registry).save("champion@support").result(progress=False)
    with pytest.raises(NotFoundError):
        registry.get(CompleteModel, "champion@support")
    registry.set_alias(complete, "champion")
    assert registry.get(CompleteModel, "champion@support") == complete
    assert list(registry.complete_models(customized="champion@support")) == [complete]
    registry.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
    with pytest.raises(NotFoundError, match="nobody"):
        Deployer(registry).deploy("nobody@support")


def test_a_protected_alias_keeps_its_model_from_being_deleted(
    registry: ModelRegistry, pair: tuple[CustomizedModel, CustomizedModel]
) -> None:
    model, other = pair
    registry.set_alias(model, "champion", protected=True)
    with pytest.raises(InUseError, match="champion@support"):
        registry.delete(model)
    registry.set_alias(other, "champion")  # moves, and stays protected
    registry.delete(model)
    with pytest.raises(InUseError, match="champion@support"):
        registry.delete(other)
    registry.set_alias(other, "champion", protected=False)
    registry.delete(other)


def test_what_was_said_of_a_deleted_model_is_not_said_of_the_next(
    registry: ModelRegistry, pair: tuple[CustomizedModel, CustomizedModel], tiny_adapter: Path
) -> None:
    model, _ = pair
    registry.tag(model, "keep")
    registry.set_alias(model, "champion")
    registry.delete(model)
    again = registry.register(tiny_adapter, train_name="support", training_id=model.training_id)
    assert again.name == model.name
    assert registry.labels(again) == Labels()


def test_of_many_that_move_an_alias_at_once_one_is_the_last(
    registry: ModelRegistry, pair: tuple[CustomizedModel, CustomizedModel]
) -> None:
    """Law: the alias always means one model, and the log tells of every move in its order."""

    def move(model: CustomizedModel) -> None:
        for _ in range(5):
            registry.set_alias(model, "champion")

    threads = [threading.Thread(target=move, args=(model,)) for model in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moves = registry.events("champion@support")[::-1]
    assert moves[0].before == {"alias": "champion@support"}
    for move_before, move_after in pairwise(moves):
        assert move_after.before["model"] == move_before.after["model"]
    assert moves[-1].after["model"] == registry.get(CustomizedModel, "champion@support").name


@pytest.mark.parametrize("alias", ["", "Champion", "a b", "champion@support", "-a"])
def test_an_alias_outside_its_alphabet_is_refused(
    registry: ModelRegistry, pair: tuple[CustomizedModel, CustomizedModel], alias: str
) -> None:
    with pytest.raises(InvalidNameError):
        registry.set_alias(pair[0], alias)


@pytest.mark.parametrize("tag", ["", "a*", "a?", "a\nb", "a" * 101])
def test_a_tag_that_cannot_be_searched_or_shown_is_refused(
    registry: ModelRegistry, pair: tuple[CustomizedModel, CustomizedModel], tag: str
) -> None:
    with pytest.raises(InvalidNameError):
        registry.tag(pair[0], tag)


def test_what_was_said_of_a_deleted_live_model_is_gone_with_it(registry: ModelRegistry) -> None:
    live = LiveModel(
        name="live",
        source="support",
        source_digest="blake3:00",
        base="llama-tiny",
        train_name="support",
        quantization="q8_0",
        environment="here",
        served=Served(name="live", endpoint="http://127.0.0.1", api="openai", digest="sha256:00"),
        deploying_id=uuid.uuid4(),
        created=datetime.now(UTC),
        template_digest=None,
        state="undeployed",
    )
    levels = registry.catalog.levels
    with registry.catalog.database.write() as connection:
        levels.insert_pending(connection, live, "")
        levels.make_visible(connection, live, "")
    registry.tag(live, "keep")
    registry.set_alias(live, "champion")
    registry.delete(live)
    actions = [event.action for event in registry.events("champion@support")]
    assert actions == ["alias removed", "alias set"]
    with pytest.raises(NotFoundError, match="set_alias"):
        registry.get(LiveModel, "champion@support")
    with registry.catalog.database.write() as connection:
        levels.insert_pending(connection, live, "")
        levels.make_visible(connection, live, "")
    assert registry.labels(live) == Labels()
