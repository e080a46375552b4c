"""Servers that have moved or are gone: no record of what was there stands in the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from customized_models import (
    CustomizedModel,
    Deployer,
    DeploymentEnvironment,
    DeploymentError,
    DeploymentTemplate,
    InUseError,
    LiveModel,
    MissingDependencyError,
    ModelRegistry,
    NotFoundError,
    ServerUnreachableError,
    Status,
)
from customized_models.backends import moved_endpoint
from tests.deploying.third_party import Shelf
from tests.servers.artifact import at
from tests.servers.counting_proxy import counting_proxy
from tests.servers.stand_in import StandIn, stand_in


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as state:
        yield state


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    registry.set_deployment_template("llama-tiny", DeploymentTemplate("{{ .Prompt }}"))
    return registry.register(tiny_adapter, train_name="support")


def deploy(registry: ModelRegistry, customized: CustomizedModel) -> LiveModel:
    job = Deployer(registry).deploy(
        customized, served_name="support", proofs=(), accept_failed="template"
    )
    return job.result(progress=False)


@pytest.mark.parametrize("forget", [False, True])
def test_a_protected_alias_keeps_a_live_model_from_being_deleted_and_not_from_being_undeployed(
    registry: ModelRegistry, customized: CustomizedModel, server: StandIn, *, forget: bool
) -> None:
    registry.add_environment(at(server))
    live = deploy(registry, customized)
    registry.set_alias(live, "champion", protected=True)
    gone = Deployer(registry).undeploy("champion@support", forget=forget)
    assert gone.state == "undeployed"
    assert server.models.keys() == (
        {live.served.details["version"], "support:latest"} if forget else set()
    )
    assert registry.get(LiveModel, "champion@support") == gone
    with pytest.raises(InUseError, match="'champion@support', which is protected"):
        registry.delete(gone)
    registry.remove_alias(gone, "champion")
    registry.delete(gone)


def test_what_is_live_follows_an_environment_whose_server_has_moved(
    registry: ModelRegistry, customized: CustomizedModel, server: StandIn
) -> None:
    deployer = Deployer(registry)
    with counting_proxy("127.0.0.1", server.port) as before:
        registry.add_environment(at(before))
        live = deploy(registry, customized)
        offered = registry.add_third_party(live)
    with pytest.raises(ServerUnreachableError) as caught:
        deployer.undeploy(live)
    assert "update_environment" in caught.value.__notes__[0]

    registry.update_environment(at(server))
    (found,) = registry.environments()
    assert found.port == server.port
    moved = registry.get(LiveModel, live.name)
    assert moved.endpoint == f"http://127.0.0.1:{server.port}"
    (stated,) = registry.third_party_models()
    assert stated == attrs.evolve(offered, endpoint=moved.endpoint)
    assert deployer.status(live) is Status.LIVE
    assert deployer.undeploy(live).state == "undeployed"
    assert server.models == {}


def test_a_model_whose_server_is_another_environments_now_is_relocated(
    registry: ModelRegistry, customized: CustomizedModel, server: StandIn
) -> None:
    deployer = Deployer(registry)
    registry.add_environment(at(server))
    live = deploy(registry, customized)
    there = attrs.evolve(at(server), name="there", address="localhost")
    registry.add_environment(there)
    moved = deployer.relocate(live, there)
    assert (moved.environment, moved.endpoint) == ("there", f"http://localhost:{server.port}")
    registry.delete(registry.get(DeploymentEnvironment, "here"))
    deployer.undeploy(moved)
    assert server.models == {}


def test_a_model_is_not_relocated_to_another_tool(
    registry: ModelRegistry, customized: CustomizedModel, server: StandIn
) -> None:
    deployer = Deployer(registry)
    registry.add_environment(at(server))
    live = deploy(registry, customized)
    registry.add_environment(DeploymentEnvironment("there", "llama_cpp"))
    with pytest.raises(DeploymentError, match=f"there is llama_cpp: deploy {customized.name} "):
        deployer.relocate(live, "there")
    assert deployer.status(live) is Status.LIVE


class Uninstalled(Shelf):
    """What it needs is not there."""

    def describe(self) -> Mapping[str, Any]:
        raise MissingDependencyError("it needs a package: pip install it")


def test_an_environment_that_cannot_be_used_does_not_hide_the_others(
    registry: ModelRegistry, server: StandIn
) -> None:
    registry.add_environment(at(server))
    registry.add_environment(DeploymentEnvironment("tool", "shelf", settings={"directory": "/"}))
    deployer = Deployer(registry, backends={"shelf": Uninstalled})
    told = {each.environment.name: each for each in deployer.environments()}
    assert told["here"].reachable
    assert not told["tool"].reachable
    assert "pip install it" in told["tool"].error


def test_an_environment_gets_no_other_backend_while_it_serves(
    registry: ModelRegistry, customized: CustomizedModel, server: StandIn
) -> None:
    with pytest.raises(NotFoundError, match="here"):
        registry.update_environment(at(server))
    registry.add_environment(at(server))
    live = deploy(registry, customized)
    other = DeploymentEnvironment("here", "llama_cpp")
    with pytest.raises(InUseError, match=live.name):
        registry.update_environment(other)
    Deployer(registry).undeploy(live, forget=True)
    assert registry.update_environment(other) == other


def test_a_default_port_is_part_of_the_endpoint_that_follows() -> None:
    old = DeploymentEnvironment("a", "ollama", "box")
    for new, expected in [
        (DeploymentEnvironment("a", "ollama", "::1"), "http://[::1]:11434"),
        (
            DeploymentEnvironment("a", "ollama", "b", 80, scheme="https", path="/o"),
            "https://b:80/o",
        ),
    ]:
        assert moved_endpoint("http://box:11434", old, new) == expected
        assert moved_endpoint("http://box:11434/v1", old, new) == f"{expected}/v1"
        assert moved_endpoint("http://box:114345", old, new) == "http://box:114345"
