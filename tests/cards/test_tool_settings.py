"""What tools on top of the Trainer write down of a training is read, whatever the file's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from customized_models.cards.reading import training_facts
from customized_models.cards.tool_settings import tool_settings

AXOLOTL = """base_model: /models/llama
adapter: qlora
datasets:
  - path: org/chats
    type: chat_template
  - path: /data/own/answers.jsonl
    type: alpaca
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
rl: dpo
hub_token: hf_SECRET
"""
AXOLOTL_ARGUMENTS = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "max_length": 2048,
    "num_train_epochs": 3,
    "optim": "adamw_bnb_8bit",
    "packing": True,
    "per_device_train_batch_size": 2,
    "stage": "dpo",
}
LLAMA_FACTORY = """model_name_or_path: org/Llama
stage: dpo
finetuning_type: lora
dataset: identity,org/pairs
template: llama3
cutoff_len: 1024
pref_beta: 0.1
pref_loss: orpo
learning_rate: 1.0e-4
output_dir: saves/lora
"""
MS_SWIFT = {
    "model": "/models/qwen",
    "tuner_type": "lora",
    "swift_version": "3.9.0",
    "dataset": ["org/alpaca#500", "/data/own.jsonl"],
    "learning_rate": 1e-4,
    "num_train_epochs": 2.0,
    "max_length": None,
    "loss_type": ["sigmoid", "sft"],
    "rlhf_type": "dpo",
    "hub_token": "hf_SECRET",
}
README = f"""---
library_name: peft
---
<details><summary>See axolotl config</summary>

axolotl version: `0.11.0`
```yaml
{AXOLOTL}
```

</details><br>
"""


@pytest.mark.parametrize("name", ["axolotl_config.yaml", "mine.yml", "README.md"])
def test_axolotls_configuration_is_found_under_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.yaml").write_text("just: something else\n")
    (tmp_path / "b.yml").write_text("broken: [\n")
    (tmp_path / name).write_text(README if name == "README.md" else AXOLOTL)

    training = training_facts(tmp_path, {"peft_type": "LORA"}).training

    assert training.arguments == AXOLOTL_ARGUMENTS
    assert training.datasets == ("org/chats", "answers.jsonl")


def test_llama_factorys_arguments_are_read(tmp_path: Path) -> None:
    (tmp_path / "training_args.yaml").write_text(LLAMA_FACTORY)
    training = training_facts(tmp_path, {"peft_type": "LORA"}).training

    assert training.arguments == {
        "beta": 0.1,
        "learning_rate": 1e-4,
        "loss_type": "orpo",
        "max_length": 1024,
        "stage": "dpo",
    }
    assert training.datasets == ("identity", "org/pairs")


@pytest.mark.parametrize("name", ["axolotl_config.yaml", "llamafactory_config.yaml"])
def test_a_files_name_tells_the_tool_as_well(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("learning_rate: 1e-4\nlora_rank: 4\n")
    training = training_facts(tmp_path, {"peft_type": "LORA"}).training
    assert training.arguments == {"learning_rate": 1e-4}


@pytest.mark.parametrize("above", [False, True], ids=["in it", "beside it"])
def test_ms_swifts_arguments_are_read_for_a_checkpoint(tmp_path: Path, above: bool) -> None:
    checkpoint = tmp_path / "v0-20260101-120000" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    place = checkpoint.parent if above else checkpoint
    (place / "args.json").write_text(json.dumps(MS_SWIFT))

    training = training_facts(checkpoint, {"peft_type": "LORA"}).training

    assert training.arguments == {
        "learning_rate": 1e-4,
        "loss_type": ["sigmoid", "sft"],
        "num_train_epochs": 2.0,
        "stage": "dpo",
    }
    assert training.datasets == ("org/alpaca", "own.jsonl")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("args.json", json.dumps(MS_SWIFT)),
        ("training_args.yaml", LLAMA_FACTORY),
        ("README.md", README),
    ],
)
def test_settings_are_read_where_the_hubs_cache_has_them(
    tmp_path: Path, name: str, text: str
) -> None:
    blob = tmp_path / "models--me--lora" / "blobs" / "digest"
    snapshot = blob.parent.parent / "snapshots" / "revision"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_text(text)
    (snapshot / name).symlink_to("../../blobs/digest")
    assert training_facts(snapshot, {"peft_type": "LORA"}).training.arguments["stage"] == "dpo"


def test_settings_behind_any_other_link_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "private").write_text(LLAMA_FACTORY)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "training_args.yaml").symlink_to(tmp_path / "private")
    assert tool_settings(tmp_path / "lora").tool == ""


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "a: &a [x]\nbase_model: *a\nadapter: lora\n", "a: " + "[" * 10_000],
    ids=["empty", "list", "alias", "deep"],
)
def test_a_file_that_is_no_tools_settings_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "args.json").write_text(text)
    assert tool_settings(tmp_path).tool == ""
