"""The contract of backends as a test class to subclass. It needs the real deployment tool."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import attrs
import httpx
import pytest
from attrs import frozen

from ..backends import AdapterBesideBase, Artifact, Backend, open_backend
from ..errors import AlreadyExistsError, InvalidNameError, InvalidOptionError, JobCancelled
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


class BackendContract:
    """The contract of a backend. Subclass it, with fixtures and `not_answering`.

    The fixture `environment` gives a `DeploymentEnvironment` with a short timeout, whose tool has
    room for a model; `artifact` gives the `Artifact` to deploy. Each test undeploys what it has
    deployed.
    """

    def build(self, environment: DeploymentEnvironment) -> Backend:
        """The backend under test, from the environment alone."""
        return open_backend(environment)

    def not_answering(self, served: Served) -> AbstractContextManager[object]:
        """The server is there and silent while the block lasts."""
        raise NotImplementedError

    @pytest.fixture
    def backend(self, environment: DeploymentEnvironment) -> Backend:
        return self.build(environment)

    @pytest.fixture
    def served(self, backend: Backend, artifact: Artifact) -> Iterator[Served]:
        served = _push(backend, artifact)
        yield served
        backend.undeploy(served)

    def test_a_pushed_model_is_called_by_the_served_name(self, served: Served) -> None:
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
        again = _push(backend, artifact)
        assert backend.status(again) in (Status.LIVE, Status.LOADED)
        backend.undeploy(again)

    def test_the_record_of_a_model_is_enough_for_another_process_to_end_it(
        self, environment: DeploymentEnvironment, backend: Backend, served: Served
    ) -> None:
        stored = json.loads(json.dumps(attrs.asdict(served)))
        other, recalled = self.build(environment), Served(**stored)
        assert other.status(recalled) is backend.status(served)
        other.undeploy(recalled)
        assert backend.status(served) is Status.ABSENT

    def test_what_a_killed_push_has_left_is_removed_by_what_was_recorded_before_it(
        self, environment: DeploymentEnvironment, backend: Backend, artifact: Artifact
    ) -> None:
        plan = backend.preflight(artifact, _NAME, backend.options())
        details = json.loads(json.dumps(dict(plan.details)))
        served = backend.push(plan, _ignore)
        endpoint = environment.url if environment.address is not None else ""
        self.build(environment).undeploy(
            Served(plan.served_name, endpoint, "", served.digest, details=details)
        )
        assert backend.status(served) is Status.ABSENT

    def test_taking_back_a_push_that_has_done_nothing_is_fine(
        self, environment: DeploymentEnvironment, backend: Backend, artifact: Artifact
    ) -> None:
        plan = backend.preflight(artifact, _NAME, backend.options())
        backend.undeploy(Served(plan.served_name, "", "", "", details=plan.details))

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
            backend.preflight(artifact, _NAME, backend.options())
        assert backend.status(served) in (Status.LIVE, Status.LOADED)

    def test_a_model_planned_before_the_name_was_taken_is_refused(
        self, backend: Backend, artifact: Artifact
    ) -> None:
        plan = backend.preflight(artifact, _NAME, backend.options())
        served = _push(backend, artifact)
        try:
            with pytest.raises(AlreadyExistsError):
                backend.push(plan, _ignore)
            assert tokens_generated(served) > 0
        finally:
            backend.undeploy(served)

    def test_preflight_makes_no_file_and_takes_no_name(
        self, backend: Backend, artifact: Artifact
    ) -> None:
        sealed = _Sealed(artifact, artifact.name)
        first, second = (backend.preflight(sealed, _NAME, backend.options()) for _ in range(2))
        assert (first.served_name, first.options) == (second.served_name, second.options)

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

    @pytest.mark.parametrize("name", ["", "Upper", "a b", "a/b", "../a", "a:b", "a\n", "a" * 81])
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

    def test_a_push_cancelled_at_any_moment_leaves_the_name_free(
        self, backend: Backend, artifact: Artifact
    ) -> None:
        for moment in range(1000):
            plan = backend.preflight(artifact, _NAME, backend.options())
            try:
                served = backend.push(plan, _cancelling_at(moment))
            except JobCancelled:
                continue
            backend.undeploy(served)
            break
        assert 0 < moment < 999


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


@frozen
class _Sealed:
    """An artifact that gives no file, under a name of its own."""

    _artifact: Artifact
    name: str

    @property
    def architecture(self) -> str:
        return self._artifact.architecture

    @property
    def quantization(self) -> Quantization:
        return self._artifact.quantization

    @property
    def template(self) -> DeploymentTemplate | None:
        return self._artifact.template

    def check_gguf(self) -> None:
        self._artifact.check_gguf()

    def gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        raise AssertionError("preflight asked for a file")

    def directory(self) -> AbstractContextManager[Path]:
        raise AssertionError("preflight asked for a directory")

    def adapter(self) -> AbstractContextManager[AdapterBesideBase]:
        raise AssertionError("preflight asked for an adapter")


def _push(backend: Backend, artifact: Artifact) -> Served:
    return backend.push(backend.preflight(artifact, _NAME, backend.options()), _ignore)


def _ignore(phase: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def _cancelling_at(moment: int) -> Progress:
    calls = iter(range(1000))

    def progress(phase: str, done: int, total: int) -> None:
        if next(calls) == moment:
            raise JobCancelled(phase)

    return progress
