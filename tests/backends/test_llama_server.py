"""llama.cpp's router elsewhere: files and adapters in a directory that a real server reads."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from customized_models import Deployer, JobLost, ModelRegistry
from customized_models.backends import Backend, Promoting, open_backend, presets
from customized_models.backends.llama_server import LlamaServerOptions
from customized_models.errors import (
    AlreadyExistsError,
    InvalidNameError,
    InvalidOptionError,
    ServedModelChangedError,
    ServerAnswerError,
    ServerUnreachableError,
    StorageError,
    UnsupportedAdapterError,
    UnsupportedError,
)
from customized_models.models import DeploymentEnvironment, Served, Status
from customized_models.testing import (
    AddressedContract,
    DescribingContract,
    ProbingContract,
    PromotingContract,
    deployed,
    tiny_llama,
    tiny_lora,
)
from customized_models.testing.backends import tokens_generated
from tests.deploying.workers import worker_of
from tests.servers.adapter_artifact import AdapterArtifact
from tests.servers.artifact import FileArtifact, ignore, no_gguf
from tests.servers.llama_router import LlamaRouter, llama_router
from tests.servers.llama_server import llama_server

BESIDE = LlamaServerOptions(beside_base=True)


@pytest.fixture(scope="module")
def router(
    tmp_path_factory: pytest.TempPathFactory, built_llama_cpp: Path
) -> Iterator[LlamaRouter]:
    with llama_router(tmp_path_factory.mktemp("router")) as running:
        yield running


@pytest.fixture
def environment(router: LlamaRouter) -> DeploymentEnvironment:
    settings = {"models_directory": str(router.models), "timeout": 20}
    return DeploymentEnvironment(
        "here", "llama_server", "127.0.0.1", router.port, settings=settings
    )


@pytest.fixture
def backend(environment: DeploymentEnvironment) -> Backend:
    return open_backend(environment)


def shared(router: LlamaRouter) -> set[str]:
    """What lies in the directory that the server reads, but for its lock."""
    return {path.name for path in router.models.iterdir()} - {".lock"}


class TestLlamaServer(PromotingContract, ProbingContract, DescribingContract, AddressedContract):
    @pytest.fixture
    def environment(self, router: LlamaRouter) -> DeploymentEnvironment:
        self.server = router
        settings = {"models_directory": str(router.models), "timeout": 5}
        return DeploymentEnvironment(
            "here", "llama_server", "127.0.0.1", router.port, settings=settings
        )

    def not_answering(self, served: Served) -> AbstractContextManager[object]:
        return self.server.stopped()

    def inventory(self, environment: DeploymentEnvironment) -> object:
        listed = httpx.get(f"{environment.url}/models").json()["data"]
        text = (self.server.models / presets.FILE).read_text()
        return {entry["id"] for entry in listed}, shared(self.server), presets.sections(text)


def adapter_of(base: Path, directory: Path, **options: Any) -> AdapterArtifact:
    adapter = tiny_lora(directory / "adapter", base, **({"lora_alpha": 32} | options))
    return AdapterArtifact(adapter, base, directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, so that the likeliest tokens can be compared with transformers'."""
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama", dtype="float32")


def test_an_adapter_beside_its_base_answers_as_peft_does(
    registry: ModelRegistry,
    router: LlamaRouter,
    environment: DeploymentEnvironment,
    base: Path,
    tmp_path: Path,
) -> None:
    registry.add_base_model("llama-exact", base)
    registry.add_environment(environment)
    deployer, live = Deployer(registry), []
    for seed in (0, 1):
        adapter = adapter_of(base, tmp_path / str(seed), seed=seed).adapter_directory
        customized = registry.register(adapter, train_name=f"s{seed}", base_model="llama-exact")
        every = ("content", "template", "greedy")
        job = deployer.deploy(customized, served_name=f"s{seed}", options=BESIDE, proofs=every)
        live.append(job.result(progress=False))

    for each in live:
        assert {p.name: p.passed for p in each.proofs} == {"template": True, "greedy": True}
        assert deployer.status(each) is Status.LOADED
    assert len([name for name in shared(router) if name.endswith(".gguf")]) == 1
    assert len([name for name in shared(router) if name.endswith(".lora")]) == 2
    deployer.undeploy(live[0])
    assert tokens_generated(live[1].served) > 0
    deployer.undeploy(live[1])
    assert shared(router) == {presets.FILE}


def test_what_a_killed_deployment_beside_a_base_left_is_taken_back(
    registry: ModelRegistry,
    router: LlamaRouter,
    environment: DeploymentEnvironment,
    base: Path,
    tmp_path: Path,
) -> None:
    registry.add_base_model("llama-exact", base)
    registry.add_environment(environment)
    adapter = adapter_of(base, tmp_path).adapter_directory
    customized = registry.register(adapter, train_name="support", base_model="llama-exact")
    job = Deployer(registry).deploy(customized, served_name="killed", options=BESIDE)
    while not list(router.models.glob("*.lora")) and job.ended is None:
        time.sleep(0.001)
    with router.stopped():
        os.kill(worker_of(registry, str(job.id)), signal.SIGKILL)
    with pytest.raises(JobLost):
        job.result(progress=False)
    assert len(shared(router)) > 1
    assert registry.recover() == [f"undid the deployment of {job.name} at here"]
    assert shared(router) == {presets.FILE}


def test_processes_of_adapters_share_the_pages_of_their_base(
    router: LlamaRouter, backend: Backend, tmp_path: Path
) -> None:
    """Twelve million bytes of weights are in each process, and are its own in none."""
    large = tiny_llama(tmp_path / "base", dtype="float32", intermediate_size=8192)
    weights = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    artifacts = [adapter_of(large, tmp_path / str(seed), seed=seed) for seed in range(2)]
    served = [deployed(backend, a, f"a{n}", BESIDE) for n, a in enumerate(artifacts)]
    for each in served:
        assert tokens_generated(each) > 0
    memory = router.memory()
    assert len(memory) == 2
    assert all(process["shared"] > weights for process in memory)
    for each in served:
        backend.undeploy(each)
    assert router.memory() == []


@pytest.mark.parametrize(
    ("options", "named"),
    [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_a_file_of_an_adapter_cannot_say_is_refused_before_anything_is_put_there(
    router: LlamaRouter,
    backend: Backend,
    base: Path,
    tmp_path: Path,
    options: dict[str, Any],
    named: str,
) -> None:
    with pytest.raises(UnsupportedAdapterError, match=named):
        backend.preflight(adapter_of(base, tmp_path, **options), "new", BESIDE)
    assert shared(router) == {presets.FILE}


def test_a_complete_model_has_no_base_to_be_beside(
    backend: Backend, artifact: FileArtifact
) -> None:
    with pytest.raises(UnsupportedError, match="no adapter to serve beside a base"):
        backend.preflight(artifact, "new", BESIDE)


def test_a_finished_file_is_not_served_beside_a_base(
    backend: Backend, base: Path, tmp_path: Path
) -> None:
    finished = attrs.evolve(adapter_of(base, tmp_path), finished=True)
    with pytest.raises(UnsupportedError, match="gguf="):
        backend.preflight(finished, "new", BESIDE)


def test_a_file_that_llama_cpp_cannot_load_leaves_nothing(
    router: LlamaRouter, backend: Backend, artifact: FileArtifact, tmp_path: Path
) -> None:
    wrong = attrs.evolve(artifact, files=(no_gguf(tmp_path),) * 2)
    with pytest.raises(ServerAnswerError, match="did not load"):
        deployed(backend, wrong, "wrong")
    assert shared(router) == {presets.FILE}


def test_a_server_that_dies_while_it_loads_leaves_no_files(
    built_llama_cpp: Path, artifact: FileArtifact, tmp_path: Path
) -> None:
    with llama_router(tmp_path) as router:
        settings = {"models_directory": str(router.models), "timeout": 5}
        environment = DeploymentEnvironment(
            "here", "llama_server", "127.0.0.1", router.port, settings=settings
        )
        backend = open_backend(environment)
        plan = backend.preflight(artifact, "dying", backend.options())

        def kill(phase: str, done: int, total: int) -> None:
            if phase == "loading":
                os.kill(router.pid, signal.SIGKILL)

        with pytest.raises(ServerUnreachableError) as caught:
            backend.push(plan, kill)
        assert "may be left at the server" in caught.value.__notes__[-1]
        assert shared(router) == {presets.FILE}
        assert presets.sections((router.models / presets.FILE).read_text()) == {}


def test_a_file_that_was_changed_is_left_alone(
    router: LlamaRouter, backend: Backend, artifact: FileArtifact
) -> None:
    served = deployed(backend, artifact, "changed")
    file = router.models / f"{served.details['version']}.gguf"
    file.write_bytes(b"other")
    with pytest.raises(ServedModelChangedError, match="left alone"):
        backend.undeploy(served)
    assert file.read_bytes() == b"other"
    file.unlink()
    backend.undeploy(served)
    assert shared(router) == {presets.FILE}


def test_models_and_comments_of_others_stay_in_the_file_of_presets(
    router: LlamaRouter, backend: Backend, artifact: FileArtifact
) -> None:
    file = router.models / presets.FILE
    others = "; by hand\n[*]\nctx-size = 256\n\n[theirs] ; kept\nmodel = /elsewhere/theirs.gguf\n"
    file.write_text(others)
    served = deployed(backend, artifact, "ours")
    try:
        assert file.read_text().startswith(others)
        assert backend.status(served) is Status.LOADED
    finally:
        backend.undeploy(served)
    assert file.read_text().rstrip() == others.rstrip()
    file.write_text("")
    httpx.get(f"http://127.0.0.1:{router.port}/models?reload=1")


def test_a_version_that_is_not_in_the_file_of_presets_any_more_takes_no_name(
    router: LlamaRouter, backend: Backend, artifact: FileArtifact
) -> None:
    assert isinstance(backend, Promoting)
    plan = backend.preflight(artifact, "emptied", backend.options())
    served = backend.push(plan, ignore)
    (router.models / presets.FILE).write_text("")
    with pytest.raises(ServerAnswerError, match="has no section 'emptied"):
        backend.promote(served, "emptied", [])
    backend.undeploy(served)
    assert shared(router) == {presets.FILE}


def unasked(models: Path) -> Promoting:
    """A backend whose server is not asked."""
    settings = {"models_directory": str(models)}
    environment = DeploymentEnvironment("here", "llama_server", "127.0.0.1", settings=settings)
    backend = open_backend(environment)
    assert isinstance(backend, Promoting)
    return backend


def test_a_file_of_presets_that_cannot_be_read_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / presets.FILE).mkdir()
    with pytest.raises(StorageError, match=f"{presets.FILE} cannot be read"):
        unasked(tmp_path).refuse_taken("theirs", [])


def test_a_file_of_presets_may_have_comments_of_any_encoding(tmp_path: Path) -> None:
    (tmp_path / presets.FILE).write_bytes(b"; f\xfcr uns\n[theirs]\nmodel = /elsewhere\n")
    with pytest.raises(AlreadyExistsError, match="already serves something under 'theirs'"):
        unasked(tmp_path).refuse_taken("theirs", [])


def test_a_server_of_one_model_is_refused_with_the_way_to_start_a_router(
    environment: DeploymentEnvironment, artifact: FileArtifact, tmp_path: Path
) -> None:
    with llama_server(artifact.gguf(ignore, chat_template=True).path, tmp_path / "log") as url:
        elsewhere = attrs.evolve(environment, port=int(url.rpartition(":")[2]))
        backend = open_backend(elsewhere)
        with pytest.raises(UnsupportedError, match="--models-preset"):
            backend.preflight(artifact, "new", backend.options())


@pytest.mark.parametrize("name", ["support:v2", "default"])
def test_names_that_a_router_reads_otherwise_are_refused(
    backend: Backend, artifact: FileArtifact, name: str
) -> None:
    with pytest.raises(InvalidNameError, match="meaning of its own"):
        backend.preflight(artifact, name, backend.options())


@pytest.mark.parametrize(
    "settings", [{}, {"models_directory": "relative"}, {"models_directory": "/a;b"}], ids=str
)
def test_a_directory_that_cannot_be_one_is_refused(settings: dict[str, Any]) -> None:
    environment = DeploymentEnvironment("here", "llama_server", "127.0.0.1", settings=settings)
    with pytest.raises(InvalidOptionError):
        open_backend(environment)
