"""A full model that a training saved is registered, completed, saved and deployed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from customized_models import (
    BaseModelMismatch,
    CustomizedModel,
    Deployer,
    DeploymentEnvironment,
    DeploymentTemplate,
    IntegrityError,
    MalformedError,
    Merger,
    ModelRegistry,
    NonFiniteError,
    UnsupportedError,
)
from customized_models.deploying.artifacts import RegistryArtifact
from customized_models.importing import convert_pickle
from customized_models.testing import tiny_llama

EXAMPLES = [{"input_ids": [1, 5 + i, 7, 9, 2], "labels": [1, 5 + i, 7, 9, 2]} for i in range(8)]


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `checkpoint-2` that a Trainer wrote while it trained the whole model: read it only."""
    output = tmp_path_factory.mktemp("trained")
    args = TrainingArguments(
        str(output),
        max_steps=2,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="auto")
    Trainer(model=model, args=args, train_dataset=EXAMPLES).train()
    return output / "checkpoint-2"


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(trained, tmp_path / "checkpoint"))


def test_a_trainers_checkpoint_becomes_a_customized_model_of_the_base_it_fits(
    registry: ModelRegistry, checkpoint: Path
) -> None:
    assert {"optimizer.pt", "training_args.bin"} <= {path.name for path in checkpoint.iterdir()}
    model = registry.register(checkpoint, train_name="full")

    assert (model.kind, model.base) == ("checkpoint", "llama-tiny")
    assert str(model.card).startswith("full fine-tuning, 2 steps, loss ")
    assert registry.get(CustomizedModel, model.name) == model
    assert registry.register(checkpoint, train_name="full") == model
    with registry.checkout(model) as directory:
        names = {path.name for path in directory.iterdir()}
        assert names == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "manifest.json",
            "README.md",
        }
        assert same_tensors(directory, checkpoint)


@pytest.mark.parametrize("named", ["llama-tiny", None])
def test_a_base_model_is_no_training_of_itself(
    registry: ModelRegistry, tiny_base: Path, named: str | None
) -> None:
    with pytest.raises(UnsupportedError, match="the very weights of its base model"):
        registry.register(tiny_base, train_name="full", base_model=named)


def test_a_save_completes_it_from_its_base_without_a_merge(
    registry: ModelRegistry, checkpoint: Path, tiny_base: Path
) -> None:
    model = registry.register(checkpoint, train_name="full", base_model="llama-tiny")
    plan = Merger(registry).plan(model)
    assert "published without a merge" in repr(plan)
    assert plan.changes == ()
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(plan.completed)

    complete = Merger(registry).save(model).result(progress=False)

    registry.verify(complete)
    Merger(registry).verify(complete)
    assert complete.customized == model.name
    with registry.checkout(complete) as directory, registry.checkout(model) as stored:
        weights = load_file(directory / "model.safetensors")
        trained = load_file(stored / "model.safetensors")
        assert weights.keys() == trained.keys()
        assert all(torch.equal(weights[name], trained[name]) for name in trained)
        tokenizer = (directory / "tokenizer.json").read_bytes()
        assert tokenizer == (tiny_base / "tokenizer.json").read_bytes()
        text = AutoTokenizer.from_pretrained(directory)("hello", return_tensors="pt")
        ours = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")(**text).logits
        theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")(**text).logits
    assert torch.equal(ours, theirs)

    registry.delete(complete)
    again = Merger(registry).rebuild(complete).result(progress=False)
    assert again.digest == complete.digest


@pytest.fixture
def here(registry: ModelRegistry) -> Iterator[DeploymentEnvironment]:
    """llama.cpp on this host; whatever a test leaves running is undeployed."""
    registry.set_deployment_template("llama-tiny", DeploymentTemplate("{{ .Prompt }}"))
    yield registry.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
    for live in registry.live_models(environment="here", state="live"):
        Deployer(registry).undeploy(live)


def test_it_goes_live_itself_and_as_a_complete_model_with_the_same_answer(
    registry: ModelRegistry, checkpoint: Path, here: DeploymentEnvironment
) -> None:
    model = registry.register(checkpoint, train_name="full")
    complete = Merger(registry).save(model).result(progress=False)
    answers = []
    for source in (model, complete):
        live = Deployer(registry).deploy(source, quantization="q8_0").result(progress=False)
        body = {"model": live.served.name, "prompt": "hello", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{live.endpoint}/completions", json=body, timeout=60)
        answers.append(answer.json()["choices"][0]["text"])
    assert answers[0] == answers[1]


def test_its_directory_is_given_to_tools_once_nothing_is_lacking(
    registry: ModelRegistry, checkpoint: Path, tiny_base: Path
) -> None:
    def artifact(model: CustomizedModel) -> RegistryArtifact:
        given = (registry.catalog, registry.shelf, model, "live", "no_quantization")
        return RegistryArtifact(*given, lambda key: None)

    lacking = registry.register(checkpoint, train_name="lacking")
    with (
        pytest.raises(UnsupportedError, match=r"tokenizer\.json.*Merger"),
        artifact(lacking).directory(),
    ):
        pass
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(checkpoint)
    whole = registry.register(checkpoint, train_name="whole")
    with artifact(whole).directory() as directory:
        assert (directory / "model.safetensors").is_file()
        assert (directory / "tokenizer.json").is_file()


def test_its_own_tokenizer_is_kept_whole(
    registry: ModelRegistry, checkpoint: Path, tiny_base: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(checkpoint)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    # As transformers 4 writes it: in the settings, not in a file of its own.
    settings["chat_template"] = (checkpoint / "chat_template.jinja").read_text()
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))

    complete = Merger(registry).save(registry.register(checkpoint, train_name="full"))
    with registry.checkout(complete.result(progress=False)) as directory:
        opened = AutoTokenizer.from_pretrained(directory)
    assert opened.chat_template == "{{ messages[0].content }}"


def test_among_alike_bases_one_must_be_named(
    registry: ModelRegistry, checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(registry.local_path("llama-tiny"), tmp_path / "other"))
    (other / "LICENSE").write_text("another model\n")
    registry.add_base_model("alike", other)
    with pytest.raises(BaseModelMismatch, match="2 base models have the architecture"):
        registry.register(checkpoint, train_name="full")
    assert registry.register(checkpoint, train_name="full", base_model="alike").base == "alike"


def test_a_base_of_other_shapes_or_another_architecture_is_refused(
    registry: ModelRegistry, checkpoint: Path, tmp_path: Path
) -> None:
    registry.add_base_model("wide", tiny_llama(tmp_path / "wide", intermediate_size=128))
    with pytest.raises(BaseModelMismatch, match=r"mlp\.down_proj"):
        registry.register(checkpoint, train_name="full", base_model="wide")

    change(checkpoint / "config.json", model_type="mistral")
    with pytest.raises(BaseModelMismatch, match="mistral"):
        registry.register(checkpoint, train_name="full", base_model="llama-tiny")


def test_more_tokens_need_a_tokenizer_of_their_own(
    registry: ModelRegistry, checkpoint: Path, tiny_base: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<new>"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(checkpoint)
    with pytest.raises(BaseModelMismatch, match="save the tokenizer beside it"):
        registry.register(checkpoint, train_name="full", base_model="llama-tiny")

    tokenizer.save_pretrained(checkpoint)
    assert registry.register(checkpoint, train_name="full").base == "llama-tiny"


@pytest.mark.parametrize(
    "odd",
    [
        {"added_tokens": ["x"]},
        {"added_tokens": 5},
        {"added_tokens": [{"content": ["a"], "id": 1}]},
        {"added_tokens": [{"id": 1}]},
        {"model": {"vocab": [5]}},
        {"model": {"vocab": "abc"}},
    ],
)
def test_a_tokenizer_that_is_none_is_refused(
    registry: ModelRegistry, checkpoint: Path, tiny_base: Path, odd: dict[str, Any]
) -> None:
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(checkpoint)
    change(checkpoint / "tokenizer.json", **odd)
    with pytest.raises(MalformedError, match=r"tokenizer\.json"):
        registry.register(checkpoint, train_name="full")


def test_a_checkpoint_that_diverged_is_refused(registry: ModelRegistry, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        registry.register(checkpoint, train_name="full")


def test_no_path_of_the_training_is_kept(registry: ModelRegistry, checkpoint: Path) -> None:
    change(checkpoint / "config.json", _name_or_path="/home/someone/base")
    model = registry.register(checkpoint, train_name="full")
    with registry.checkout(model) as directory:
        assert "someone" not in (directory / "config.json").read_text()


def test_a_stated_hub_id_names_the_base(
    registry: ModelRegistry, checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(registry.local_path("llama-tiny"), tmp_path / "other"))
    (other / "LICENSE").write_text("another model\n")
    registry.add_base_model("alike", other, model_name="tests/alike")
    change(checkpoint / "config.json", _name_or_path="tests/alike")
    assert registry.register(checkpoint, train_name="full").base == "alike"


def test_pickled_weights_are_taken_by_an_explicit_conversion(
    registry: ModelRegistry, checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="convert_pickle"):
        registry.register(checkpoint, train_name="full")

    converted = convert_pickle(checkpoint, tmp_path / "converted")
    model = registry.register(converted, train_name="full")
    assert model.card.evaluation.steps == 2
    with registry.checkout(model) as directory:
        stored = load_file(directory / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(stored[name].equal(tensors[name]) for name in tensors)


def test_pickled_shards_are_converted_one_by_one(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        shard = {name: tensors[name] for name in names if files[name] == file}
        torch.save(shard, checkpoint / file)
    index = {"metadata": {}, "weight_map": files}
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    converted = convert_pickle(checkpoint, tmp_path / "converted")
    opened = AutoModelForCausalLM.from_pretrained(converted, dtype="auto").state_dict()
    assert all(opened[name].equal(tensors[name]) for name in tensors)


def test_an_index_that_names_no_shards_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(MalformedError, match="no shards"):
        convert_pickle(checkpoint, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


class Trap:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_would_run_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save({"weight": Trap(tmp_path / "ran")}, checkpoint / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="more than tensors"):
        convert_pickle(checkpoint, tmp_path / "converted")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("left", "way_out"),
    [("pytorch_model_fsdp_0", "accelerate merge-weights"), ("latest", "zero_to_fp32")],
)
def test_a_sharded_checkpoint_is_told_how_to_be_consolidated(
    registry: ModelRegistry, checkpoint: Path, left: str, way_out: str
) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / left).mkdir()
    with pytest.raises(UnsupportedError, match=way_out):
        registry.register(checkpoint, train_name="full")


def test_a_damaged_checkpoint_is_not_published(registry: ModelRegistry, checkpoint: Path) -> None:
    model = registry.register(checkpoint, train_name="full")
    path = registry.local_path(model) / "model.safetensors"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        Merger(registry).save(model).result(progress=False)
    assert list(registry.complete_models()) == []


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def same_tensors(one: Path, other: Path) -> bool:
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    return first.keys() == second.keys() and all(first[n].equal(second[n]) for n in first)
