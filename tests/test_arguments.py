"""Every public call, given each type that it does not take: an error that names what to pass.

Values are tried in `test_values.py`, calls of a `Trainer`'s in `test_training.py`.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from customized_models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    CustomizedModelsError,
    DeploymentEnvironment,
    DeploymentTemplate,
    InvalidArgumentError,
    Job,
    LocalStorage,
    Merger,
    ModelRegistry,
    NotFoundError,
    Served,
    metric,
    tag,
)
from customized_models.models import LiveModel, ThirdPartyModel
from customized_models.testing import tiny_lora

SECRET = "hf_SECRET"  # in what is passed, and never in a message
SAMPLES: dict[str, Any] = {
    "None": None,
    "bool": True,
    "int": -3,
    "float": float("nan"),
    "text": SECRET,
    "bytes": SECRET.encode(),
    "path": Path(SECRET),
    "list": [3, SECRET],
    "dict": {3: SECRET},
    "class": uuid.UUID,
    "environment": DeploymentEnvironment("gpu", "ollama"),
    "template": DeploymentTemplate(SECRET),
    "uuid": uuid.UUID(int=0),
}
NAME = frozenset({"text"})  # of what is not there: another error
OPTIONAL = frozenset({"None"})
TRUTH = frozenset({"bool"})
PATH = frozenset({"text", "path"})
INTEGER = frozenset({"int"})


@frozen
class Call:
    """A public call with one argument left open, and which samples are of a type that it takes."""

    name: str
    argument: str
    call: Callable[[Any, Any], Any]
    takes: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.name}({self.argument})"


def registry_calls() -> Iterator[Call]:
    def register(**given: Any) -> Callable[[Any, Any], Any]:
        (argument,) = given
        needed = {"train_name": "x", "base_model": "llama-tiny"}
        return lambda r, v: r.register(r.adapter, **needed | {argument: v})

    def listing(method: str, filter: str, takes: frozenset[str]) -> Call:
        return Call(method, filter, lambda r, v: getattr(r, method)(**{filter: v}), takes)

    yield Call("ModelRegistry", "root", lambda r, v: ModelRegistry(v), PATH)
    yield Call(
        "ModelRegistry", "storage", lambda r, v: ModelRegistry("x", storage=v), NAME | OPTIONAL
    )
    yield Call(
        "ModelRegistry", "database", lambda r, v: ModelRegistry("x", database=v), NAME | OPTIONAL
    )
    yield Call(
        "ModelRegistry", "max_running", lambda r, v: ModelRegistry("x", max_running=v), OPTIONAL
    )
    yield Call("add_base_model", "technical name", lambda r, v: r.add_base_model(v, r.base), NAME)
    yield Call("add_base_model", "path", lambda r, v: r.add_base_model("a", v), PATH | OPTIONAL)
    yield Call(
        "add_base_model",
        "model_name",
        lambda r, v: r.add_base_model("a", r.base, model_name=v),
        NAME | OPTIONAL,
    )
    for argument in ("trust_remote_code", "download", "progress"):
        yield Call(
            "add_base_model",
            argument,
            lambda r, v, argument=argument: r.add_base_model("a", r.base, **{argument: v}),
            TRUTH,
        )
    yield Call(
        "add_base_model",
        "deployment_template",
        lambda r, v: r.add_base_model("a", r.base, deployment_template=v),
        OPTIONAL | {"template"},
    )
    yield Call(
        "set_deployment_template",
        "base_model",
        lambda r, v: r.set_deployment_template(v, None),
        NAME,
    )
    yield Call(
        "set_deployment_template",
        "deployment_template",
        lambda r, v: r.set_deployment_template("llama-tiny", v),
        OPTIONAL | {"template"},
    )
    yield Call(
        "relocate_base_model", "base_model", lambda r, v: r.relocate_base_model(v, r.base), NAME
    )
    yield Call(
        "relocate_base_model", "path", lambda r, v: r.relocate_base_model("llama-tiny", v), PATH
    )
    reserved = {"train_name": "x", "base_model": "llama-tiny", "training_id": uuid.UUID(int=1)}
    for argument, takes in (("train_name", NAME), ("base_model", NAME), ("training_id", {"uuid"})):
        yield Call(
            "reserve",
            argument,
            lambda r, v, argument=argument: r.reserve(**reserved | {argument: v}),
            frozenset(takes),
        )
    yield Call("register", "directory", lambda r, v: r.register(v, train_name="x"), PATH)
    yield Call("register", "train_name", register(train_name=None), NAME)
    yield Call("register", "base_model", register(base_model=None), NAME | OPTIONAL)
    yield Call("register", "training_id", register(training_id=None), OPTIONAL | {"uuid"})
    yield Call("register", "training", register(training=None), OPTIONAL)
    yield Call("register", "evaluation", register(evaluation=None), OPTIONAL)
    yield Call("register", "created", register(created=None), OPTIONAL)
    yield Call("add_evaluation", "model", lambda r, v: r.add_evaluation(v, {}), NAME)
    yield Call("add_evaluation", "metrics", lambda r, v: r.add_evaluation("x", v))
    yield Call(
        "add_evaluation", "metrics['a']", lambda r, v: r.add_evaluation("x", {"a": v}), INTEGER
    )
    yield Call("get", "kind", lambda r, v: r.get(v, "x"))
    yield Call("get", "name", lambda r, v: r.get(BaseModel, v), NAME)
    for method in ("customized_models", "complete_models", "live_models"):
        yield listing(method, "base", NAME | OPTIONAL)
        yield listing(method, "train_name", NAME | OPTIONAL)
    yield listing("complete_models", "customized", NAME | OPTIONAL)
    yield listing("live_models", "source", NAME | OPTIONAL)
    yield listing("live_models", "environment", NAME | OPTIONAL | {"environment"})
    yield listing("live_models", "state", OPTIONAL)
    yield listing("jobs", "state", OPTIONAL)
    yield Call("job", "id", lambda r, v: r.job(v), frozenset({"uuid"}))
    yield Call(
        "add_environment",
        "environment",
        lambda r, v: r.add_environment(v),
        frozenset({"environment"}),
    )
    yield Call("add_third_party", "live", lambda r, v: r.add_third_party(v), NAME)
    for method in ("checkout", "local_path", "verify"):
        yield Call(method, "model", lambda r, v, method=method: getattr(r, method)(v), NAME)
    yield Call("delete", "value", lambda r, v: r.delete(v), NAME | {"environment"})
    for method in ("labels", "lineage"):
        yield Call(method, "model", lambda r, v, method=method: getattr(r, method)(v), NAME)
    yield Call("tag", "model", lambda r, v: r.tag(v, "a"), NAME)
    yield Call("tag", "tags", lambda r, v: r.tag(r.customized, v), NAME)
    yield Call("untag", "tags", lambda r, v: r.untag(r.customized, v), NAME)
    yield Call(
        "set_description", "description", lambda r, v: r.set_description(r.customized, v), NAME
    )
    yield Call("set_alias", "alias", lambda r, v: r.set_alias(r.customized, v), NAME)
    yield Call(
        "set_alias",
        "protected",
        lambda r, v: r.set_alias(r.customized, "a", protected=v),
        OPTIONAL | {"bool"},
    )
    yield Call("remove_alias", "alias", lambda r, v: r.remove_alias(r.customized, v), NAME)
    for method in ("evict", "rebuild"):
        yield Call(method, "complete", lambda r, v, method=method: getattr(r, method)(v), NAME)
    yield Call("plan_deletion", "value", lambda r, v: r.plan_deletion(v), NAME | {"environment"})
    yield Call("events", "about", lambda r, v: r.events(v), NAME | OPTIONAL | {"environment"})
    yield Call("events", "action", lambda r, v: r.events(action=v), OPTIONAL)
    yield Call("events", "since", lambda r, v: r.events(since=v), OPTIONAL)
    yield Call("subscribe", "call", lambda r, v: r.subscribe(v), frozenset({"class"}))
    yield Call("subscribe", "after", lambda r, v: r.subscribe(print, after=v), OPTIONAL | {"int"})
    yield Call("push_to_hub", "repository", lambda r, v: r.push_to_hub(r.customized, v), NAME)
    yield listing("complete_models", "evicted", OPTIONAL | {"bool"})
    yield Call("live_models", "since", lambda r, v: r.live_models(since=v), OPTIONAL)
    yield Call("complete_models", "until", lambda r, v: r.complete_models(until=v), OPTIONAL)
    yield Call("where", "where", lambda r, v: r.customized_models().where(v))
    yield Call("order_by", "order_by", lambda r, v: r.customized_models().order_by(v))
    yield Call("plot", "metric", lambda r, v: r.customized_models().plot(v), NAME)
    yield Call("metric", "metric", lambda r, v: metric(v), NAME)
    yield Call(
        "metric(...) <", "compared with", lambda r, v: metric("a") < v, frozenset({"int", "float"})
    )
    yield Call("tag(...)", "tag", lambda r, v: tag(v), NAME)
    yield Call("gc", "grace_seconds", lambda r, v: r.gc(grace_seconds=v))
    yield Call("gc", "dry_run", lambda r, v: r.gc(dry_run=v), frozenset({"bool"}))
    yield Call(
        "base_models()[...]", "index", lambda r, v: r.base_models()[v], frozenset({"bool", "int"})
    )


def other_calls() -> Iterator[Call]:
    yield Call("LocalStorage", "root", lambda r, v: LocalStorage(v), PATH)
    yield Call("Merger", "registry", lambda r, v: Merger(v))
    yield Call("Merger.save", "customized", lambda r, v: Merger(r).save(v), NAME)
    yield Call("Merger.save", "workers", lambda r, v: Merger(r).save(r.customized, workers=v))
    yield Call("Merger.plan", "customized", lambda r, v: Merger(r).plan(v), NAME)
    yield Call("Merger.verify", "complete", lambda r, v: Merger(r).verify(v), NAME)
    yield Call("Merger.rebuild", "complete", lambda r, v: Merger(r).rebuild(v), NAME)
    yield Call("Job.result", "timeout", lambda r, v: r.job_of_old.result(v), OPTIONAL | {"bool"})
    yield Call(
        "Job.result",
        "progress",
        lambda r, v: r.job_of_old.result(progress=v),
        frozenset({"bool"}),
    )
    yield Call(
        "DeploymentTemplate.from_file", "path", lambda r, v: DeploymentTemplate.from_file(v), PATH
    )


@pytest.fixture(scope="module")
def known(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelRegistry:
    """A registry that knows a base model; with what the calls need besides the open argument."""
    directory = tmp_path_factory.mktemp("known")
    registry = Known(directory / "models")
    registry.add_base_model("llama-tiny", tiny_base)
    registry.base = tiny_base
    registry.adapter = tiny_lora(directory / "adapter", tiny_base)
    registry.customized = registry.register(registry.adapter, train_name="known")
    return registry


class Known(ModelRegistry):
    base: Path
    adapter: Path
    customized: CustomizedModel

    @property
    def job_of_old(self) -> Job[Any]:
        """One that has ended long ago."""
        id = self.catalog.jobs.add("save", lambda id: f"none_s_{id.hex[:4]}", {}, (), 1)
        with self.catalog.database.write() as connection:
            self.catalog.jobs.end(connection, str(id), "cancelled")
        return self.job(id)


@pytest.mark.parametrize("call", [*registry_calls(), *other_calls()], ids=str)
def test_a_wrong_type_is_an_error_that_names_what_to_pass(call: Call, known: Known) -> None:
    for kind, sample in SAMPLES.items():
        if kind in call.takes:
            continue
        with pytest.raises(InvalidArgumentError) as refused:
            call.call(known, sample)
        message = str(refused.value)
        assert call.argument in message
        assert " takes " in message
        assert SECRET not in message


@pytest.mark.parametrize(
    "call", [c for c in (*registry_calls(), *other_calls()) if "text" in c.takes], ids=str
)
def test_text_that_utf8_cannot_hold_is_an_error_of_ours(call: Call, known: Known) -> None:
    with pytest.raises(CustomizedModelsError):
        list(call.call(known, "half a pair: \ud800"))
    with pytest.raises(CustomizedModelsError):
        list(call.call(known, "half a pair and a pattern: \ud800*"))


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.add_evaluation(r.customized, {"a": 10**400}),
        lambda r: r.register(r.adapter, train_name="x", evaluation={"a": 10**400}),
        lambda r: r.customized_models().where(metric("a") < 10**400),
        lambda r: r.gc(grace_seconds=10**400),
    ],
)
def test_a_number_that_no_float_holds_is_an_error_of_ours(
    known: Known, call: Callable[[Known], object]
) -> None:
    with pytest.raises(InvalidArgumentError, match="at most 1"):
        call(known)


@pytest.mark.parametrize(
    "given", [datetime.datetime(2026, 1, 31), datetime.datetime.min, "2026-01-31T12:00"]
)
def test_a_time_without_a_zone_is_refused_wherever_a_time_is_taken(
    known: Known, given: Any
) -> None:
    with pytest.raises(InvalidArgumentError, match="time zone"):
        known.customized_models(since=given)
    with pytest.raises(InvalidArgumentError, match="time zone"):
        known.events(until=given)
    assert len(known.customized_models(since=datetime.date.min)) == 1
    assert len(known.customized_models(since="2020-01-31T12:00Z")) == 1


# What is meant is taken


def test_names_do_as_well_as_values(registry: ModelRegistry, tiny_adapter: Path) -> None:
    base = registry.get(BaseModel, "llama-tiny")
    customized = registry.register(tiny_adapter, train_name="support", base_model=base)
    for model in (customized, customized.name):
        registry.verify(model)
        with registry.checkout(model) as directory:
            assert registry.local_path(model) == directory
        assert list(registry.complete_models(customized=model)) == []
        assert list(registry.live_models(source=model)) == []
    for given in (base, base.name):
        assert list(registry.customized_models(base=given)) == [customized]
        registry.set_deployment_template(given, DeploymentTemplate("{{ .Prompt }}"))
        assert registry.reserve(
            train_name="next", base_model=given, training_id=str(uuid.UUID(int=1))
        ).startswith("llama-tiny_next_")
    registry.add_environment(DeploymentEnvironment("here", "llama_cpp"))
    for name in (customized.name, "here", "llama-tiny"):
        registry.delete(name)
        with pytest.raises(NotFoundError, match=name):
            registry.delete(name)


def test_a_name_that_two_kinds_have_is_deleted_by_value(registry: ModelRegistry) -> None:
    live = live_model("a_d_0001_q8_0")
    offered = ThirdPartyModel(live.name, "http://x", "openai", "a", "here")
    with registry.catalog.database.write() as connection:
        registry.catalog.levels.insert_pending(connection, live, "")
        registry.catalog.levels.make_visible(connection, live, "")
    registry.catalog.levels.add_once(offered)
    with pytest.raises(InvalidArgumentError, match="LiveModel and a ThirdPartyModel"):
        registry.delete(live.name)
    registry.delete(offered)
    registry.delete(live.name)
    assert list(registry.live_models()) == list(registry.third_party_models()) == []


def live_model(name: str) -> LiveModel:
    return LiveModel(
        name=name,
        source="a",
        base="llama-tiny",
        train_name="a",
        quantization="q8_0",
        environment="here",
        served=Served(name, "http://x", "openai", "sha256:0"),
        deploying_id=uuid.UUID(int=2),
        created=datetime.datetime.now(datetime.UTC),
        source_digest="blake3:0",
        state="undeployed",
    )


def test_the_text_of_a_training_id_is_that_id(registry: ModelRegistry, tiny_adapter: Path) -> None:
    id = uuid.uuid4()
    customized = registry.register(tiny_adapter, train_name="support", training_id=str(id))
    assert customized.training_id == id
    assert registry.register(tiny_adapter, train_name="support", training_id=id) == customized


@pytest.mark.parametrize(
    ("evaluation", "metrics"),
    [
        ({"acc": 0.9, "steps": 3}, {"acc": 0.9, "steps": 3.0}),
        ({"metrics": {"acc": 0.9}, "steps": 3}, {"acc": 0.9}),
    ],
)
def test_a_dict_of_metrics_or_of_fields_is_an_evaluation(
    registry: ModelRegistry, tiny_adapter: Path, evaluation: Any, metrics: dict[str, float]
) -> None:
    customized = registry.register(tiny_adapter, train_name="a", evaluation=evaluation)
    assert customized.card.evaluation.metrics == metrics


@pytest.mark.parametrize("training", [{"learning_rate": 1e-4}, {"datasets": {"a": 1}}])
def test_what_a_card_has_no_place_for_is_refused_and_not_lost(
    registry: ModelRegistry, tiny_adapter: Path, training: Any
) -> None:
    with pytest.raises(InvalidArgumentError, match="training"):
        registry.register(tiny_adapter, train_name="a", training=training)
    assert not registry.customized_models()


# What does not exist is not created, and not silently empty


def test_reading_makes_no_registry(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path / "typo/models")
    for listing in (
        registry.base_models(),
        registry.customized_models(),
        registry.complete_models(),
        registry.live_models(),
        registry.third_party_models(),
        registry.environments(),
        registry.jobs(),
        registry.events(),
        registry.customized_models().where(metric("a") < 1).order_by(metric("b"), "created"),
    ):
        assert (list(listing), len(listing), bool(listing)) == ([], 0, False)
    with pytest.raises(NotFoundError):
        registry.get(CustomizedModel, "a")
    with pytest.raises(NotFoundError):
        registry.delete("a")
    assert registry.recover() == []
    assert registry.usage().total == 0
    assert not (tmp_path / "typo").exists()


def test_a_home_is_understood_and_a_url_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ModelRegistry("~/models").root == tmp_path / "models"
    for url in ("s3://bucket/models", "sqlite:///models.db", "file:/models"):
        with pytest.raises(InvalidArgumentError, match=r"storage=.*database="):
            ModelRegistry(url)


def test_filters_on_what_is_not_there_are_errors(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    with pytest.raises(NotFoundError, match="did you mean 'llama-tiny'"):
        registry.customized_models(base="llama-tiyn")
    with pytest.raises(NotFoundError, match="no DeploymentEnvironment"):
        registry.live_models(environment="here")
    with pytest.raises(NotFoundError, match="no CustomizedModel"):
        registry.complete_models(customized="a")
    with pytest.raises(InvalidArgumentError, match="'superseded' or 'undeployed'"):
        registry.live_models(state="alive")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="did you mean 'running'"):
        registry.jobs("runing")  # type: ignore[arg-type]


def test_models_of_what_has_been_deleted_are_still_found(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    customized = registry.register(tiny_adapter, train_name="a")
    complete = CompleteModel(
        name="a_s_0001",
        customized=customized.name,
        base="llama-tiny",
        train_name="a",
        saving_id=uuid.UUID(int=1),
        created=customized.created,
        digest="blake3:0",
        customized_digest=customized.digest,
        base_digest="blake3:0",
    )
    with registry.catalog.database.write() as connection:
        registry.catalog.levels.insert_pending(connection, complete, "")
        registry.catalog.levels.make_visible(connection, complete, "")
    registry.delete(customized)
    registry.delete("llama-tiny")
    assert list(registry.complete_models(customized=customized.name)) == [complete]
    assert list(registry.complete_models(base="llama-tiny", train_name="a")) == [complete]
    assert list(registry.complete_models(base="llama-tiny", train_name="b")) == []


# Set-up calls repeat


def test_a_script_that_runs_again_finds_what_it_made(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    made = []
    for _ in range(2):
        registry = ModelRegistry(tmp_path / "models")
        made.append(
            (
                registry.add_base_model("llama-tiny", tiny_base).name,
                registry.register(tiny_adapter, train_name="My Run", base_model="llama-tiny"),
                registry.set_deployment_template("llama-tiny", DeploymentTemplate("a")),
                registry.add_environment(DeploymentEnvironment("here", "ollama", "h", 1)),
            )
        )
    assert made[0] == made[1]
    assert len(registry.customized_models()) == 1


def test_another_value_under_a_name_is_told_apart(registry: ModelRegistry, tiny_base: Path) -> None:
    registry.set_deployment_template("llama-tiny", DeploymentTemplate("old"))
    with pytest.raises(Exception, match=r"another deployment_template: .*old.*, not .*new"):
        registry.add_base_model(
            "llama-tiny",
            tiny_base,
            model_name="tests/llama-tiny",
            deployment_template=DeploymentTemplate("new"),
        )
    registry.add_environment(DeploymentEnvironment("here", "ollama", "h", 1))
    with pytest.raises(Exception, match="another port: '1', not '2'"):
        registry.add_environment(DeploymentEnvironment("here", "ollama", "h", 2))
