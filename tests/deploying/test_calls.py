"""What a `Deployer` takes: values or their names, and nothing of another type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from customized_models import (
    CustomizedModel,
    Deployer,
    DeploymentEnvironment,
    DeploymentTemplate,
    InvalidArgumentError,
    InvalidOptionError,
    MalformedError,
    ModelRegistry,
    NotFoundError,
    UnsupportedError,
)
from customized_models.backends.ollama import OllamaOptions
from tests.servers.artifact import at
from tests.servers.stand_in import stand_in

Call = Callable[[Deployer, CustomizedModel, Any], Any]

CALLS: dict[str, Call] = {
    "model": lambda d, m, v: d.deploy(v),
    "environment": lambda d, m, v: d.deploy(m, environment=v or 1),
    "served_name": lambda d, m, v: d.deploy(m, served_name=v or 1),
    "template": lambda d, m, v: d.deploy(m, template=v or 1),
    "replace": lambda d, m, v: d.deploy(m, replace=v),
    "gguf": lambda d, m, v: d.deploy(m, gguf=v or 1),
    "model of an export": lambda d, m, v: d.export_gguf(v, "x"),
    "path": lambda d, m, v: d.export_gguf(m, v),
    "model of a template": lambda d, m, v: d.propose_template(v),
    "live of status": lambda d, m, v: d.status(v),
    "live of undeploy": lambda d, m, v: d.undeploy(v),
    "live of rollback": lambda d, m, v: d.rollback(v),
    "live of relocate": lambda d, m, v: d.relocate(v, "here"),
}


@pytest.mark.parametrize(
    "value", [None, 3.5, b"x", ["x"], object()], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_type_is_an_error_that_names_what_to_pass(
    registry: ModelRegistry, tiny_adapter: Path, name: str, value: object
) -> None:
    registry.add_environment(DeploymentEnvironment("here", "llama_cpp"))
    customized = registry.register(tiny_adapter, train_name="support")
    with pytest.raises(InvalidArgumentError, match=f"^{name.split()[0]} takes "):
        CALLS[name](Deployer(registry), customized, value)
    assert list(registry.jobs()) == []


@pytest.mark.parametrize("value", [None, 3.5, b"x", [["content"]]], ids=repr)
@pytest.mark.parametrize("name", ["proofs", "accept_failed"])
def test_proofs_are_named_by_texts(
    registry: ModelRegistry, tiny_adapter: Path, name: str, value: object
) -> None:
    registry.add_environment(DeploymentEnvironment("here", "llama_cpp"))
    customized = registry.register(tiny_adapter, train_name="support")
    with pytest.raises(InvalidArgumentError, match=f"{name} takes "):
        Deployer(registry).deploy(customized, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [object(), {"context": 1}, "x"], ids=["object", "dict", "str"])
def test_options_of_another_type_are_refused_by_the_name_of_the_right_one(
    registry: ModelRegistry, tiny_adapter: Path, options: object
) -> None:
    registry.add_environment(DeploymentEnvironment("here", "llama_cpp"))
    customized = registry.register(tiny_adapter, train_name="support")
    with pytest.raises(InvalidOptionError, match=r"options must be LlamaCppOptions\(\.\.\.\)"):
        Deployer(registry).deploy(customized, options=options)


def test_a_template_that_is_text_is_refused(registry: ModelRegistry, tiny_adapter: Path) -> None:
    registry.add_environment(DeploymentEnvironment("here", "llama_cpp"))
    customized = registry.register(tiny_adapter, train_name="support")
    with pytest.raises(InvalidArgumentError, match="a DeploymentTemplate, 'infer' or None"):
        Deployer(registry).deploy(customized, template="{{ .Prompt }}")  # type: ignore[arg-type]


def test_a_template_is_not_ignored_where_the_model_has_its_own(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    registry.add_environment(DeploymentEnvironment("here", "llama_cpp"))
    customized = registry.register(tiny_adapter, train_name="support")
    deployer = Deployer(registry)
    given = DeploymentTemplate("{{ .Prompt }}")
    with pytest.raises(UnsupportedError, match="here renders with the chat template"):
        deployer.deploy(customized, template=given)
    with stand_in() as server:
        server.version = "0.34.1"
        registry.add_environment(attrs.evolve(at(server), name="there"))
        options = OllamaOptions(use_chat_template=True)
        with pytest.raises(UnsupportedError, match="there renders with the chat template"):
            deployer.deploy(customized, environment="there", template=given, options=options)
    assert list(registry.jobs()) == []


@pytest.mark.parametrize("content", [None, b"", b"GGUF" + bytes(100)], ids=["no", "empty", "bad"])
def test_a_finished_file_that_is_none_is_refused_before_a_job_is_made(
    registry: ModelRegistry, tiny_adapter: Path, tmp_path: Path, content: bytes | None
) -> None:
    registry.add_environment(DeploymentEnvironment("here", "llama_cpp"))
    customized = registry.register(tiny_adapter, train_name="support")
    if content is not None:
        (tmp_path / "my.gguf").write_bytes(content)
    with pytest.raises(MalformedError, match=r"'my\.gguf'"):
        Deployer(registry).deploy(customized, gguf=tmp_path / "my.gguf")
    assert list(registry.jobs()) == []


def test_names_do_as_well_as_values(registry: ModelRegistry, tiny_adapter: Path) -> None:
    customized = registry.register(tiny_adapter, train_name="support")
    deployer = Deployer(registry)
    with stand_in() as server:
        registry.add_environment(at(server))
        options = {"proofs": (), "accept_failed": "template", "template": "infer"}
        live = deployer.deploy(customized.name, environment="here", **options).result(
            progress=False
        )
        assert deployer.status(live.name) == deployer.status(live)
        with pytest.raises(NotFoundError, match="took its name from no other"):
            deployer.rollback(live.name)
        assert deployer.undeploy(live.name).state == "undeployed"
        with pytest.raises(NotFoundError, match="no LiveModel"):
            deployer.status("nothing")
