"""vLLM: adapters that come and go at a real server, and what is refused before it sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from customized_models import Deployer, ModelRegistry
from customized_models.backends import Backend, open_backend
from customized_models.errors import (
    AlreadyExistsError,
    BaseModelMismatch,
    InvalidOptionError,
    ServedModelChangedError,
    ServerAnswerError,
    ServerUnreachableError,
    UnsupportedAdapterError,
    UnsupportedError,
    UnsupportedQuantizationError,
)
from customized_models.models import DeploymentEnvironment, Served, Status
from customized_models.testing import deployed, tiny_llama, tiny_lora
from customized_models.testing.backends import (
    AddressedContract,
    DescribingContract,
    ProbingContract,
    PromotingContract,
)
from tests.servers.adapter_artifact import AdapterArtifact
from tests.servers.artifact import ignore
from tests.servers.vllm_server import BASE, VLLMServer, vllm_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def base(directory: Path) -> Path:
    """In float32, with heads that are wide enough for vLLM."""
    return tiny_llama(directory / "base", dtype="float32", hidden_size=128)


@pytest.fixture(scope="module")
def vllm(directory: Path, base: Path, built_vllm: None) -> Iterator[VLLMServer]:
    with vllm_server(base, directory) as running:
        yield running


def adapter_of(base: Path, directory: Path, **options: Any) -> AdapterArtifact:
    adapter = tiny_lora(directory / "adapter", base, **({"lora_alpha": 32} | options))
    return AdapterArtifact(adapter, base, directory)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, base: Path) -> AdapterArtifact:
    return adapter_of(base, tmp_path_factory.mktemp("artifact"))


@pytest.fixture(scope="module")
def other_artifact(tmp_path_factory: pytest.TempPathFactory, base: Path) -> AdapterArtifact:
    return adapter_of(base, tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def environment(vllm: VLLMServer) -> DeploymentEnvironment:
    settings = {"models_directory": str(vllm.models), "timeout": 20}
    return DeploymentEnvironment("here", "vllm", "127.0.0.1", vllm.port, settings=settings)


@pytest.fixture
def backend(environment: DeploymentEnvironment) -> Backend:
    return open_backend(environment)


class TestVLLM(PromotingContract, ProbingContract, DescribingContract, AddressedContract):
    @pytest.fixture
    def environment(self, vllm: VLLMServer) -> DeploymentEnvironment:
        self.server = vllm
        settings = {"models_directory": str(vllm.models), "timeout": 5}
        return DeploymentEnvironment("here", "vllm", "127.0.0.1", vllm.port, settings=settings)

    def not_answering(self, served: Served) -> AbstractContextManager[object]:
        return self.server.stopped()

    def inventory(self, environment: DeploymentEnvironment) -> object:
        listed = httpx.get(f"{environment.url}/v1/models").json()["data"]
        return {card["id"] for card in listed}, shared(self.server)

    def test_what_is_served_is_a_file_of_the_artifacts(  # of the adapter, and no GGUF file
        self,
        served: Served,
        artifact: AdapterArtifact,  # type: ignore[override]
    ) -> None:
        assert served.digest == artifact.digest


def shared(server: VLLMServer) -> set[str]:
    """What lies in the directory that the server reads, but for its lock."""
    return {path.name for path in server.models.iterdir()} - {".lock"}


@pytest.mark.parametrize(
    "options",
    [
        {"r": 16, "use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 7}},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_likeliest_tokens_are_those_of_peft(
    registry: ModelRegistry,
    environment: DeploymentEnvironment,
    base: Path,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    registry.add_base_model("llama-wide", base)
    adapter = adapter_of(base, tmp_path, **options).adapter_directory
    customized = registry.register(adapter, train_name="support", base_model="llama-wide")
    registry.add_environment(environment)
    deployer = Deployer(registry)
    live = deployer.deploy(
        customized, environment="here", served_name="support", proofs=("template", "greedy")
    ).result(progress=False)
    try:
        assert {proof.name: proof.passed for proof in live.proofs} == {
            "template": True,
            "greedy": True,
        }
        assert deployer.status(live) is Status.LOADED
        assert registry.add_third_party(live).model == "support"
    finally:
        deployer.undeploy(live)
    assert deployer.status(live) is Status.ABSENT


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 17}, "rank 17"),
        ({"rank_pattern": {"q_proj": 32}}, "rank 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_vllm_would_fail_on_is_refused_before_anything_is_sent(
    backend: Backend, base: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    artifact = adapter_of(base, tmp_path, **options)
    with pytest.raises(UnsupportedAdapterError, match=named):
        backend.preflight(artifact, "new", backend.options())


@pytest.mark.parametrize("shape", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {}], ids=str)
def test_an_adapter_of_another_base_is_refused_though_vllm_would_take_it(
    vllm: VLLMServer, backend: Backend, tmp_path: Path, shape: dict[str, int]
) -> None:
    """Narrower, shallower, and of the same shape with other weights."""
    other = tiny_llama(tmp_path / "other", **({"hidden_size": 128} | shape))
    artifact = adapter_of(other, tmp_path)
    plan = backend.preflight(artifact, "new", backend.options())
    with pytest.raises(BaseModelMismatch, match="not the base model of the adapter"):
        backend.push(plan, ignore)
    assert shared(vllm) == set()

    body = {"lora_name": "wrong", "lora_path": str(artifact.adapter_directory)}
    url = f"http://127.0.0.1:{vllm.port}/v1"
    answer = httpx.post(f"{url}/load_lora_adapter", json=body, timeout=60)
    assert answer.status_code == 200
    httpx.post(f"{url}/unload_lora_adapter", json={"lora_name": "wrong"}, timeout=60)


def test_a_setting_says_which_base_a_server_elsewhere_serves(
    environment: DeploymentEnvironment, artifact: AdapterArtifact, base: Path
) -> None:
    def preflight(**settings: str) -> object:
        changed = {**environment.settings, **settings}
        backend = open_backend(attrs.evolve(environment, settings=changed))
        return backend.preflight(artifact, "new", backend.options())

    with pytest.raises(BaseModelMismatch, match="llama-other"):
        preflight(base="llama-other")
    preflight(base=artifact.base)
    hidden = base.rename(base.with_name("hidden"))
    try:
        preflight(base=artifact.base)
        with pytest.raises(UnsupportedError, match="the setting 'base'"):
            preflight()
    finally:
        hidden.rename(base)


def test_an_error_of_the_engine_is_told_and_nothing_is_left(
    vllm: VLLMServer, environment: DeploymentEnvironment, base: Path, tmp_path: Path
) -> None:
    settings = {**environment.settings, "max_lora_rank": 64}  # which is not true
    backend = open_backend(attrs.evolve(environment, settings=settings))
    plan = backend.preflight(adapter_of(base, tmp_path, r=32), "new", backend.options())
    with pytest.raises(ServerAnswerError, match=r"500.*rank 32 is greater than max_lora_rank 16"):
        backend.push(plan, ignore)
    assert shared(vllm) == set()


def test_the_name_of_the_base_model_is_taken(backend: Backend, artifact: AdapterArtifact) -> None:
    with pytest.raises(AlreadyExistsError, match=BASE):
        backend.preflight(artifact, BASE, backend.options())


def test_quantization_is_the_servers_own_matter(
    backend: Backend, artifact: AdapterArtifact
) -> None:
    quantized = attrs.evolve(artifact, quantization="q8_0")
    with pytest.raises(UnsupportedQuantizationError, match="--quantization"):
        backend.preflight(quantized, "new", backend.options())


def test_a_directory_that_was_changed_is_left_alone(
    vllm: VLLMServer, backend: Backend, artifact: AdapterArtifact
) -> None:
    served = deployed(backend, artifact, "changed")
    weights = vllm.models / served.details["version"] / "adapter_model.safetensors"
    weights.write_bytes(b"other")
    with pytest.raises(ServedModelChangedError, match="left alone"):
        backend.undeploy(served)
    assert weights.read_bytes() == b"other"
    weights.write_bytes((artifact.adapter_directory / weights.name).read_bytes())
    backend.undeploy(served)
    assert shared(vllm) == set()


def test_a_complete_model_is_served_by_a_command_and_then_recorded(
    registry: ModelRegistry, environment: DeploymentEnvironment, base: Path, tmp_path: Path
) -> None:
    from customized_models import Merger

    registry.add_base_model("llama-wide", base)
    adapter = adapter_of(base, tmp_path).adapter_directory
    customized = registry.register(adapter, train_name="support", base_model="llama-wide")
    complete = Merger(registry).save(customized).result(progress=False)
    registry.add_environment(environment)
    with pytest.raises(UnsupportedError, match="vllm serve DIRECTORY --served-model-name new"):
        Deployer(registry).deploy(complete, environment="here", served_name="new")
    with pytest.raises(BaseModelMismatch, match="not the complete model"):
        Deployer(registry).deploy(complete, environment="here", served_name=BASE).result(
            progress=False
        )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"models_directory": "relative"},
        {"models_directory": 1},
        {"models_directory": "/tmp", "max_lora_rank": 0},
        {"models_directory": "/tmp", "base": 1},
    ],
    ids=str,
)
def test_settings_that_say_nothing_sensible_are_refused(settings: dict[str, Any]) -> None:
    environment = DeploymentEnvironment("here", "vllm", "127.0.0.1", settings=settings)
    with pytest.raises(InvalidOptionError):
        open_backend(environment)


def test_what_a_server_repeats_of_a_secret_is_not_shown(
    artifact: AdapterArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_TOKEN", "s3cr3t-t0k3n")
    environment = DeploymentEnvironment(
        "here",
        "vllm",
        "127.0.0.1",
        9,
        token_env="VLLM_TOKEN",
        settings={"models_directory": str(tmp_path)},
    )
    backend = open_backend(environment)
    with pytest.raises(ServerUnreachableError) as caught:
        backend.preflight(artifact, "new", backend.options())
    assert "s3cr3t" not in json.dumps(str(caught.value))
