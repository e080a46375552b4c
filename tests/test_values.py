"""Values: checked by their annotations, JSON, dicts, and answers of web services as they are."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pytest
from attrs import NOTHING, evolve, fields
from fastapi import Body, FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from customized_models import (
    BaseModel,
    CustomizedModel,
    DeploymentEnvironment,
    DeploymentTemplate,
    EvaluationSummary,
    InvalidArgumentError,
    InvalidOptionError,
    Job,
    Listing,
    MalformedError,
    ModelCard,
    ModelRegistry,
    TrainingConfiguration,
    UnsupportedQuantizationError,
)
from customized_models.files.documents import from_document
from customized_models.models import JobProgress, checked_quantization
from customized_models.values import Value
from tests.test_arguments import live_model

CARD = ModelCard(
    TrainingConfiguration({"method": "LoRA", "r": 4}, {"learning_rate": 1e-4}, ("org/data",)),
    EvaluationSummary({"eval_loss": 0.5, "<b>": 1.0}, steps=100),
)
CUSTOMIZED = CustomizedModel(
    name="a_b_20261125_0000",
    base="a",
    train_name="b",
    training_id=uuid.UUID(int=0),
    created=datetime(2026, 11, 25, 10, 30, tzinfo=UTC),
    digest="blake3:0",
    card=CARD,
    label="B!",
)
VALUES: list[Value] = [
    CUSTOMIZED,
    CARD,
    live_model("a_d_0001_q8_0"),
    DeploymentEnvironment("gpu", "ollama", "h", 1, settings={"timeout": 3}),
    DeploymentTemplate("{{ .Prompt }}", "</s>"),
    JobProgress("merging", 1, 2),
]


def every_class() -> list[type[Value]]:
    return sorted(Value.__subclasses__(), key=lambda cls: cls.__name__)


# What a value takes


def test_a_lone_text_is_one_of_several() -> None:
    assert DeploymentTemplate("a", stop="<|im_end|>").stop == ("<|im_end|>",)
    assert DeploymentTemplate("a", ["x", "y"]).stop == ("x", "y")
    with pytest.raises(InvalidOptionError, match="empty"):
        DeploymentTemplate("a", ("x", ""))
    assert TrainingConfiguration(datasets="org/data").datasets == ("org/data",)


@pytest.mark.parametrize("cls", every_class(), ids=lambda cls: cls.__name__)
def test_every_field_refuses_what_it_is_not_for(cls: type[Any]) -> None:
    given = {a.name: object() for a in fields(cls)}
    sound = {
        name: value for value in VALUES if type(value) is cls for name, value in dict(value).items()
    }
    for a in fields(cls):
        if a.type in ("Any", Any):
            continue
        others = {k: v for k, v in (sound or given).items() if k != a.name}
        with pytest.raises(InvalidArgumentError) as refused:
            cls(**others, **{a.name: object()})
        assert f"{cls.__name__}." in str(refused.value)
        if sound:
            assert f"{cls.__name__}.{a.name} takes " in str(refused.value)


def test_a_dict_is_the_value_that_it_has_the_fields_of() -> None:
    card = ModelCard(evaluation={"metrics": {"acc": 1}})  # type: ignore[arg-type]
    assert card.evaluation == EvaluationSummary({"acc": 1.0})
    with pytest.raises(InvalidArgumentError, match=r"no field 'acc'.*'metrics'"):
        ModelCard(evaluation={"acc": 1})  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="lacks the field 'text'"):
        evolve(base_model(), deployment_template={"stop": "a"})


def base_model() -> BaseModel:
    card = {"architecture": "A", "parameters": 1, "dtype": "BF16", "size": 1}
    return BaseModel("a", "org/a", "blake3:0", datetime.now(UTC), card)  # type: ignore[arg-type]


def test_numbers_are_whatever_a_number_is() -> None:
    import numpy as np

    summary = EvaluationSummary({"acc": np.float32(0.5)}, steps=np.int64(3))
    assert summary == EvaluationSummary({"acc": 0.5}, steps=3)
    for wrong in ("0.5", True, None):
        with pytest.raises(InvalidArgumentError, match=r"metrics\['acc'\] takes a number"):
            EvaluationSummary({"acc": wrong})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("spelled", "mode"),
    [("Q4_K_M", "q4_K_M"), ("q4_k_s", "q4_K_S"), ("Q8_0", "q8_0"), ("q4_K_M", "q4_K_M")],
)
def test_a_quantization_is_understood_as_others_spell_it(spelled: str, mode: str) -> None:
    assert checked_quantization(spelled) == mode


def test_an_unknown_quantization_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(UnsupportedQuantizationError, match="did you mean 'q4_K_S'"):
        checked_quantization("q4_K")
    with pytest.raises(InvalidArgumentError, match="q8_0"):
        checked_quantization(None)


def test_a_template_file_that_is_not_there_or_not_text_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="missing"):
        DeploymentTemplate.from_file(tmp_path / "a.tmpl")
    (tmp_path / "a.tmpl").write_bytes(b"\xff")
    with pytest.raises(MalformedError, match="UTF-8"):
        DeploymentTemplate.from_file(tmp_path / "a.tmpl")


# What an environment must not hold


@pytest.mark.parametrize(
    "given",
    [
        {"address": "me:SECRET@host"},
        {"address": "http://host/?token=SECRET"},
        {"path": "/v1?token=SECRET"},
        {"scheme": "https://me:SECRET@host"},
        {"port": "SECRET"},
        {"token_env": "SECRET.token.itself"},
        {"token_env": "hf_SECRET"},
        {"settings": {"api_key": "SECRET"}},
        {"settings": {"server.password": "SECRET"}},
        {"settings": {"headers": "Bearer SECRET"}},
        {"settings": {"proxy": "http://me:SECRET@host"}},
    ],
    ids=str,
)
def test_what_may_be_a_secret_is_refused_and_not_repeated(given: dict[str, Any]) -> None:
    with pytest.raises((InvalidOptionError, InvalidArgumentError)) as refused:
        DeploymentEnvironment("gpu", "ollama", **given)
    chain: BaseException | None = refused.value
    while chain is not None:
        assert "SECRET" not in str(chain)
        chain = chain.__cause__ or chain.__context__


def test_settings_that_only_mention_tokens_are_no_secrets() -> None:
    settings = {"max_tokens": 3, "tokenizer": "a", "token_limit": "none"}
    assert DeploymentEnvironment("gpu", "mine", settings=settings).settings == settings


# How values leave Python


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_a_value_is_a_dict_and_json(value: Value) -> None:
    document = json.loads(json.dumps(value.to_dict()))
    assert from_document(type(value), document) == value
    assert list(document) == list(dict(value)) == list(value.keys())
    assert type(value)(**value) == value
    with pytest.raises(KeyError):
        value["no such field"]


@given(st.dictionaries(st.text(), st.floats(allow_nan=False)), st.lists(st.text()))
def test_any_card_is_json(metrics: dict[str, float], datasets: list[str]) -> None:
    card = ModelCard(TrainingConfiguration(datasets=datasets), EvaluationSummary(metrics))
    assert from_document(ModelCard, json.loads(json.dumps(card.to_dict()))) == card


def test_a_job_progress_unpacks() -> None:
    phase, done, total = JobProgress("merging", 1, 2)
    assert (phase, done, total) == ("merging", 1, 2)
    assert JobProgress("merging", 1, 2).percent == 50
    assert JobProgress("starting", 0, 0).percent is None


def test_a_card_reads_as_text_and_shows_escaped() -> None:
    assert "\n" not in str(CARD)
    for said in ("LoRA, rank 4, 100 steps", "learning_rate", "org/data", "eval_loss  0.5"):
        assert said in CARD.text
    page = CARD._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_the_table_of_a_value_has_all_that_lists_show() -> None:
    page = CUSTOMIZED._repr_html_()
    for shown in ("LoRA, rank 4", "2026-11-25 10:30", "blake3:0", "a_b_20261125_0000", "B!"):
        assert shown in page


@pytest.fixture
def service(registry: ModelRegistry, tiny_adapter: Path) -> tuple[FastAPI, CustomizedModel]:
    model = registry.register(tiny_adapter, train_name="a", evaluation={"acc": 0.9})
    app = FastAPI()
    app.get("/untyped")(lambda: model)
    app.get("/untyped/many")(lambda: list(registry.customized_models()))

    @app.get("/typed")
    def typed() -> CustomizedModel:
        return model

    @app.get("/typed/many")
    def typed_many() -> list[CustomizedModel]:
        return registry.customized_models()  # type: ignore[return-value]

    @app.get("/listing")
    def listing() -> Listing[CustomizedModel]:
        return registry.customized_models()

    @app.get("/jobs")
    def jobs() -> Listing[Job[Any]]:
        return registry.jobs()

    @app.post("/environments")
    def environments(
        environment: Annotated[DeploymentEnvironment, Body()],
    ) -> DeploymentEnvironment:
        return environment

    return app, model


def test_values_are_answers_of_a_web_service(
    service: tuple[FastAPI, CustomizedModel], registry: ModelRegistry
) -> None:
    app, model = service
    client = TestClient(app)
    expected = model.to_dict() | {"created": model.created}
    for path, several in (
        ("/untyped", False),
        ("/typed", False),
        ("/untyped/many", True),
        ("/typed/many", True),
        ("/listing", True),
    ):
        answer = client.get(path)
        assert answer.status_code == 200, path
        document = answer.json()[0] if several else answer.json()
        assert document | {"created": datetime.fromisoformat(document["created"])} == expected
    registry.catalog.jobs.add("save", lambda id: "a_s_0000", {}, (), 1)
    (job,) = client.get("/jobs").json()
    assert job["progress"] == {"phase": "waiting", "done": 0, "total": 0}


def test_values_are_requests_of_a_web_service(service: tuple[FastAPI, CustomizedModel]) -> None:
    client = TestClient(service[0])
    wanted = {"name": "gpu", "backend": "ollama", "port": 1}
    assert client.post("/environments", json=wanted).json()["port"] == 1
    refused = client.post("/environments", json=wanted | {"port": 70000})
    assert refused.status_code == 422
    assert "port" in refused.text
    assert client.post("/environments", json=wanted | {"prot": 1}).status_code == 422


def test_a_services_schema_has_the_fields(service: tuple[FastAPI, CustomizedModel]) -> None:
    paths = service[0].openapi()["paths"]
    answer = paths["/typed"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer["type"] == "object"
    assert set(answer["properties"]) == {a.name for a in fields(CustomizedModel)}
    assert set(answer["required"]) == {
        a.name for a in fields(CustomizedModel) if a.default is NOTHING
    }


def test_a_listing_is_no_mapping() -> None:
    empty = Listing("CustomizedModel", (), Nothing())
    with pytest.raises(InvalidArgumentError, match=r"list\[CustomizedModel\]"):
        dict(empty)


class Nothing:
    def numbers(self, limit: int | None) -> list[int]:
        return []

    def load(self, numbers: Any) -> dict[int, Any]:
        return {}
