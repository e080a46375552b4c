"""Deployments, undeployments and rollbacks that meet, and processes killed in the midst of one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from customized_models import (
    AlreadyExistsError,
    CustomizedModel,
    CustomizedModelsError,
    Deployer,
    DeploymentTemplate,
    InUseError,
    Job,
    JobLost,
    LiveModel,
    ModelRegistry,
    Status,
)
from customized_models.backends.ollama import OllamaOptions
from customized_models.testing import tiny_llama, tiny_lora
from tests.deploying.workers import worker_of
from tests.servers.artifact import at
from tests.servers.stand_in import Handler, StandIn, stand_in

pytestmark = pytest.mark.slow

NAME = "support:latest"
CHANGING = ("POST", "DELETE")
CREATE = ("POST", "/api/create")


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as state:
        yield state


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base, and three adapters for it."""
    directory = tmp_path_factory.mktemp("adapters")
    base = tiny_llama(directory / "base")
    return base, [tiny_lora(directory / str(seed), base, seed=seed) for seed in range(3)]


def registry_at(
    server: StandIn, directory: Path, adapters: tuple[Path, list[Path]]
) -> tuple[ModelRegistry, list[CustomizedModel]]:
    registry = ModelRegistry(directory)
    base, each = adapters
    template = DeploymentTemplate("{{ .Prompt }}")  # what it writes is not the subject here
    registry.add_base_model("tiny", base, deployment_template=template)
    registry.add_environment(at(server))
    return registry, [registry.register(path, train_name=path.name) for path in each]


@pytest.fixture
def registered(
    server: StandIn, tmp_path: Path, adapters: tuple[Path, list[Path]]
) -> tuple[ModelRegistry, list[CustomizedModel]]:
    return registry_at(server, tmp_path / "models", adapters)


def deploy(
    registry: ModelRegistry, model: CustomizedModel, *, replace: bool = False, system: str = "a"
) -> Job[LiveModel]:
    return Deployer(registry).deploy(
        model,
        served_name="support",
        replace=replace,
        proofs=(),
        accept_failed="template",
        options=OllamaOptions(system=system),
    )


def result(job: Job[LiveModel]) -> LiveModel | CustomizedModelsError:
    try:
        return job.result(progress=False)
    except CustomizedModelsError as error:
        return error


def assert_agreed(registry: ModelRegistry, server: StandIn) -> None:
    """The server has what the registry's live models are, and nothing else."""
    deployer, expected = Deployer(registry), set()
    for live in registry.live_models():
        if live.state != "undeployed":
            assert deployer.status(live) in (Status.LIVE, Status.LOADED), live
            expected.add(live.served.details["version"])
        if live.state == "live":
            expected.add(NAME)
    assert server.models.keys() == expected


def undeploy_all(registry: ModelRegistry, server: StandIn) -> None:
    for live in registry.live_models():
        Deployer(registry).undeploy(live)
    assert server.models == {}


class Held:
    """A fault that holds requests back until it is told to let them go."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.go = threading.Event()

    def __call__(self, handler: Handler) -> None:
        self.arrived.set()
        self.go.wait()
        handler.answer(handler.body())


@contextmanager
def held(server: StandIn, request: tuple[str, str]) -> Iterator[Held]:
    """While the block lasts, such requests wait at the server."""
    fault = server.faults[request] = Held()
    try:
        yield fault
    finally:
        del server.faults[request]
        fault.go.set()


@pytest.mark.parametrize("replace", [False, True])
def test_of_two_deployments_under_one_name_at_once_one_wins(
    registered: tuple[ModelRegistry, list[CustomizedModel]], server: StandIn, replace: bool
) -> None:
    registry, (one, other, _) = registered
    with held(server, CREATE) as creation:
        first = deploy(registry, one, replace=replace)
        creation.arrived.wait()
        second = deploy(registry, other, replace=replace)
        lost = result(second)
        assert isinstance(lost, AlreadyExistsError)
        assert "is just being deployed as 'support'" in str(lost)
    live = first.result(progress=False)
    assert live.state == "live"
    assert_agreed(registry, server)
    undeploy_all(registry, server)


@pytest.mark.parametrize("same", [False, True])
def test_two_registries_that_want_one_name_at_once_get_one_winner_and_one_clear_error(
    server: StandIn, tmp_path: Path, adapters: tuple[Path, list[Path]], same: bool
) -> None:
    """Neither knows of the other; both have made their version when the first takes the name."""
    registries = [registry_at(server, tmp_path / name, adapters) for name in "ab"]
    both = threading.Barrier(2)

    def together(handler: Handler) -> None:
        both.wait()
        handler.answer(handler.body())

    server.faults[CREATE] = together
    jobs = [
        deploy(registry, models[0 if same else number])
        for number, (registry, models) in enumerate(registries)
    ]
    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(result, jobs))
    server.faults.clear()

    (won,) = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, LiveModel)]
    lost = outcomes[1 - won]
    assert isinstance(lost, AlreadyExistsError)
    assert "already serves something under 'support:latest'" in str(lost)
    assert list(registries[1 - won][0].live_models()) == []
    assert_agreed(registries[won][0], server)
    undeploy_all(registries[won][0], server)


def test_a_model_is_not_undeployed_or_rolled_back_while_another_takes_its_name(
    registered: tuple[ModelRegistry, list[CustomizedModel]], server: StandIn
) -> None:
    registry, (one, other, third) = registered
    deployer = Deployer(registry)
    first = deploy(registry, one).result(progress=False)
    second = deploy(registry, other, replace=True).result(progress=False)
    with held(server, CREATE) as creation:
        job = deploy(registry, third, replace=True)
        creation.arrived.wait()
        for refused in (deployer.undeploy, deployer.rollback):
            with pytest.raises(InUseError, match=f"the deployment of {job.name}"):
                refused(second)
        assert deployer.status(second) is Status.LIVE
    live = job.result(progress=False)
    states = {each.name: each.state for each in registry.live_models()}
    assert states == {first.name: "superseded", second.name: "superseded", live.name: "live"}
    assert_agreed(registry, server)

    assert deployer.rollback(live).name == second.name
    assert_agreed(registry, server)
    undeploy_all(registry, server)


def test_a_name_is_not_taken_over_from_a_model_that_is_being_undeployed(
    registered: tuple[ModelRegistry, list[CustomizedModel]], server: StandIn
) -> None:
    registry, (one, other, _) = registered
    first = deploy(registry, one).result(progress=False)
    with ThreadPoolExecutor() as pool:
        with held(server, ("DELETE", "/api/delete")) as deletion:
            undeployed = pool.submit(Deployer(registry).undeploy, first)
            deletion.arrived.wait()
            lost = result(deploy(registry, other, replace=True))
            assert isinstance(lost, InUseError)
            assert f"the undeployment of {first.name}" in str(lost)
        assert undeployed.result().state == "undeployed"
    deploy(registry, other).result(progress=False)
    assert_agreed(registry, server)
    undeploy_all(registry, server)


def test_the_same_content_under_the_same_name_keeps_its_name_when_either_goes(
    registered: tuple[ModelRegistry, list[CustomizedModel]], server: StandIn
) -> None:
    """Digests are equal, so that they alone do not tell whose name it is."""
    registry, (one, *_) = registered
    first = deploy(registry, one).result(progress=False)
    second = deploy(registry, one, replace=True).result(progress=False)
    identity = first.served.details["manifest"]
    assert second.served.details["manifest"] == identity
    Deployer(registry).undeploy(first)
    assert_agreed(registry, server)
    assert NAME in server.models
    undeploy_all(registry, server)


def test_what_is_still_answered_is_said_in_the_note_of_what_was_undeployed(
    registered: tuple[ModelRegistry, list[CustomizedModel]], server: StandIn
) -> None:
    registry, (one, *_) = registered
    deployer = Deployer(registry)
    live = deploy(registry, one).result(progress=False)
    server.loaded[NAME] = server.models[NAME]
    server.faults["POST", "/api/generate"] = lambda handler: handler.send(200, {"done": True})
    ended = deployer.undeploy(live, wait=0.2)
    assert "an answer was still under way after 0.2 seconds" in ended.note
    assert (ended.state, server.models) == ("undeployed", {})

    server.faults.clear()
    server.loaded.clear()
    live = deploy(registry, one).result(progress=False)
    server.loaded[NAME] = server.models[NAME]
    assert deployer.undeploy(live).note == ""
    assert server.loaded == {}


class Killing:
    """Kills whoever deploys at its `step`th request that changes something at the server.

    `before`: whether the server has not done what was asked then.
    """

    def __init__(self, step: int, *, before: bool, kill: Callable[[], None]) -> None:
        self.step = step
        self.before = before
        self.kill = kill
        self.done = False

    def __call__(self, handler: Handler) -> None:
        self.step -= 1
        body = handler.body()
        if self.step == 0 and self.before:
            self.done = True
            self.kill()
            return
        if self.step == 0:
            self.done = True
            handler.wfile = open(os.devnull, "wb")  # noqa: SIM115 -- it goes with the handler
            handler.answer(body)
            self.kill()
            return
        handler.answer(body)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_deployment_killed_at_any_request_is_finished_or_undone(
    registered: tuple[ModelRegistry, list[CustomizedModel]], server: StandIn, before: bool
) -> None:
    registry, (one, other, _) = registered
    first = deploy(registry, one).result(progress=False)
    outcomes = []
    for step in range(1, 100):
        running: list[Job[LiveModel]] = []
        started = threading.Event()

        def kill(
            running: list[Job[LiveModel]] = running, started: threading.Event = started
        ) -> None:
            started.wait()
            os.kill(worker_of(registry, str(running[0].id)), signal.SIGKILL)

        fault = Killing(step, before=before, kill=kill)
        for method in CHANGING:
            server.faults[method, "/api/"] = fault
        running.append(deploy(registry, other, replace=True))
        started.set()
        outcome = result(running[0])
        server.faults.clear()
        if not fault.done:
            assert isinstance(outcome, LiveModel)
            break
        assert isinstance(outcome, JobLost)
        registry.recover()
        assert_agreed(registry, server)
        after = {live.name: live.state for live in registry.live_models()}
        outcomes.append(after[first.name])
        if after[first.name] == "superseded":  # it was finished: back to where it began
            (live,) = registry.live_models(state="live")
            Deployer(registry).rollback(live)
            Deployer(registry).undeploy(live)
            registry.delete(live)
        assert_agreed(registry, server)
    assert set(outcomes) == {"live", "superseded"}
    assert_agreed(registry, server)
    undeploy_all(registry, server)


def test_a_rollback_that_was_killed_before_it_was_recorded_is_done_again(
    registered: tuple[ModelRegistry, list[CustomizedModel]], server: StandIn
) -> None:
    registry, (one, other, _) = registered
    first = deploy(registry, one).result(progress=False)
    second = deploy(registry, other, replace=True).result(progress=False)
    server.models[NAME] = server.models[first.served.details["version"]]  # all that it did

    deployer = Deployer(registry)
    assert deployer.status(second) is Status.CHANGED
    assert deployer.rollback(second).name == first.name
    assert_agreed(registry, server)
    undeploy_all(registry, server)
