"""Leases, storage, deployments and recovery, against a model of what must be true of them.

A few processes register, check out, deploy, delete and die at any step in between; others come
and recover. Whatever they do, in whichever order: a visible model is whole, nothing that someone
holds goes away, and once the dead are recovered there are no bytes, rows or served models but
those of visible ones.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from customized_models import (
    CustomizedModel,
    CustomizedModelsError,
    DeploymentEnvironment,
    InUseError,
    LeaseLostError,
    LiveModel,
    LocalStorage,
    ModelRegistry,
    NotFoundError,
    Served,
    Status,
)
from customized_models import processes as processes_module
from customized_models.backends import Artifact, Plan, Tools
from customized_models.catalog.levels import Levels
from customized_models.deploying.recovery import recover_deployments
from customized_models.deploying.request import DeployRequest
from customized_models.deploying.running import run_deploy
from customized_models.files.documents import to_document
from customized_models.jobs.work import Work
from customized_models.naming import live_name
from customized_models.processes import Process
from customized_models.testing import tiny_llama, tiny_lora

pytestmark = pytest.mark.slow

MEMORY = Path("/dev/shm")  # what is pushed to the disk here need not survive a power cut


class Killed(BaseException):
    """The process ends here: nothing of it runs any more, not even its cleaning up."""


@frozen
class NoOptions:
    pass


class Tool:
    """A deployment tool in memory: names to marks of who put them there."""

    options = NoOptions
    served: dict[str, str] = {}  # noqa: RUF012 -- it is one server, whoever talks to it
    killed_after_creating = False

    def __init__(self, environment: DeploymentEnvironment) -> None:
        pass

    def preflight(self, artifact: Artifact, served_name: str | None, options: object) -> Plan:
        return Plan(artifact, artifact.name, options, details={"mark": uuid.uuid4().hex})

    def push(self, plan: Plan, progress: object) -> Served:
        Tool.served[plan.served_name] = plan.details["mark"]
        if Tool.killed_after_creating:
            raise Killed
        return Served(plan.served_name, "http://tool", "any", "sha256:0", details=plan.details)

    def status(self, served: Served) -> Status:
        return Status.LIVE if served.name in Tool.served else Status.ABSENT

    def undeploy(self, served: Served) -> None:
        if Tool.served.get(served.name) == served.details["mark"]:
            del Tool.served[served.name]


TOOLS = Tools({"tool": Tool})


class Host:
    """One host's processes, as the library sees them: numbers that live or do not."""

    def __init__(self) -> None:
        self.current = 1
        self.living = {1}

    def process(self) -> Process:
        return Process(processes_module.host_id(), self.current, "once")

    def of(self, pid: int) -> Process | None:
        return Process(processes_module.host_id(), pid, "once") if pid in self.living else None


class Machine(RuleBasedStateMachine):
    """`steps` of a process are storage and database calls; a kill is a `Killed` in one of them."""

    base: Path
    adapter: Path

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.host = Host()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(Process, "current", classmethod(lambda cls: self.host.process()))
        self.patch.setattr(Process, "of", classmethod(lambda cls, pid: self.host.of(pid)))
        self.held: dict[str, int] = {}  # keys of what is checked out: by how many
        self.open: list[ExitStack] = []
        Tool.served = {}
        self.registry.add_base_model("tiny", self.base)
        self.registry.add_environment(DeploymentEnvironment("here", "tool"))

    @property
    def registry(self) -> ModelRegistry:
        """As the current process opens it."""
        return ModelRegistry(self.scratch / "models")

    def teardown(self) -> None:
        for stack in self.open:
            stack.close()
        self.patch.undo()
        shutil.rmtree(self.scratch)

    models = Bundle("models")
    checkouts = Bundle("checkouts")

    @contextlib.contextmanager
    def killed_in(self, owner: type, method: str, *, after: bool) -> Iterator[None]:
        """A process of its own, killed at that step of the block; then it is another's turn."""
        before, self.host.current = self.host.current, max(self.host.living) + 1
        self.host.living.add(self.host.current)
        real = getattr(owner, method)
        dead = False

        def step(*arguments: Any, **named: Any) -> Any:
            nonlocal dead
            if after and not dead:
                real(*arguments, **named)
            dead = True
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, method, step)
            with contextlib.suppress(Killed):
                yield
        self.host.living.discard(self.host.current)
        self.host.current = before

    # Rules

    @initialize(target=models)
    def first(self) -> CustomizedModel:
        return self.register(0)

    @rule(target=models, number=st.integers(0, 3))
    def register(self, number: int) -> CustomizedModel:
        return self.registry.register(self.adapter, train_name=f"run-{number}")

    @rule(number=st.integers(0, 3), after=st.booleans())
    def registration_killed_while_publishing(self, number: int, after: bool) -> None:
        frozen_undo = pytest.MonkeyPatch()
        with self.killed_in(LocalStorage, "publish", after=after):
            frozen_undo.setattr(LocalStorage, "delete", _dead)
            try:
                self.registry.register(self.adapter, train_name=f"run-{number}")
            finally:
                frozen_undo.undo()

    @rule(model=models, after=st.booleans())
    def deletion_killed(self, model: CustomizedModel, after: bool) -> None:
        with (
            self.killed_in(LocalStorage, "delete", after=after),
            contextlib.suppress(NotFoundError, InUseError),
        ):
            self.registry.delete(model)

    @rule(target=checkouts, model=models)
    def check_out(self, model: CustomizedModel) -> tuple[CustomizedModel, Path, ExitStack] | None:
        stack = ExitStack()
        try:
            directory = stack.enter_context(self.registry.checkout(model))
        except NotFoundError:
            return None
        self.open.append(stack)
        self.held[model.key] = self.held.get(model.key, 0) + 1
        return model, directory, stack

    @rule(checkout=consumes(checkouts))
    def check_in(self, checkout: tuple[CustomizedModel, Path, ExitStack] | None) -> None:
        if checkout is None:
            return
        model, directory, stack = checkout
        assert (directory / "adapter_model.safetensors").is_file()
        self.held[model.key] -= 1
        stack.close()

    @rule(model=models)
    def delete(self, model: CustomizedModel) -> None:
        try:
            self.registry.delete(model)
        except InUseError:
            assert self.held.get(model.key)
        except NotFoundError:
            pass
        else:
            assert not self.held.get(model.key)

    @rule(model=models, killed=st.booleans())
    def deploy(self, model: CustomizedModel, killed: bool) -> None:
        registry = self.registry
        name: Callable[[uuid.UUID], str] = lambda id: live_name(  # noqa: E731
            model.name, id, "no_quantization"
        )
        try:
            registry.get(CustomizedModel, model.name)
        except NotFoundError:
            return
        before = self.host.current
        if killed:
            self.host.current = max(self.host.living) + 1
            self.host.living.add(self.host.current)
        request = DeployRequest(
            kind="customized", model=model.name, environment="here",
            quantization="no_quantization", served_name=None, options={}, template=None,
            gguf=None, replace=False, proofs=(), accept_failed=(),
        )  # fmt: skip
        id = registry.catalog.jobs.add("deploy", name, to_document(request), (), max_running=1)
        lease = registry.catalog.lease(str(id))
        work = Work(
            id, name(id), to_document(request), registry.catalog, registry.shelf, lease,
            lambda *_: None,
        )  # fmt: skip
        Tool.killed_after_creating = killed
        with pytest.MonkeyPatch.context() as patch:
            if killed:
                patch.setattr(Levels, "drop", _dead)
            with contextlib.suppress(Killed):
                run_deploy(work, TOOLS)
        Tool.killed_after_creating = False
        if killed:
            self.host.living.discard(self.host.current)
            self.host.current = before

    @rule()
    def recover(self) -> None:
        registry = self.registry
        registry.shelf.recover()
        recover_deployments(registry.catalog, registry.shelf, TOOLS)
        keys = set(LocalStorage(registry.root).keys("customized/"))
        assert keys == {model.key for model in registry.customized_models()}
        assert set(Tool.served) == {live.served.name for live in registry.live_models()}

    # What is always true

    @invariant()
    def visible_models_are_whole(self) -> None:
        for model in self.registry.customized_models():
            with contextlib.suppress(NotFoundError, LeaseLostError):
                self.registry.verify(model)

    @invariant()
    def what_is_held_is_there(self) -> None:
        for key, count in self.held.items():
            assert not count or (self.registry.root / key / "manifest.json").is_file()


def _dead(*_: object, **__: object) -> None:
    raise Killed


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> type[Machine]:
    scratch = tmp_path_factory.mktemp("machine")
    base = tiny_llama(scratch / "base")
    parts = {"base": base, "adapter": tiny_lora(scratch / "adapter", base)}
    return type("OnTinyModels", (Machine,), parts)


def run(machine: type[Machine], examples: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_whatever_processes_do_and_wherever_they_die(machine: type[Machine]) -> None:
    run(machine, 25)


def test_the_machine_sees_a_model_deleted_that_is_checked_out(
    machine: type[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when every lease ended because one transaction took long."""
    from customized_models.catalog.leases import Leases

    monkeypatch.setattr(Leases, "refuse_if_held", lambda *_: None)
    with pytest.raises((AssertionError, CustomizedModelsError, FileNotFoundError)):
        run(machine, 40)


def test_the_machine_sees_a_served_model_that_nobody_knows(
    machine: type[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when nothing was recorded before a deployment created it."""
    real = Levels.unfinished
    monkeypatch.setattr(
        Levels,
        "unfinished",
        lambda levels: [c for c in real(levels) if not isinstance(c.value, LiveModel)],
    )
    with pytest.raises(AssertionError):
        run(machine, 40)
