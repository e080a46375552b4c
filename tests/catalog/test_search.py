"""Searches: what is found is what a loop over everything would find, in the order asked for."""

from __future__ import annotations

import functools
import operator
import re
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event

from customized_models import InvalidArgumentError, ModelRegistry, metric, tag
from customized_models.catalog import listing
from customized_models.search import Condition

LOSSES = (1.4, 0.9, None, 1.1, 0.9, None, 2.0)
TAGS = (("keep",), (), ("keep", "team:a"), ("team:b",), (), ("rejected",), ())


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def sweep(
    request: pytest.FixtureRequest,
    databases: Callable[[str, Path], str],
    tiny_base: Path,
    tiny_adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> ModelRegistry:
    """Seven models: five with a loss, some with tags."""
    root = tmp_path_factory.mktemp("sweep") / "models"
    registry = ModelRegistry(root, database=databases(request.param, root))
    registry.add_base_model("llama-tiny", tiny_base)
    for number, (loss, tags) in enumerate(zip(LOSSES, TAGS, strict=True)):
        evaluation = {"steps": 10 * number, "metrics": {} if loss is None else {"eval_loss": loss}}
        made = registry.register(
            tiny_adapter,
            train_name=f"run-{number}",
            evaluation=evaluation,
            training_id=uuid.UUID(int=(number + 1) << 112),
        )
        registry.tag(made, *tags)
    return registry


@frozen
class Case:
    """A condition, and what it means of the number of a model."""

    condition: Condition
    holds: Callable[[int], bool]


def bounds() -> st.SearchStrategy[Case]:
    def case(bound: float, operator: str) -> Case:
        condition = getattr(metric("eval_loss"), operator)(bound)

        def holds(number: int) -> bool:
            loss = LOSSES[number]
            return loss is not None and bool(getattr(loss, operator)(bound))

        return Case(condition, holds)

    operators = st.sampled_from(["__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"])
    return st.builds(case, st.sampled_from([0.5, 0.9, 1.1, 1.25, 2.0]), operators)


def tagged() -> st.SearchStrategy[Case]:
    def case(name: str) -> Case:
        return Case(tag(name), lambda number: name in TAGS[number])

    return st.builds(case, st.sampled_from(["keep", "rejected", "team:a", "none"]))


def joined(parts: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    def both(a: Case, b: Case) -> Case:
        return Case(a.condition & b.condition, lambda n: a.holds(n) and b.holds(n))

    def either(a: Case, b: Case) -> Case:
        return Case(a.condition | b.condition, lambda n: a.holds(n) or b.holds(n))

    def neither(a: Case) -> Case:
        return Case(~a.condition, lambda n: not a.holds(n))

    return (
        st.builds(both, parts, parts) | st.builds(either, parts, parts) | st.builds(neither, parts)
    )


def numbers(models: object) -> list[int]:
    return [int(model.train_name[-1]) for model in models]  # type: ignore[attr-defined]


@settings(max_examples=30, deadline=None)  # each asks a server several times
@given(case=st.recursive(bounds() | tagged(), joined, max_leaves=5))
def test_a_search_finds_what_a_loop_would(sweep: ModelRegistry, case: Case) -> None:
    found = sweep.customized_models().where(case.condition)
    expected = [number for number in range(6, -1, -1) if case.holds(number)]
    assert numbers(found) == expected
    assert len(found) == len(expected)
    assert bool(found) == bool(expected)


@settings(max_examples=30, deadline=None)  # each asks a server several times
@given(part=st.slices(7), index=st.integers(-8, 8))
def test_an_ordered_list_is_a_sequence(sweep: ModelRegistry, part: slice, index: int) -> None:
    """Smallest loss first, of equal ones the newest, and those without one last."""
    listing = sweep.customized_models().order_by(metric("eval_loss"))
    expected = [4, 1, 3, 0, 6, 5, 2]
    assert numbers(listing) == expected
    assert numbers(listing[part]) == expected[part]
    if -7 <= index < 7:
        assert numbers([listing[index]]) == [expected[index]]
    else:
        with pytest.raises(IndexError):
            listing[index]


def test_a_list_is_ordered_by_several_things(sweep: ModelRegistry) -> None:
    every = sweep.customized_models()
    assert numbers(every.order_by(-metric("eval_loss"), "created")) == [6, 0, 3, 1, 4, 2, 5]
    assert numbers(every.order_by(metric("eval_loss"), metric("steps"))) == [1, 4, 3, 0, 6, 2, 5]
    kept = every.where(tag("*")).order_by(metric("eval_loss"), -metric("steps"))
    assert numbers(kept) == [3, 0, 5, 2]
    assert numbers(every.order_by("train_name")) == [0, 1, 2, 3, 4, 5, 6]
    assert numbers(every.order_by("-name")) == [6, 5, 4, 3, 2, 1, 0]
    assert numbers(every.order_by(-metric("steps"))) == [6, 5, 4, 3, 2, 1, 0]
    assert numbers(every.order_by()) == numbers(every)
    assert repr(every.order_by(-metric("steps"))) == "<7 CustomizedModels, by -steps>"


def test_the_best_one_is_the_first(sweep: ModelRegistry) -> None:
    best = sweep.customized_models().where(tag("keep")).order_by(metric("eval_loss")).first()
    assert best is not None
    assert best.train_name == "run-0"
    assert sweep.customized_models().where(metric("eval_loss") < 0).first() is None


def test_train_names_and_tags_are_found_by_patterns(sweep: ModelRegistry) -> None:
    assert numbers(sweep.customized_models(train_name="run-?")) == [6, 5, 4, 3, 2, 1, 0]
    assert numbers(sweep.customized_models(train_name="*-3")) == [3]
    assert numbers(sweep.customized_models(train_name="Run 3")) == [3]
    assert numbers(sweep.customized_models(train_name="[r]un-*")) == []
    assert numbers(sweep.customized_models().where(tag("team:*"))) == [3, 2]


@pytest.mark.parametrize(
    "search",
    [
        lambda models: models.order_by(metric("eval_loss")),
        lambda models: models.order_by(-metric("eval_loss")),
        lambda models: models.where(metric("eval_loss") < 1).order_by(-metric("eval_loss")),
    ],
    ids=["by a metric", "by a metric, backwards", "a metric, by itself"],
)
def test_the_rows_by_a_metric_come_from_an_index_as_they_are(
    in_sqlite: ModelRegistry, search: Callable[[Any], Any]
) -> None:
    plans = sqlite_plans(in_sqlite, search)
    assert any("metrics_by_value" in step for step in plans), plans
    assert not any("TEMP B-TREE" in step for step in plans), plans


def test_train_names_that_fit_a_pattern_come_from_an_index(
    in_sqlite: ModelRegistry, tiny_adapter: Path
) -> None:
    in_sqlite.register(tiny_adapter, train_name="run-1")
    plans = sqlite_plans(in_sqlite, lambda _: in_sqlite.customized_models(train_name="run-*"))
    assert any("train_name>? AND train_name<?" in step for step in plans), plans


def sqlite_plans(registry: ModelRegistry, search: Callable[[Any], Any]) -> list[str]:
    """How SQLite reads the page of a search."""
    asked: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "OFFSET" in statement and 100 in parameters:
            asked.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        search(registry.customized_models())[:100]
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    with registry.catalog.database.read() as connection:
        return [
            row[3]
            for statement, parameters in asked[:1]
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]


@pytest.fixture
def in_sqlite(tiny_base: Path, tmp_path: Path) -> ModelRegistry:
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("llama-tiny", tiny_base)
    return registry


def test_only_stars_and_question_marks_make_a_pattern(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    """Not what the databases' own patterns are made of, and capital letters are others."""
    tags = ["100%", "a_b", "a\\b", "[ab]"]
    model = registry.register(tiny_adapter, train_name="support")
    registry.tag(model, *tags)
    for pattern in ("*%", "?_b", "a\\?", "[*", "*]", "A_*", "%?", "_??", "*\\", "[a]*"):
        letters = {"*": ".*", "?": "."}
        wanted = "".join(letters.get(letter, re.escape(letter)) for letter in pattern)
        expected = any(re.fullmatch(wanted, name) for name in tags)
        assert bool(registry.customized_models().where(tag(pattern))) == expected, pattern


def test_models_are_found_by_when_they_were_made(sweep: ModelRegistry) -> None:
    middle = sweep.customized_models()[3].created
    after = sweep.customized_models(since=middle)
    assert numbers(after) == [6, 5, 4, 3]
    assert numbers(sweep.customized_models(until=middle)) == [2, 1, 0]
    assert len(sweep.customized_models(since=middle.isoformat())) == 4
    today = datetime.now(UTC).date()
    assert len(sweep.customized_models(until=today - timedelta(days=2))) == 0
    assert len(sweep.base_models().order_by("created")) == 1
    assert len(sweep.customized_models(since=date(2020, 1, 1))) == 7


def test_a_list_of_a_search_sees_what_has_changed(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    good = registry.customized_models().where(metric("acc") > 0.5, ~tag("rejected"))
    assert not good
    model = registry.register(tiny_adapter, train_name="a", evaluation={"acc": 0.7})
    assert list(good) == [model]
    registry.tag(model, "rejected")
    assert list(good) == []
    registry.untag(model, "rejected")
    registry.delete(model)
    assert list(good) == []


def test_many_conditions_are_joined(sweep: ModelRegistry) -> None:
    every = functools.reduce(operator.or_, [tag(f"t-{n}") for n in range(500)])
    assert len(sweep.customized_models().where(every, ~every & ~every)) == 0
    with pytest.raises(InvalidArgumentError, match="pattern"):
        every | tag("one-more")


def test_conditions_are_not_joined_by_and_or_or() -> None:
    with pytest.raises(InvalidArgumentError, match="&"):
        metric("a") > 1 and metric("b") > 1
    with pytest.raises(InvalidArgumentError, match="&"):
        0 < metric("a") < 1  # noqa: B015


@pytest.mark.parametrize(
    "call",
    [
        lambda r: metric("a") < "1",
        lambda r: metric("a") == metric("b"),
        lambda r: metric(3),
        lambda r: tag(None),
        lambda r: (metric("a") < 1) & True,
        lambda r: r.customized_models().where("eval_loss < 1"),
        lambda r: r.customized_models().where(metric("a")),
        lambda r: r.customized_models().order_by(tag("a")),
        lambda r: r.customized_models().order_by("eval_loss"),
        lambda r: r.base_models().order_by("train_name"),
        lambda r: r.customized_models(since="yesterday"),
        lambda r: r.customized_models(until=3),
    ],
)
def test_a_search_that_cannot_be_meant_is_refused(
    sweep: ModelRegistry, call: Callable[[ModelRegistry], object]
) -> None:
    with pytest.raises(InvalidArgumentError):
        call(sweep)


def test_a_loop_over_many_sees_what_there_was_when_it_began(
    registry: ModelRegistry, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its first page is full before the rest is read."""
    monkeypatch.setattr(listing, "PAGE", 3)
    for number in range(7):
        registry.register(tiny_adapter, train_name=f"run-{number}", evaluation={"n": number})
    seen = []
    for model in registry.customized_models().order_by(metric("n")):
        seen.append(model.train_name)
        if len(seen) == 2:
            registry.delete(model)
            registry.register(tiny_adapter, train_name="new", evaluation={"n": 4.5})
    assert seen == [f"run-{n}" for n in range(7)]
