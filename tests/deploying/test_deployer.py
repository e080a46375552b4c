"""Deploying to real servers: live models, third parties, undeploying, deleting by level."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from customized_models import (
    CompleteModel,
    CustomizedModel,
    Deployer,
    DeploymentEnvironment,
    DeploymentTemplate,
    InUseError,
    InvalidOptionError,
    LiveModel,
    MalformedError,
    Merger,
    ModelRegistry,
    NoEnvironmentError,
    NoTemplateError,
    ServerUnreachableError,
    Status,
    UnsupportedArchitectureError,
    UnsupportedQuantizationError,
)
from customized_models.deploying.templates.proposing import propose_deployment_template
from customized_models.testing import tiny_llama, tiny_lora


@pytest.fixture(scope="module")
def template(tiny_base: Path) -> DeploymentTemplate:
    files = {path.name: path for path in tiny_base.iterdir()}
    return propose_deployment_template(files).template


@pytest.fixture
def customized(
    registry: ModelRegistry, tiny_adapter: Path, template: DeploymentTemplate
) -> CustomizedModel:
    registry.set_deployment_template("llama-tiny", template)
    return registry.register(tiny_adapter, train_name="support")


@pytest.fixture
def complete(registry: ModelRegistry, customized: CustomizedModel) -> CompleteModel:
    return Merger(registry).save(customized).result(progress=False)


@pytest.fixture
def here(registry: ModelRegistry) -> Iterator[DeploymentEnvironment]:
    """llama.cpp on this host; whatever a test leaves running is undeployed."""
    yield registry.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
    for live in registry.live_models(environment="here", state="live"):
        Deployer(registry).undeploy(live)


def completion(live: LiveModel) -> str:
    body = {"model": live.served.name, "prompt": "hello", "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{live.endpoint}/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_a_complete_model_goes_live_and_can_be_called(
    registry: ModelRegistry, complete: CompleteModel, here: DeploymentEnvironment
) -> None:
    job = Deployer(registry).deploy(complete, environment="here", quantization="q8_0")
    live = job.result(progress=False)

    assert live.name == f"{complete.name}_d_{job.id.hex[:4]}_q8_0"
    assert (live.source, live.environment, live.state) == (complete.name, "here", "live")
    assert live.template_digest is None  # llama.cpp renders with the file's chat template
    assert Deployer(registry).status(live) is Status.LOADED
    completion(live)
    assert list(registry.live_models()) == [live]


def test_awaited_calls_leave_the_loop_to_others(
    registry: ModelRegistry, customized: CustomizedModel, here: DeploymentEnvironment
) -> None:
    deployer, turns = Deployer(registry), list[int]()

    async def others() -> None:
        while True:
            turns[-1] += 1
            await asyncio.sleep(0)

    async def main() -> LiveModel:
        beside = asyncio.ensure_future(others())
        turns.append(0)
        live = await (await deployer.deploy_async(customized, environment="here"))
        turns.append(0)
        assert await deployer.status_async(live) is Status.LOADED
        turns.append(0)
        undeployed = await deployer.undeploy_async(live)
        beside.cancel()
        return undeployed

    assert asyncio.run(main()).state == "undeployed"
    assert len(turns) == 3
    assert min(turns) > 10


def test_a_customized_model_goes_live_without_a_complete_model_on_disk(
    registry: ModelRegistry,
    customized: CustomizedModel,
    complete: CompleteModel,
    here: DeploymentEnvironment,
) -> None:
    registry.delete(complete)
    live = Deployer(registry).deploy(customized).result(progress=False)

    assert live.name.startswith(f"{customized.name}_d_")
    assert live.name.endswith("_no_quantization")
    assert not list((registry.root / "complete").iterdir())
    completion(live)


def test_the_same_model_makes_one_file(
    registry: ModelRegistry, complete: CompleteModel, here: DeploymentEnvironment
) -> None:
    deployer = Deployer(registry)
    first = deployer.deploy(complete, quantization="q8_0").result(progress=False)
    second = deployer.deploy(complete, quantization="q8_0").result(progress=False)
    assert first.digest == second.digest
    assert first.served.name != second.served.name
    files = list((registry.root / "gguf").glob("*/model.gguf"))
    assert len(files) == 1
    with files[0].open("rb") as file:
        assert f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == first.digest

    deployer.undeploy(first)
    assert files[0].exists()
    completion(second)
    deployer.undeploy(second)
    assert files[0].exists()  # for the next deployment, as long as there are few
    registry.gc(grace_seconds=0)
    assert not files[0].exists()


def test_undeploying_frees_the_server_and_keeps_the_record(
    registry: ModelRegistry, complete: CompleteModel, here: DeploymentEnvironment
) -> None:
    deployer = Deployer(registry)
    live = deployer.deploy(complete).result(progress=False)
    ended = deployer.undeploy(live)

    assert ended.state == "undeployed"
    assert deployer.status(live) is Status.ABSENT
    assert deployer.undeploy(live) == ended
    assert registry.get(LiveModel, live.name) == ended
    with pytest.raises(httpx.ConnectError):
        completion(live)


def test_another_process_sees_and_calls_a_third_party_model(
    registry: ModelRegistry, complete: CompleteModel, here: DeploymentEnvironment
) -> None:
    live = Deployer(registry).deploy(complete).result(progress=False)
    offered = registry.add_third_party(live)
    script = (
        "import sys, httpx; from customized_models import ModelRegistry\n"
        "(model,) = ModelRegistry(sys.argv[1]).third_party_models()\n"
        "body = {'model': model.model, 'prompt': 'hello', 'max_tokens': 1}\n"
        "print(httpx.post(model.endpoint + '/completions', json=body, timeout=60).status_code)"
    )
    output = subprocess.check_output([sys.executable, "-c", script, str(registry.root)], text=True)
    assert output.split() == ["200"]

    Deployer(registry).undeploy(live)
    (stale,) = registry.third_party_models()
    assert (offered.stale, stale.stale) == (False, True)
    registry.delete(stale)
    assert list(registry.third_party_models()) == []


def test_a_live_model_is_undeployed_before_it_is_deleted(
    registry: ModelRegistry, complete: CompleteModel, here: DeploymentEnvironment
) -> None:
    live = Deployer(registry).deploy(complete).result(progress=False)
    with pytest.raises(InUseError, match="undeploy"):
        registry.delete(live)
    with pytest.raises(InUseError, match=live.name):
        registry.delete(here)
    Deployer(registry).undeploy(live)
    registry.delete(live)
    assert list(registry.live_models()) == []


# Refusals


def test_without_an_environment_the_error_says_how_to_add_one(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    with pytest.raises(NoEnvironmentError, match="add_environment"):
        Deployer(registry).deploy(complete)
    with pytest.raises(NoEnvironmentError, match="add_environment"):
        Deployer(registry).deploy(complete, environment="gpu-box")


def test_an_unknown_quantization_is_refused(
    registry: ModelRegistry, complete: CompleteModel, here: DeploymentEnvironment
) -> None:
    with pytest.raises(UnsupportedQuantizationError, match="q4_K_M"):
        Deployer(registry).deploy(complete, quantization="q5_K_M")


def test_options_of_another_backend_are_refused(
    registry: ModelRegistry, complete: CompleteModel, here: DeploymentEnvironment
) -> None:
    with pytest.raises(InvalidOptionError):
        Deployer(registry).deploy(complete, options=DeploymentTemplate("x"))


def test_an_architecture_without_a_mapping_is_refused(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=320, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    adapter = tiny_lora(tmp_path / "adapter", tmp_path / "opt", target_modules=["q_proj"])
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("opt", tmp_path / "opt")
    registry.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
    customized = registry.register(adapter, train_name="support")

    with pytest.raises(UnsupportedArchitectureError, match="OPTForCausalLM"):
        Deployer(registry).deploy(customized)


def test_a_server_that_does_not_answer_is_a_clear_error(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    registry.add_environment(DeploymentEnvironment("off", "ollama", "127.0.0.1", 9))
    with pytest.raises(ServerUnreachableError):
        Deployer(registry).deploy(complete)
    assert list(registry.jobs("failed")) == []


def test_a_failed_deployment_leaves_no_file(
    registry: ModelRegistry, tmp_path: Path, here: DeploymentEnvironment
) -> None:
    base = tiny_llama(tmp_path / "untokenized", tokenizer=False)
    registry.add_base_model("untokenized", base)
    customized = registry.register(tiny_lora(tmp_path / "lora", base), train_name="support")

    with pytest.raises(MalformedError, match="tokenizer"):
        Deployer(registry).deploy(customized).result(progress=False)

    assert list(registry.shelf.storage.keys("gguf/")) == []
    assert list(registry.live_models()) == []


# Ollama


@pytest.fixture
def there(registry: ModelRegistry, ollama: object) -> Iterator[DeploymentEnvironment]:
    """A real Ollama; whatever a test leaves there is undeployed."""
    yield registry.add_environment(
        DeploymentEnvironment("there", "ollama", ollama.address, ollama.port)
    )
    for live in registry.live_models(environment="there", state="live"):
        Deployer(registry).undeploy(live)


@pytest.mark.parametrize("quantization", ["no_quantization", "q8_0", "q4_K_M", "q4_K_S"])
def test_every_mode_goes_live_at_ollama(
    registry: ModelRegistry,
    customized: CustomizedModel,
    there: DeploymentEnvironment,
    quantization: str,
) -> None:
    job = Deployer(registry).deploy(customized, quantization=quantization)
    live = job.result(progress=False)

    body = {"model": live.served.name, "prompt": "hello", "stream": False, "raw": True}
    body["options"] = {"num_predict": 2}
    answer = httpx.post(f"{live.endpoint}/api/generate", json=body, timeout=120)
    assert answer.json()["done"] is True
    assert Deployer(registry).status(live) is Status.LOADED
    Deployer(registry).undeploy(live)
    assert Deployer(registry).status(live) is Status.ABSENT


def test_a_refused_deployment_sends_not_one_post(
    registry: ModelRegistry,
    tiny_base: Path,
    tiny_adapter: Path,
    ollama: object,
    counting_proxy: object,
) -> None:
    registry.add_environment(
        DeploymentEnvironment("proxied", "ollama", counting_proxy.address, counting_proxy.port)
    )
    customized = registry.register(tiny_adapter, train_name="support")
    deployer = Deployer(registry)

    with pytest.raises(NoTemplateError, match="set_deployment_template"):
        deployer.deploy(customized)
    with pytest.raises(UnsupportedQuantizationError):
        deployer.deploy(customized, quantization="q2_K")
    with pytest.raises(InvalidOptionError):
        deployer.deploy(customized, options=DeploymentTemplate("x"))

    assert [method for method, _ in counting_proxy.requests if method != "GET"] == []


# Deleting, level by level


def state_of(registry: ModelRegistry, ollama: object) -> dict[str, str]:
    """Every file of the registry, every database row and every tag of the server, hashed."""
    state = {
        str(path.relative_to(registry.root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in registry.root.rglob("*")
        if path.is_file() and path.name != "registry.db"
    }
    with sqlite3.connect(registry.root / "registry.db") as connection:
        # `litter` only says since when cached files have been unused; the log of events grows.
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT IN "
            "('litter', 'events', 'event_subjects', 'sqlite_sequence')"
        )
        for (table,) in tables.fetchall():
            for row in connection.execute(f"SELECT * FROM {table}"):
                state[f"row {table} {row[1]}"] = hashlib.sha256(repr(row).encode()).hexdigest()
    connection.close()
    tags = httpx.get(f"http://{ollama.address}:{ollama.port}/api/tags").json()["models"]
    return state | {f"tag {tag['name']}": tag["digest"] for tag in tags}


def test_each_level_is_deleted_on_its_own(
    registry: ModelRegistry,
    customized: CustomizedModel,
    complete: CompleteModel,
    there: DeploymentEnvironment,
    ollama: object,
) -> None:
    deployer = Deployer(registry)
    live = deployer.deploy(complete, quantization="q8_0").result(progress=False)
    offered = registry.add_third_party(live)

    def gone(before: dict[str, str], after: dict[str, str]) -> set[str]:
        return before.keys() - after.keys()

    def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
        return {key for key in after if before.get(key) != after[key]}

    before = state_of(registry, ollama)
    registry.delete(customized)
    after = state_of(registry, ollama)
    assert changed(before, after) == set()
    assert gone(before, after) == {
        f"row customized_models {customized.name}",
        *(key for key in before if key.startswith(f"customized/{customized.name}/")),
    }

    before = after
    registry.delete(complete)
    after = state_of(registry, ollama)
    assert changed(before, after) == set()
    assert gone(before, after) == {
        f"row complete_models {complete.name}",
        *(key for key in before if key.startswith(f"complete/{complete.name}/")),
    }

    before = after
    live = deployer.undeploy(live)
    after = state_of(registry, ollama)
    assert changed(before, after) == {
        f"row live_models {live.name}",
        f"row third_party_models {offered.name}",
    }
    assert gone(before, after) == {
        key for key in before if key.startswith(f"tag {live.served.name}")
    }

    before = after
    registry.delete(live)
    after = state_of(registry, ollama)
    assert changed(before, after) == set()
    assert gone(before, after) == {f"row live_models {live.name}"}
