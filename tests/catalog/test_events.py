"""The log: every change is in it, in its order, and whoever subscribes is told."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from customized_models import (
    BaseModel,
    CustomizedModelsError,
    DeploymentEnvironment,
    DeploymentTemplate,
    Event,
    InUseError,
    InvalidArgumentError,
    ModelRegistry,
)

SECONDS = 60.0  # for what takes a fraction of one, on a machine that is busy


def told(events: object) -> list[tuple[str, str]]:
    return [(event.action, event.kind) for event in events]  # type: ignore[attr-defined]


def test_every_change_is_in_the_log(
    registry: ModelRegistry, tiny_base: Path, tiny_adapter: Path
) -> None:
    registry.set_deployment_template("llama-tiny", DeploymentTemplate("{{ .Prompt }}"))
    registry.set_deployment_template("llama-tiny", DeploymentTemplate("{{ .Prompt }}"))
    registry.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
    model = registry.register(tiny_adapter, train_name="support")
    registry.register(tiny_adapter, train_name="support")  # is there already
    registry.tag(model, "keep")
    registry.tag(model, "keep")
    registry.delete(model)
    registry.delete("here")

    events = registry.events()
    assert told(events[::-1]) == [
        ("created", "BaseModel"),
        ("changed", "BaseModel"),
        ("created", "DeploymentEnvironment"),
        ("created", "CustomizedModel"),
        ("tagged", "CustomizedModel"),
        ("deleted", "CustomizedModel"),
        ("deleted", "DeploymentEnvironment"),
    ]
    numbers = [event.number for event in events]
    assert numbers == sorted(numbers, reverse=True)
    changed = registry.events("llama-tiny", action="changed")[0]
    assert changed.before == {"deployment_template": None}
    assert changed.after["deployment_template"]["text"] == "{{ .Prompt }}"
    deleted = registry.events(model)[0]
    assert deleted.before["digest"] == model.digest
    assert deleted.before["training_id"] == str(model.training_id)
    assert "@" in deleted.who


def test_a_change_that_fails_is_not_in_the_log(registry: ModelRegistry, tiny_adapter: Path) -> None:
    registry.register(tiny_adapter, train_name="support")
    count = len(registry.events())
    with pytest.raises(InUseError):
        registry.delete(registry.get(BaseModel, "llama-tiny"))
    assert len(registry.events()) == count


def test_the_log_is_found_by_name_action_and_time(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    model = registry.register(tiny_adapter, train_name="support")
    registry.tag(model, "a")
    assert told(registry.events(model.name)) == told(registry.events(model))
    assert told(registry.events(action="tagged")) == [("tagged", "CustomizedModel")]
    assert len(registry.events(until="2020-01-01")) == 0
    assert len(registry.events(since="2020-01-01")) == len(registry.events()) == 3
    assert "tagged CustomizedModel" in str(registry.events()[0])
    assert model.name in registry.events()._repr_html_()
    registry.set_alias(model, "champion")
    assert told(registry.events("champion@Support")) == [("alias set", "CustomizedModel")]
    with pytest.raises(InvalidArgumentError):
        registry.events(action="tag")  # type: ignore[arg-type]


def test_the_log_is_only_added_to(registry: ModelRegistry) -> None:
    for statement in ("UPDATE events SET who = 'nobody'", "DELETE FROM events"):
        with (
            pytest.raises(CustomizedModelsError, match="only added"),
            registry.catalog.database.write() as connection,
        ):
            connection.exec_driver_sql(statement)


def test_a_subscriber_is_told_of_what_this_and_other_processes_do(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    received: queue.Queue[Event] = queue.Queue()
    before = registry.events()[0].number
    with registry.subscribe(received.put):
        model = registry.register(tiny_adapter, train_name="support")
        assert told([received.get(timeout=SECONDS)]) == [("created", "CustomizedModel")]
        script = f"import pickle, sys; pickle.load(sys.stdin.buffer).tag({model.name!r}, 'keep')"
        command, pickled = [sys.executable, "-c", script], pickle.dumps(registry)
        subprocess.run(command, check=True, env=os.environ, input=pickled)
        event = received.get(timeout=SECONDS)
        assert (event.action, event.after) == ("tagged", {"tags": ["keep"]})
    registry.untag(model, "keep")
    assert received.empty()

    with registry.subscribe(received.put, after=before):
        late = [received.get(timeout=SECONDS).action for _ in range(3)]
    assert late == ["created", "tagged", "untagged"]


def test_a_subscriber_that_fails_is_told_of_the_next(
    registry: ModelRegistry, tiny_adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    received: queue.Queue[str] = queue.Queue()

    def fail_once(event: Event) -> None:
        received.put(event.action)
        if event.action == "created":
            raise RuntimeError("no such channel")

    with registry.subscribe(fail_once):
        model = registry.register(tiny_adapter, train_name="support")
        registry.tag(model, "keep")
        assert [received.get(timeout=SECONDS) for _ in range(2)] == ["created", "tagged"]
    assert "no such channel" in caplog.text


def test_of_several_that_have_a_name_the_events_of_the_one_that_is_meant_are_found(
    registry: ModelRegistry,
) -> None:
    """As a live model and what third parties see of it do."""
    here = registry.add_environment(DeploymentEnvironment("llama-tiny", backend="llama_cpp"))
    base = registry.get(BaseModel, "llama-tiny")
    assert told(registry.events(here)) == [("created", "DeploymentEnvironment")]
    assert told(registry.events(base)) == [("created", "BaseModel")]
    assert len(registry.events("llama-tiny")) == 2


def test_an_event_of_a_newer_version_is_left_out(registry: ModelRegistry, caplog: Any) -> None:
    """A subscriber is told of those before and after it."""
    with registry.catalog.database.write() as connection:
        connection.exec_driver_sql(
            "INSERT INTO events (time, who, action, kind, name, before, after) "
            "VALUES (1.0, 'a', 'teleported', 'BaseModel', 'b', '{}', '{}')"
        )
    registry.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
    received: queue.Queue[Event] = queue.Queue()
    with registry.subscribe(received.put, after=0):
        kinds = [received.get(timeout=SECONDS).kind for _ in range(2)]
    assert kinds == ["BaseModel", "DeploymentEnvironment"]
    assert caplog.text.count("teleported") <= 1


def test_a_subscription_begins_after_an_event_that_there_is(registry: ModelRegistry) -> None:
    for number in (10**30, -1, len(registry.events()) + 1):
        with pytest.raises(InvalidArgumentError, match="number of an event"):
            registry.subscribe(print, after=number)
