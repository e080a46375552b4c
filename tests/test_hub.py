"""Models go to the Hub and come back the same, by its own client, from a server like it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from attrs import evolve
from huggingface_hub import ModelCard as HubModelCard

from customized_models import (
    AlreadyExistsError,
    BaseModel,
    BaseModelMismatch,
    BaseModelMissingError,
    CompleteModel,
    CustomizedModel,
    HubError,
    IntegrityError,
    InvalidNameError,
    Merger,
    ModelRegistry,
    UnsafeFileError,
)
from customized_models.files.manifest import Manifest
from customized_models.testing import tiny_llama, tiny_lora
from tests.servers.hub_server import TOKEN, Hub, hub_server

CARD = {
    "training": {"datasets": ["org/data"]},
    "evaluation": {"metrics": {"eval_accuracy": 0.75, "train_loss": 0.5}},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with hub_server() as hub:
        yield hub


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    return registry.register(tiny_adapter, train_name="support", base_model="llama-tiny", **CARD)


@pytest.fixture
def complete(registry: ModelRegistry, customized: CustomizedModel) -> CompleteModel:
    return Merger(registry).save(customized).result(progress=False)


@pytest.fixture
def other(tiny_base: Path, tmp_path: Path) -> ModelRegistry:
    """Another registry that knows the same base."""
    registry = ModelRegistry(tmp_path / "other")
    registry.add_base_model("llama-tiny", tiny_base, model_name="tests/llama-tiny")
    return registry


def ask(hub: Hub) -> dict[str, str]:
    return {"token": TOKEN, "endpoint": hub.url}


def pushed(hub: Hub, name: str) -> dict[str, bytes]:
    return hub.repositories[name].tree("main")[1]


@pytest.mark.parametrize("level", ["customized", "complete"])
def test_a_model_comes_back_the_same_in_another_registry(
    level: str,
    registry: ModelRegistry,
    other: ModelRegistry,
    hub: Hub,
    request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(level)
    done = registry.push_to_hub(model, f"me/{level}", **ask(hub))
    assert done.url == f"{hub.url}/me/{level}/commit/{done.commit}"
    assert hub.repositories[f"me/{level}"].private

    back = other.from_hub(f"me/{level}", revision=done.commit, **ask(hub))

    assert back == model
    other.verify(back)
    assert other.get(type(back), back.name) == model
    with registry.checkout(model) as here, other.checkout(back) as there:
        assert {p.name for p in here.iterdir()} == {p.name for p in there.iterdir()}
        for path in here.iterdir():
            if path.name not in ("README.md", "manifest.json"):
                assert path.read_bytes() == (there / path.name).read_bytes()
    assert not list((other.root / ".hub").iterdir())
    print(f"{level}: {hub.received} bytes of objects up, {hub.sent} bytes down")


def test_a_model_that_is_here_already_is_given_as_it_is(
    registry: ModelRegistry, customized: CustomizedModel, hub: Hub
) -> None:
    registry.push_to_hub(customized, "me/model", **ask(hub))
    measured = registry.add_evaluation(customized, {"eval_later": 0.5})
    assert registry.from_hub("me/model", **ask(hub)) == measured


def test_the_card_is_one_that_the_hub_reads(
    registry: ModelRegistry, complete: CompleteModel, customized: CustomizedModel, hub: Hub
) -> None:
    for model, relation in ((customized, "adapter"), (complete, "finetune")):
        registry.push_to_hub(model, "me/model", **ask(hub))
        data = HubModelCard(pushed(hub, "me/model")["README.md"].decode()).data
        assert (data.base_model, data.base_model_relation) == ("tests/llama-tiny", relation)
        assert data.pipeline_tag == "text-generation"
        (result,) = data.eval_results  # a training loss is none
        assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)
        assert (result.dataset_type, result.task_type) == ("org/data", "text-generation")


def test_an_interrupted_push_uploads_only_what_is_missing(
    registry: ModelRegistry, complete: CompleteModel, hub: Hub
) -> None:
    hub.refuse_uploads_after = 3
    with pytest.raises(HubError, match="403"):
        registry.push_to_hub(complete, "me/model", **ask(hub))
    assert not hub.repositories["me/model"].commits
    before, hub.refuse_uploads_after = len(hub.objects), None
    assert before == 3

    registry.push_to_hub(complete, "me/model", **ask(hub))
    assert sum(map(len, hub.objects.values())) == hub.received  # nothing went twice
    received = hub.received
    again = registry.push_to_hub(complete, "me/model", **ask(hub))
    assert hub.received == received
    assert list(hub.repositories["me/model"].commits) == [again.commit]


def test_an_interrupted_download_goes_on(
    registry: ModelRegistry, other: ModelRegistry, complete: CompleteModel, hub: Hub
) -> None:
    registry.push_to_hub(complete, "me/model", **ask(hub))
    hub.unavailable_after = 5
    with pytest.raises(HubError):
        other.from_hub("me/model", **ask(hub))
    sent, hub.unavailable_after = hub.sent, None

    assert other.from_hub("me/model", **ask(hub)) == complete
    size = sum(map(len, pushed(hub, "me/model").values()))
    assert 0 < sent < size
    assert hub.sent == size


def test_weights_of_another_model_are_removed(
    registry: ModelRegistry, customized: CustomizedModel, complete: CompleteModel, hub: Hub
) -> None:
    registry.push_to_hub(complete, "me/model", **ask(hub))
    registry.push_to_hub(customized, "me/model", **ask(hub))
    weights = {name for name in pushed(hub, "me/model") if name.endswith(".safetensors")}
    assert weights == {"adapter_model.safetensors"}


def test_no_path_of_this_host_is_pushed(
    registry: ModelRegistry, tmp_path: Path, tiny_base: Path, hub: Hub
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    adapter = tiny_lora(tmp_path / "adapter", base)
    for directory in (base, adapter):
        shutil.copy(tiny_base / "tokenizer.json", directory)
        settings = json.loads((tiny_base / "tokenizer_config.json").read_text())
        settings |= {"name_or_path": str(tmp_path), "tokenizer_file": f"{tmp_path}/tokenizer.json"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": str(tmp_path)}
    (base / "config.json").write_text(json.dumps(config))
    (base / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(tmp_path)}))
    told = json.dumps({"output_dir": str(tmp_path), "hub_token": "hf_" + "S" * 30})
    for name in ("args.json", "training_args.yaml", "trainer_log.jsonl"):
        (adapter / name).write_text(told)
    other = ModelRegistry(tmp_path / "other")
    for one in (registry, other):
        one.add_base_model("pathy", base, model_name="tests/pathy")
    card = {"training": {"arguments": {"output_dir": str(tmp_path), "seed": 1}}}
    customized = registry.register(adapter, train_name="support", base_model="pathy", **card)
    complete = Merger(registry).save(customized).result(progress=False)

    for model in (customized, complete):
        registry.push_to_hub(model, "me/model", **ask(hub))
        everything = b"".join(pushed(hub, "me/model").values())
        for private in (str(tmp_path), str(registry.root), "hf_SSS"):
            assert private.encode() not in everything
        assert registry.from_hub("me/model", **ask(hub)) == model
        back = other.from_hub("me/model", **ask(hub))
        assert (back.name, back.digest) == (model.name, model.digest)
        assert back.card.training.arguments == {"seed": 1}


def test_a_file_that_tells_of_this_host_is_refused(
    registry: ModelRegistry,
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    checkpoint = tiny_llama(tmp_path / "checkpoint", dtype="float32")
    (checkpoint / "notes.txt").write_text("data in /home/me/data")
    model = registry.register(checkpoint, train_name="full", base_model="llama-tiny")
    with pytest.raises(UnsafeFileError, match=r"notes\.txt"):
        registry.push_to_hub(model, "me/model", **ask(hub))
    assert "me/model" not in hub.repositories


def test_an_evicted_model_is_rebuilt_to_be_pushed(
    registry: ModelRegistry, other: ModelRegistry, complete: CompleteModel, hub: Hub
) -> None:
    registry.push_to_hub(registry.evict(complete), "me/model", **ask(hub))
    assert other.from_hub("me/model", **ask(hub)) == complete


def test_what_was_tampered_with_is_refused(
    registry: ModelRegistry, other: ModelRegistry, customized: CustomizedModel, hub: Hub
) -> None:
    registry.push_to_hub(customized, "me/model", **ask(hub))
    tree = pushed(hub, "me/model")
    data = bytearray(tree["adapter_model.safetensors"])
    data[-1] ^= 1
    tree["adapter_model.safetensors"] = bytes(data)
    with pytest.raises(IntegrityError, match="adapter_model"):
        other.from_hub("me/model", **ask(hub))
    assert list(other.customized_models()) == []


def test_another_base_of_the_same_name_is_refused(
    registry: ModelRegistry, customized: CustomizedModel, tmp_path: Path, hub: Hub
) -> None:
    registry.push_to_hub(customized, "me/model", **ask(hub))
    different = ModelRegistry(tmp_path / "different")
    different.add_base_model("llama-tiny", tiny_llama(tmp_path / "base", num_hidden_layers=1))
    with pytest.raises(BaseModelMismatch, match="llama-tiny"):
        different.from_hub("me/model", **ask(hub))


def test_without_its_base_it_comes_back_and_the_base_is_told_later(
    registry: ModelRegistry,
    customized: CustomizedModel,
    tiny_base: Path,
    tmp_path: Path,
    hub: Hub,
) -> None:
    registry.push_to_hub(customized, "me/model", **ask(hub))
    empty = ModelRegistry(tmp_path / "empty")
    back = empty.from_hub("me/model", **ask(hub))
    with pytest.raises(BaseModelMissingError, match="relocate_base_model"):
        Merger(empty).plan(back)
    empty.relocate_base_model("llama-tiny", tiny_base)
    assert Merger(empty).plan(back).changes


def test_an_adapter_of_others_is_registered(
    registry: ModelRegistry, tiny_adapter: Path, hub: Hub
) -> None:
    api = huggingface_hub.HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("org/Their_Adapter")
    api.upload_folder(repo_id="org/Their_Adapter", folder_path=tiny_adapter)
    model = registry.from_hub("org/Their_Adapter", base_model="llama-tiny", **ask(hub))
    assert (model.train_name, model.label) == ("their-adapter", "Their_Adapter")


def test_what_the_hub_refuses_is_one_error_without_the_token(
    registry: ModelRegistry, customized: CustomizedModel, hub: Hub
) -> None:
    with pytest.raises(HubError) as caught:
        registry.push_to_hub(customized, "me/model", token="hf_wrong", endpoint=hub.url)
    assert "hf_wrong" not in str(caught.value)
    with pytest.raises(HubError):
        registry.from_hub("me/nothing", **ask(hub))
    with pytest.raises(HubError):
        registry.from_hub("me/model", token=TOKEN, endpoint="http://127.0.0.1:9")
    with pytest.raises(InvalidNameError):
        registry.push_to_hub(customized, "not a Hub id", **ask(hub))


def test_a_base_model_is_fetched_when_that_is_allowed(
    tiny_base: Path, tmp_path: Path, hub: Hub
) -> None:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    api = huggingface_hub.HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("tests/Llama-Tiny")
    api.upload_folder(repo_id="tests/Llama-Tiny", folder_path=tiny_base)
    script = f"""
from customized_models import BaseModelMissingError, ModelRegistry
registry = ModelRegistry({str(tmp_path / "fetching")!r})
try:
    registry.add_base_model("tests/Llama-Tiny")
except BaseModelMissingError as error:
    assert "download=True" in str(error), error
base = registry.add_base_model("tests/Llama-Tiny", download=True)
assert registry.add_base_model("tests/Llama-Tiny") == base  # out of the cache
print(base.technical_name, base.model_name, base.digest)
"""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.getcwd(),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    registry = ModelRegistry(tmp_path / "models")
    digest = registry.add_base_model("llama-tiny", tiny_base).digest
    assert done.stdout.split() == ["llama-tiny", "tests/Llama-Tiny", digest]


def test_brought_at_once_it_comes_back_once(
    registry: ModelRegistry, other: ModelRegistry, complete: CompleteModel, hub: Hub
) -> None:
    registry.push_to_hub(complete, "me/model", **ask(hub))
    registry.push_to_hub(complete, "me/copy", **ask(hub))
    repositories = ["me/model", "me/copy"] * 2
    with ThreadPoolExecutor(len(repositories)) as pool:
        back = list(pool.map(lambda one: other.from_hub(one, **ask(hub)), repositories))
    assert back == [complete] * len(repositories)
    other.verify(complete.name)


def test_a_killed_process_does_not_keep_a_model_from_coming_back(
    registry: ModelRegistry, other: ModelRegistry, complete: CompleteModel, hub: Hub
) -> None:
    registry.push_to_hub(complete, "me/model", **ask(hub))
    script = f"""
import os, signal
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_DISABLE_XET = True
from customized_models import ModelRegistry
from customized_models.files.safetensors import Checkpoint
Checkpoint.open = lambda directory: os.kill(os.getpid(), signal.SIGKILL)
ModelRegistry({str(other.root)!r}).from_hub("me/model", token={TOKEN!r}, endpoint={hub.url!r})
"""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -9
    assert other.from_hub("me/model", **ask(hub)) == complete


def test_what_others_put_beside_a_model_does_not_come_with_it(
    registry: ModelRegistry,
    other: ModelRegistry,
    customized: CustomizedModel,
    complete: CompleteModel,
    hub: Hub,
) -> None:
    api = huggingface_hub.HfApi(endpoint=hub.url, token=TOKEN)
    for model in (customized, complete):
        registry.push_to_hub(model, f"me/{model.name}", **ask(hub))
        for name in ("chat_template.jinja", "special_tokens_map.json", "notes.txt"):
            if name not in pushed(hub, f"me/{model.name}"):
                api.upload_file(
                    path_or_fileobj=b"{}", path_in_repo=name, repo_id=f"me/{model.name}"
                )
        assert other.from_hub(f"me/{model.name}", **ask(hub)) == model
        other.verify(model.name)


def test_a_repository_that_is_pushed_to_twice_has_the_second_model_alone(
    registry: ModelRegistry,
    other: ModelRegistry,
    customized: CustomizedModel,
    complete: CompleteModel,
    hub: Hub,
) -> None:
    api = huggingface_hub.HfApi(endpoint=hub.url, token=TOKEN)
    registry.push_to_hub(complete, "me/model", **ask(hub))
    for name in ("LICENSE", "pytorch_model-00001-of-00001.bin"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="me/model")
    registry.push_to_hub(customized, "me/model", **ask(hub))
    with registry.checkout(customized) as directory:
        own = {path.name for path in directory.iterdir()}
    assert pushed(hub, "me/model").keys() == own | {"LICENSE"}
    assert other.from_hub("me/model", **ask(hub)) == customized


def test_a_hub_that_fails_while_its_files_are_listed_is_not_pushed_to(
    registry: ModelRegistry, customized: CustomizedModel, complete: CompleteModel, hub: Hub
) -> None:
    registry.push_to_hub(complete, "me/model", **ask(hub))
    before, hub.listing_fails = pushed(hub, "me/model"), True
    with pytest.raises(HubError):
        registry.push_to_hub(customized, "me/model", **ask(hub))
    assert pushed(hub, "me/model") == before


def test_a_record_cannot_say_what_only_this_host_knows(
    registry: ModelRegistry, complete: CompleteModel, tmp_path: Path, hub: Hub
) -> None:
    registry.push_to_hub(complete, "me/model", **ask(hub))
    tree = pushed(hub, "me/model")
    manifest = Manifest.parse(tree["manifest.json"])
    record = json.loads(json.dumps(dict(manifest.record)))
    record["base"] |= {
        "trust_remote_code": True,
        "deployment_template": {"text": "theirs", "stop": []},
    }
    tree["manifest.json"] = evolve(manifest, record=record).to_bytes()
    empty = ModelRegistry(tmp_path / "empty")
    empty.from_hub("me/model", **ask(hub))
    base = empty.get(BaseModel, "llama-tiny")
    assert (base.trust_remote_code, base.deployment_template) == (False, None)
    (empty.root / "registry.db").unlink()
    again = ModelRegistry(empty.root)
    again.reindex()
    assert again.get(BaseModel, "llama-tiny") == base

    record["model"]["evicted"] = True
    tree["manifest.json"] = evolve(manifest, record=record).to_bytes()
    with pytest.raises(IntegrityError, match="evicted"):
        ModelRegistry(tmp_path / "another").from_hub("me/model", **ask(hub))


def test_adding_the_base_of_what_came_back_says_where_it_is(
    registry: ModelRegistry,
    customized: CustomizedModel,
    tiny_base: Path,
    tmp_path: Path,
    hub: Hub,
) -> None:
    registry.push_to_hub(customized, "me/model", **ask(hub))
    empty = ModelRegistry(tmp_path / "empty")
    back = empty.from_hub("me/model", **ask(hub))
    with pytest.raises(AlreadyExistsError, match="model_name"):
        empty.add_base_model("llama-tiny", tiny_base, model_name="tests/another")
    base = empty.add_base_model(
        "llama-tiny", tiny_base, model_name="tests/llama-tiny", trust_remote_code=True
    )
    assert base.trust_remote_code
    assert empty.get(BaseModel, "llama-tiny") == base
    assert Merger(empty).plan(back).changes


def test_its_base_under_another_name_is_told(
    registry: ModelRegistry,
    customized: CustomizedModel,
    tiny_base: Path,
    tmp_path: Path,
    hub: Hub,
) -> None:
    registry.push_to_hub(customized, "me/model", **ask(hub))
    renamed = ModelRegistry(tmp_path / "renamed")
    renamed.add_base_model("short", tiny_base, model_name="tests/llama-tiny")
    with pytest.raises(BaseModelMismatch, match="short"):
        renamed.from_hub("me/model", **ask(hub))
