"""What a backend must do, as tests to subclass; they need the tool itself, not a stand-in.

`BackendContract` is for every backend, and each of the others for one of the optional protocols in
`customized_models.backends`. A backend's test class has all that fit it as its bases:

    class TestMine(PromotingContract, DescribingContract):
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
from attrs import frozen

from ..backends import (
    AdapterBesideBase,
    Addressed,
    Artifact,
    Backend,
    Describing,
    Plan,
    Probing,
    Promoting,
    Unloading,
    open_backend,
)
from ..errors import (
    AlreadyExistsError,
    InvalidNameError,
    InvalidOptionError,
    JobCancelled,
    ServerUnreachableError,
)
from ..gguf import GGUFFile
from ..models import (
    DeploymentEnvironment,
    DeploymentTemplate,
    Progress,
    Quantization,
    Served,
    Status,
)
from ..naming import SERVED_NAME

_NAME = f"contract-{os.getpid()}"
_RACES = 5  # enough to meet in every order
_FREE_PORT = 9  # "discard", which nothing listens on


def deployed(
    backend: Backend,
    artifact: Artifact,
    name: str,
    options: object = None,
    *,
    replaced: Collection[str] | None = (),
) -> Served:
    """`artifact` as it is called by `name`, by the steps that a deployment takes.

    `replaced`: see `backends.Promoting`.
    """
    plan = _planned(backend, artifact, name, options, replaced)
    return _finished(backend, plan, replaced)


def _planned(
    backend: Backend,
    artifact: Artifact,
    name: str = _NAME,
    options: object = None,
    replaced: Collection[str] | None = (),
) -> Plan:
    plan = backend.preflight(artifact, name, backend.options() if options is None else options)
    if isinstance(backend, Promoting):
        backend.refuse_taken(plan.served_name, replaced)
    return plan


def _finished(backend: Backend, plan: Plan, replaced: Collection[str] | None = ()) -> Served:
    served = backend.push(plan, _ignore)
    if not isinstance(backend, Promoting):
        return served
    try:
        return backend.promote(served, plan.served_name, replaced)
    except BaseException:
        backend.undeploy(served)
        raise


class BackendContract:
    """Subclass it, with fixtures `environment` and `artifact`, `not_answering` and `inventory`.

    The environment should have a short timeout, and must have room for one model: one that is
    deployed under the same name while the first is there is to be refused. What a test deploys it
    undeploys.
    """

    def build(self, environment: DeploymentEnvironment) -> Backend:
        """The backend under test, from the environment alone."""
        return open_backend(environment)

    def not_answering(self, served: Served) -> AbstractContextManager[object]:
        """The server is there and silent while the block lasts."""
        raise NotImplementedError

    def inventory(self, environment: DeploymentEnvironment) -> object:
        """All that the tool has now, in a form that can be compared."""
        raise NotImplementedError

    @pytest.fixture
    def backend(self, environment: DeploymentEnvironment) -> Backend:
        return self.build(environment)

    @pytest.fixture
    def served(self, backend: Backend, artifact: Artifact) -> Iterator[Served]:
        served = deployed(backend, artifact, _NAME)
        yield served
        backend.undeploy(served)

    def test_each_optional_protocol_is_tested(self, backend: Backend) -> None:
        bases = type(self).__mro__
        for protocol, contract in CONTRACTS.items():
            assert isinstance(backend, protocol) == (contract in bases), protocol.__name__

    def test_a_deployed_model_is_called_by_the_served_name(self, served: Served) -> None:
        assert served.name == _NAME
        assert tokens_generated(served) > 0

    def test_what_is_served_is_a_file_of_the_artifacts(
        self, served: Served, artifact: Artifact
    ) -> None:
        files = [artifact.gguf(_ignore, chat_template=present) for present in (True, False)]
        assert served.digest in [file.digest for file in files]

    def test_a_called_model_is_loaded_and_an_undeployed_one_absent(
        self, backend: Backend, served: Served
    ) -> None:
        assert backend.status(served) in (Status.LIVE, Status.LOADED)
        tokens_generated(served)
        assert backend.status(served) is Status.LOADED
        backend.undeploy(served)
        assert backend.status(served) is Status.ABSENT

    def test_undeploying_twice_is_fine(self, backend: Backend, served: Served) -> None:
        backend.undeploy(served)
        backend.undeploy(served)
        assert backend.status(served) is Status.ABSENT

    def test_an_undeployed_name_can_be_served_again(
        self, backend: Backend, served: Served, artifact: Artifact
    ) -> None:
        backend.undeploy(served)
        again = deployed(backend, artifact, _NAME)
        assert backend.status(again) in (Status.LIVE, Status.LOADED)
        backend.undeploy(again)

    def test_undeploying_leaves_what_was_there_before(
        self, environment: DeploymentEnvironment, backend: Backend, artifact: Artifact
    ) -> None:
        before = self.inventory(environment)
        served = deployed(backend, artifact, _NAME)
        tokens_generated(served)
        assert self.inventory(environment) != before
        backend.undeploy(served)
        assert self.inventory(environment) == before

    def test_the_record_of_a_model_is_enough_for_another_process_to_end_it(
        self, environment: DeploymentEnvironment, backend: Backend, served: Served
    ) -> None:
        other, recalled = self.build(environment), _recalled(served)
        assert other.status(recalled) is backend.status(served)
        other.undeploy(recalled)
        assert backend.status(served) is Status.ABSENT

    def test_what_a_killed_push_has_left_is_removed_by_what_was_recorded_before_it(
        self, environment: DeploymentEnvironment, backend: Backend, artifact: Artifact
    ) -> None:
        before = self.inventory(environment)
        plan = _planned(backend, artifact)
        details = json.loads(json.dumps(dict(plan.details)))
        served = backend.push(plan, _ignore)
        recorded = Served(plan.served_name, _url(environment), "", served.digest, details)
        self.build(environment).undeploy(recorded)
        assert backend.status(served) is Status.ABSENT
        assert self.inventory(environment) == before

    def test_taking_back_a_push_that_has_done_nothing_is_fine(
        self, environment: DeploymentEnvironment, backend: Backend, artifact: Artifact
    ) -> None:
        plan = _planned(backend, artifact)
        backend.undeploy(Served(plan.served_name, "", "", "", plan.details))

    def test_taking_back_a_push_leaves_a_model_that_has_the_name(
        self, backend: Backend, artifact: Artifact
    ) -> None:
        plan = _planned(backend, artifact)
        served = deployed(backend, artifact, _NAME)
        try:
            backend.undeploy(Served(plan.served_name, "", "", "", plan.details))
            assert tokens_generated(served) > 0
        finally:
            backend.undeploy(served)

    def test_a_server_that_does_not_answer_is_unreachable(
        self, backend: Backend, served: Served
    ) -> None:
        with self.not_answering(served):
            assert backend.status(served) is Status.UNREACHABLE
        assert backend.status(served) in (Status.LIVE, Status.LOADED)

    def test_a_second_model_under_the_same_name_is_refused(
        self, backend: Backend, served: Served, artifact: Artifact
    ) -> None:
        with pytest.raises(AlreadyExistsError):
            _planned(backend, artifact)
        assert backend.status(served) in (Status.LIVE, Status.LOADED)

    def test_a_model_planned_before_the_name_was_taken_is_refused(
        self, backend: Backend, artifact: Artifact
    ) -> None:
        plan = _planned(backend, artifact)
        served = deployed(backend, artifact, _NAME)
        try:
            with pytest.raises(AlreadyExistsError):
                _finished(backend, plan)
            assert backend.status(served) in (Status.LIVE, Status.LOADED)
            assert tokens_generated(served) > 0
        finally:
            backend.undeploy(served)

    def test_preflight_makes_no_file_and_takes_no_name(
        self, environment: DeploymentEnvironment, backend: Backend, artifact: Artifact
    ) -> None:
        before = self.inventory(environment)
        sealed = _Sealed(artifact, artifact.name)
        first, second = (_planned(backend, sealed) for _ in range(2))
        assert (first.served_name, first.options) == (second.served_name, second.options)
        assert self.inventory(environment) == before

    @pytest.mark.parametrize("length", [2, 80, 81, 150])
    def test_a_served_name_is_derived_from_any_live_models_name(
        self, backend: Backend, artifact: Artifact, length: int
    ) -> None:
        names = {
            backend.preflight(_Sealed(artifact, name), None, backend.options()).served_name
            for name in ("M" * length, "M" * (length - 1) + "_")
        }
        assert len(names) == 2
        assert all(SERVED_NAME.fullmatch(name) for name in names)

    @pytest.mark.parametrize(
        "name", ["", "Upper", "a b", "a/b/c", "../a", "a:b:c", "a:", "/a", "a\n", "a" * 81]
    )
    def test_a_served_name_outside_the_alphabet_is_refused(
        self, backend: Backend, artifact: Artifact, name: str
    ) -> None:
        with pytest.raises(InvalidNameError):
            backend.preflight(artifact, name, backend.options())

    @pytest.mark.parametrize("options", [None, {}, object()])
    def test_options_of_another_kind_are_refused(
        self, backend: Backend, artifact: Artifact, options: object
    ) -> None:
        with pytest.raises(InvalidOptionError, match=backend.options.__name__):
            backend.preflight(artifact, _NAME, options)

    def test_an_unknown_setting_of_the_environment_is_refused(
        self, environment: DeploymentEnvironment
    ) -> None:
        with pytest.raises(InvalidOptionError, match="no-such-setting"):
            self.build(attrs.evolve(environment, settings={"no-such-setting": 1}))

    def test_a_push_cancelled_at_any_moment_leaves_nothing(
        self, environment: DeploymentEnvironment, backend: Backend, artifact: Artifact
    ) -> None:
        before = self.inventory(environment)
        for moment in range(1000):
            plan = _planned(backend, artifact)
            try:
                served = backend.push(plan, _cancelling_at(moment))
            except JobCancelled:
                assert self.inventory(environment) == before
                continue
            backend.undeploy(served)
            break
        assert 0 < moment < 999
        assert self.inventory(environment) == before


class PromotingContract(BackendContract):
    """For a `Promoting` backend, with a fixture `other_artifact`: a model of other content."""

    @pytest.fixture
    def promoting(self, backend: Backend) -> Promoting:
        assert isinstance(backend, Promoting)
        return backend

    @pytest.fixture
    def pushed(self, backend: Backend, other_artifact: Artifact) -> Iterator[Served]:
        """The other model, pushed, and not promoted yet."""
        plan = backend.preflight(other_artifact, _NAME, backend.options())
        served = backend.push(plan, _ignore)
        yield served
        backend.undeploy(attrs.evolve(served, name=_NAME))  # a test may have promoted it

    def test_a_version_does_not_answer_to_the_served_name_before_it_is_promoted(
        self, backend: Backend, promoting: Promoting, pushed: Served
    ) -> None:
        assert pushed.name != _NAME
        assert tokens_generated(pushed) > 0
        called = attrs.evolve(pushed, name=_NAME)
        assert backend.status(called) is Status.ABSENT
        with pytest.raises(httpx.HTTPStatusError):
            tokens_generated(called)

        promoted = promoting.promote(pushed, _NAME, [])
        assert promoted.name == _NAME
        assert tokens_generated(promoted) > 0
        assert promoting.version(promoted) == pushed
        assert promoting.identity(promoted) == promoting.identity(pushed)
        backend.undeploy(promoted)
        assert [backend.status(s) for s in (promoted, pushed)] == [Status.ABSENT] * 2

    def test_a_name_is_refused_unless_what_has_it_may_be_replaced(
        self, promoting: Promoting, served: Served, pushed: Served
    ) -> None:
        for replaced in ([], [promoting.identity(pushed)]):
            with pytest.raises(AlreadyExistsError):
                promoting.refuse_taken(_NAME, replaced)
        promoting.refuse_taken(_NAME, [promoting.identity(served)])
        promoting.refuse_taken(_NAME, None)
        promoting.refuse_taken(f"{_NAME}-free", [])

    def test_a_promotion_replaces_only_what_it_may_and_can_be_undone(
        self, backend: Backend, promoting: Promoting, served: Served, pushed: Served
    ) -> None:
        with pytest.raises(AlreadyExistsError):
            promoting.promote(pushed, _NAME, [])
        assert backend.status(served) in (Status.LIVE, Status.LOADED)

        new = promoting.promote(pushed, _NAME, [promoting.identity(served)])
        assert backend.status(served) is Status.CHANGED
        assert backend.status(promoting.version(served)) in (Status.LIVE, Status.LOADED)
        assert backend.status(new) in (Status.LIVE, Status.LOADED)

        promoting.promote(promoting.version(served), _NAME, [promoting.identity(new)])
        assert backend.status(new) is Status.CHANGED
        assert backend.status(served) in (Status.LIVE, Status.LOADED)

    def test_undeploying_what_lost_its_name_leaves_what_has_it(
        self, backend: Backend, promoting: Promoting, served: Served, pushed: Served
    ) -> None:
        new = promoting.promote(pushed, _NAME, None)
        backend.undeploy(served)
        assert backend.status(new) in (Status.LIVE, Status.LOADED)
        assert backend.status(promoting.version(served)) is Status.ABSENT
        assert tokens_generated(new) > 0

    def test_the_record_of_a_version_is_enough_to_remove_it(
        self, environment: DeploymentEnvironment, backend: Backend, pushed: Served
    ) -> None:
        self.build(environment).undeploy(_recalled(pushed))
        assert backend.status(pushed) is Status.ABSENT

    @pytest.mark.parametrize("contents", ["equal", "different"])
    def test_of_two_promotions_at_once_one_wins_and_the_other_is_refused(
        self,
        environment: DeploymentEnvironment,
        backend: Backend,
        promoting: Promoting,
        artifact: Artifact,
        other_artifact: Artifact,
        contents: str,
    ) -> None:
        inventory = self.inventory(environment)
        for _ in range(_RACES):
            rival = other_artifact if contents == "equal" else artifact
            plans = [
                backend.preflight(each, _NAME, backend.options())
                for each in (other_artifact, rival)
            ]
            versions = [backend.push(plan, _ignore) for plan in plans]
            winner, loser = _raced(promoting, versions, [])
            backend.undeploy(loser)
            assert backend.status(winner) in (Status.LIVE, Status.LOADED)
            assert tokens_generated(winner) > 0
            backend.undeploy(winner)
        assert self.inventory(environment) == inventory

    def test_of_two_that_replace_the_same_at_once_one_wins(
        self,
        backend: Backend,
        promoting: Promoting,
        served: Served,
        pushed: Served,
        other_artifact: Artifact,
    ) -> None:
        plan = backend.preflight(other_artifact, _NAME, backend.options())
        rival = backend.push(plan, _ignore)
        for _ in range(_RACES):
            winner, _ = _raced(promoting, [pushed, rival], [promoting.identity(served)])
            assert backend.status(winner) in (Status.LIVE, Status.LOADED)
            promoting.promote(served, _NAME, [promoting.identity(winner)])
        backend.undeploy(rival)
        assert backend.status(served) in (Status.LIVE, Status.LOADED)


class ProbingContract(BackendContract):
    """For a `Probing` backend."""

    def test_the_likeliest_tokens_are_the_same_each_time(
        self, backend: Backend, served: Served
    ) -> None:
        assert isinstance(backend, Probing)
        first, again = (backend.probe(served).greedy("a b", 4) for _ in range(2))
        assert first == again != ""

    def test_types_of_tensors_are_told_by_name_or_not_at_all(
        self, backend: Backend, served: Served
    ) -> None:
        assert isinstance(backend, Probing)
        types = backend.probe(served).tensor_types()
        assert types is None or (types and all(name and kind for name, kind in types.items()))


class UnloadingContract(BackendContract):
    """For an `Unloading` backend."""

    def test_a_model_that_nobody_uses_is_unloaded_within_seconds(
        self, backend: Backend, served: Served
    ) -> None:
        assert isinstance(backend, Unloading)
        tokens_generated(served)
        assert backend.unload(served, 20) == ""
        backend.undeploy(served)
        assert backend.status(served) is Status.ABSENT

    def test_unloading_what_is_gone_or_was_never_there_is_fine(
        self, backend: Backend, served: Served, artifact: Artifact
    ) -> None:
        assert isinstance(backend, Unloading)
        backend.unload(served, 20)
        backend.undeploy(served)
        assert backend.unload(served, 0) == ""


class DescribingContract(BackendContract):
    """For a `Describing` backend."""

    def test_the_tool_tells_its_version_and_more_as_json_can_hold_it(
        self, backend: Backend
    ) -> None:
        assert isinstance(backend, Describing)
        told: Mapping[str, Any] = backend.describe()
        assert isinstance(told["version"], str)
        assert json.loads(json.dumps(dict(told))) == told


class AddressedContract(BackendContract):
    """For an `Addressed` backend."""

    def test_models_are_called_at_the_address_of_the_environment(
        self, environment: DeploymentEnvironment, backend: Backend, served: Served
    ) -> None:
        assert isinstance(backend, Addressed)
        assert served.endpoint.startswith(backend.url)
        assert backend.url.startswith(environment.url)

    def test_a_server_that_is_not_there_is_said_to_be_unreachable(
        self, environment: DeploymentEnvironment, served: Served, artifact: Artifact
    ) -> None:
        gone = self.build(attrs.evolve(environment, port=_FREE_PORT))
        assert gone.status(served) is Status.UNREACHABLE
        with pytest.raises(ServerUnreachableError):
            gone.undeploy(served)
        with pytest.raises(ServerUnreachableError):
            gone.preflight(artifact, _NAME, gone.options())


CONTRACTS: Mapping[type[Any], type[BackendContract]] = {
    Promoting: PromotingContract,
    Probing: ProbingContract,
    Unloading: UnloadingContract,
    Describing: DescribingContract,
    Addressed: AddressedContract,
}
"""The contract of each optional protocol."""


def tokens_generated(served: Served) -> int:
    """How many tokens the model answers with, called as other services call it."""
    if served.api == "ollama":
        options = {"num_predict": 4, "temperature": 0}
        body = {"model": served.name, "prompt": "a", "stream": False, "options": options}
        answer = httpx.post(f"{served.endpoint}/api/generate", json=body, timeout=60)
        return int(answer.raise_for_status().json()["eval_count"])
    body = {"model": served.name, "prompt": "a", "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{served.endpoint}/completions", json=body, timeout=60)
    return int(answer.raise_for_status().json()["usage"]["completion_tokens"])


def _raced(
    promoting: Promoting, versions: list[Served], replaced: Collection[str]
) -> tuple[Served, Served]:
    """Promote all at once; the winner as it is called now, and the version of a loser."""
    barrier = threading.Barrier(len(versions))
    won: list[Served] = []
    lost: list[tuple[Served, Exception]] = []

    def promote(version: Served) -> None:
        barrier.wait()
        try:
            won.append(promoting.promote(version, _NAME, replaced))
        except Exception as error:
            lost.append((version, error))

    threads = [threading.Thread(target=promote, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for _, error in lost] == [AlreadyExistsError] * (len(versions) - 1), lost
    return won[0], lost[0][0]


def _recalled(served: Served) -> Served:
    """As another process reads it from a record."""
    return Served(**json.loads(json.dumps(attrs.asdict(served))))


def _url(environment: DeploymentEnvironment) -> str:
    return environment.url if environment.address is not None else ""


@frozen
class _Sealed:
    """An artifact that gives no file, under a name of its own."""

    _artifact: Artifact
    name: str

    @property
    def architecture(self) -> str:
        return self._artifact.architecture

    @property
    def base(self) -> str:
        return self._artifact.base

    @property
    def adapter_config(self) -> Mapping[str, Any] | None:
        return self._artifact.adapter_config

    @property
    def quantization(self) -> Quantization:
        return self._artifact.quantization

    @property
    def template(self) -> DeploymentTemplate | None:
        return self._artifact.template

    @property
    def finished(self) -> bool:
        return self._artifact.finished

    def check_gguf(self) -> None:
        self._artifact.check_gguf()

    def gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        raise AssertionError("preflight asked for a file")

    def base_gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        raise AssertionError("preflight asked for the base's file")

    def directory(self) -> AbstractContextManager[Path]:
        raise AssertionError("preflight asked for a directory")

    def adapter(self) -> AbstractContextManager[AdapterBesideBase]:
        raise AssertionError("preflight asked for an adapter")


def _ignore(phase: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def _cancelling_at(moment: int) -> Progress:
    calls = iter(range(1000))

    def progress(phase: str, done: int, total: int) -> None:
        if next(calls) == moment:
            raise JobCancelled(phase)

    return progress
