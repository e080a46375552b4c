"""SGLang by its documented API, at a stand-in: no server of it runs without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from customized_models.backends import Backend, Promoting, open_backend
from customized_models.errors import (
    AlreadyExistsError,
    BaseModelMismatch,
    ServerAnswerError,
    ServerUnreachableError,
    UnsupportedAdapterError,
    UnsupportedError,
)
from customized_models.models import DeploymentEnvironment, Served, Status
from customized_models.testing import tiny_llama, tiny_lora
from tests.servers.adapter_artifact import AdapterArtifact
from tests.servers.artifact import ignore
from tests.servers.sglang_stand_in import SGLangStandIn, sglang_stand_in


@pytest.fixture(scope="module")
def artifact(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterArtifact:
    directory = tmp_path_factory.mktemp("sglang")
    return AdapterArtifact(tiny_lora(directory / "adapter", tiny_base), tiny_base, directory)


@pytest.fixture
def sglang(tiny_base: Path) -> Iterator[SGLangStandIn]:
    with sglang_stand_in(tiny_base) as running:
        yield running


@pytest.fixture
def models(tmp_path: Path) -> Path:
    directory = tmp_path / "adapters"
    directory.mkdir()
    return directory


@pytest.fixture
def environment(sglang: SGLangStandIn, models: Path) -> DeploymentEnvironment:
    settings = {"models_directory": str(models), "timeout": 5}
    return DeploymentEnvironment("here", "sglang", "127.0.0.1", sglang.port, settings=settings)


@pytest.fixture
def backend(environment: DeploymentEnvironment) -> Backend:
    return open_backend(environment)


def deployed(backend: Backend, artifact: AdapterArtifact, replaced: list[str] | None) -> Served:
    assert isinstance(backend, Promoting)
    plan = backend.preflight(artifact, "support", backend.options())
    return backend.promote(backend.push(plan, ignore), plan.served_name, replaced)


def files_in(models: Path) -> set[str]:
    return {path.name for path in models.iterdir()} - {".lock"}


def test_an_adapter_is_called_by_its_bases_name_and_its_own(
    sglang: SGLangStandIn, backend: Backend, artifact: AdapterArtifact, models: Path
) -> None:
    served = deployed(backend, artifact, [])
    version = served.details["version"]
    assert served.name == "base:support"
    assert sglang.adapters == dict.fromkeys((version, "support"), str(models / version))
    assert backend.status(served) is Status.LOADED
    backend.undeploy(served)
    assert sglang.adapters == {}
    assert files_in(models) == set()
    assert backend.status(served) is Status.ABSENT


def test_a_name_is_taken_over_on_purpose_and_given_back(
    sglang: SGLangStandIn, backend: Backend, artifact: AdapterArtifact
) -> None:
    assert isinstance(backend, Promoting)
    first = deployed(backend, artifact, [])
    with pytest.raises(AlreadyExistsError, match="replace=True"):
        deployed(backend, artifact, [])
    second = deployed(backend, artifact, None)
    assert backend.status(first) is Status.CHANGED
    backend.promote(first, first.name, [backend.identity(second)])
    assert backend.status(first) is Status.LOADED
    assert sglang.adapters["support"].endswith(first.details["version"])


def test_what_is_someone_elses_is_left_alone(
    sglang: SGLangStandIn, backend: Backend, artifact: AdapterArtifact, tmp_path: Path
) -> None:
    served = deployed(backend, artifact, [])
    sglang.adapters["support"] = str(tmp_path)
    assert backend.status(served) is Status.CHANGED
    backend.undeploy(served)
    assert sglang.adapters == {"support": str(tmp_path)}


def test_an_adapter_that_is_not_loaded_leaves_nothing(
    sglang: SGLangStandIn,
    environment: DeploymentEnvironment,
    artifact: AdapterArtifact,
    models: Path,
) -> None:
    settings = {**environment.settings, "server_directory": "/elsewhere"}
    backend = open_backend(attrs.evolve(environment, settings=settings))
    plan = backend.preflight(artifact, "support", backend.options())
    with pytest.raises(ServerAnswerError, match="no adapter at /elsewhere"):
        backend.push(plan, ignore)
    assert (sglang.adapters, files_in(models)) == ({}, set())


def test_what_it_cannot_serve_is_refused_before_anything_is_sent(
    sglang: SGLangStandIn, environment: DeploymentEnvironment, tiny_base: Path, tmp_path: Path
) -> None:
    backend = open_backend(environment)
    dora = tiny_lora(tmp_path / "dora", tiny_base, use_dora=True)
    with pytest.raises(UnsupportedAdapterError, match="use_dora"):
        backend.preflight(AdapterArtifact(dora, tiny_base, tmp_path), "new", backend.options())

    settings = {**environment.settings, "max_lora_rank": 4}
    limited = open_backend(attrs.evolve(environment, settings=settings))
    large = AdapterArtifact(tiny_lora(tmp_path / "large", tiny_base, r=8), tiny_base, tmp_path)
    with pytest.raises(UnsupportedAdapterError, match="rank 8"):
        limited.preflight(large, "new", limited.options())
    sglang.called = "base:of-tomorrow"
    with pytest.raises(UnsupportedError, match="--served-model-name"):
        backend.preflight(large, "new", backend.options())
    assert sglang.posted == []


def test_an_adapter_of_another_base_is_refused(
    backend: Backend, tmp_path: Path, models: Path
) -> None:
    other = tiny_llama(tmp_path / "other", num_hidden_layers=1)
    artifact = AdapterArtifact(tiny_lora(tmp_path / "adapter", other), other, tmp_path)
    plan = backend.preflight(artifact, "new", backend.options())
    with pytest.raises(BaseModelMismatch, match="not the base model of the adapter"):
        backend.push(plan, ignore)
    assert files_in(models) == set()


def test_a_finished_file_is_refused(backend: Backend, artifact: AdapterArtifact) -> None:
    with pytest.raises(UnsupportedError, match="deploy without gguf="):
        backend.preflight(attrs.evolve(artifact, finished=True), "new", backend.options())


def test_a_server_that_dies_while_it_loads_leaves_no_directory(
    sglang: SGLangStandIn, backend: Backend, artifact: AdapterArtifact, models: Path
) -> None:
    plan = backend.preflight(artifact, "support", backend.options())
    sglang.dies = True
    with pytest.raises(ServerUnreachableError, match="closed") as caught:
        backend.push(plan, ignore)
    assert "may be loaded at the server" in caught.value.__notes__[-1]
    assert files_in(models) == set()
