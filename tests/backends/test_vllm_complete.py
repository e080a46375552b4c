"""Complete models at vLLM, which are served before they are deployed, at a stand-in."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from customized_models import (
    CompleteModel,
    Deployer,
    DeploymentEnvironment,
    Job,
    JobLost,
    LiveModel,
    Merger,
    ModelRegistry,
    Status,
    UnsupportedError,
)
from customized_models.errors import ProofFailedError, ServerAnswerError
from tests.deploying.workers import worker_of
from tests.servers.vllm_stand_in import VLLMStandIn, vllm_stand_in


@pytest.fixture
def complete(registry: ModelRegistry, tiny_adapter: Path) -> CompleteModel:
    customized = registry.register(tiny_adapter, train_name="support")
    return Merger(registry).save(customized).result(progress=False)


@pytest.fixture
def server(
    registry: ModelRegistry, complete: CompleteModel, tmp_path: Path
) -> Iterator[VLLMStandIn]:
    """It serves the complete model as "support"."""
    with vllm_stand_in(registry.local_path(complete), "support") as running:
        settings = {"models_directory": str(tmp_path)}
        registry.add_environment(
            DeploymentEnvironment("here", "vllm", "127.0.0.1", running.port, settings=settings)
        )
        yield running


def deploy(registry: ModelRegistry, complete: CompleteModel, **options: object) -> Job[LiveModel]:
    return Deployer(registry).deploy(complete, served_name="support", **options)


def test_it_stays_live_until_its_server_ends(
    registry: ModelRegistry, complete: CompleteModel, server: VLLMStandIn
) -> None:
    deployer = Deployer(registry)
    live = deploy(registry, complete, proofs=()).result(progress=False)
    assert deployer.status(live) is Status.LOADED
    with pytest.raises(UnsupportedError, match="stop the server"):
        deployer.undeploy(live)
    server.called = "another"
    assert deployer.status(live) is Status.ABSENT
    assert deployer.undeploy(live).state == "undeployed"


def test_a_proof_that_failed_is_told_and_nothing_is_recorded(
    registry: ModelRegistry, complete: CompleteModel, server: VLLMStandIn
) -> None:
    with pytest.raises(ProofFailedError, match="the template proof failed"):
        deploy(registry, complete).result(progress=False)
    assert list(registry.live_models()) == []
    assert registry.recover() == []


@pytest.mark.parametrize("moved", [False, True], ids=["served still", "another is served"])
@pytest.mark.parametrize("request_number", [4, 5], ids=["before its push", "before its proof"])
def test_one_that_was_killed_is_not_recorded_as_live(
    registry: ModelRegistry,
    complete: CompleteModel,
    server: VLLMStandIn,
    tmp_path: Path,
    request_number: int,
    moved: bool,
) -> None:
    submitted, jobs = threading.Event(), list[Job[LiveModel]]()

    def kill(number: int) -> None:
        if number == request_number:
            submitted.wait()
            os.kill(worker_of(registry, str(jobs[0].id)), signal.SIGKILL)

    server.asked = kill
    jobs.append(deploy(registry, complete))
    submitted.set()
    with pytest.raises(JobLost):
        jobs[0].result(progress=False)
    if moved:
        server.root = tmp_path
    assert registry.recover() == [f"undid the deployment of {jobs[0].name} at here"]
    assert list(registry.live_models()) == []


def test_a_name_is_given_back_only_where_the_server_serves_what_had_it(
    registry: ModelRegistry, complete: CompleteModel, server: VLLMStandIn, tmp_path: Path
) -> None:
    deployer = Deployer(registry)
    first = deploy(registry, complete, proofs=()).result(progress=False)
    second = deploy(registry, complete, proofs=(), replace=True).result(progress=False)
    server.root, root = tmp_path, server.root
    with pytest.raises(ServerAnswerError, match=r"does not serve .* as 'support' any more"):
        deployer.rollback(second)
    server.root = root
    assert deployer.rollback(second).name == first.name
    assert deployer.undeploy(second).state == "undeployed"
