"""LoRA adapters as GGUF files: llama.cpp with one, against transformers and PEFT on the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from customized_models.adapters.intake import Adapter
from customized_models.errors import MergeError, UnsupportedAdapterError
from customized_models.files.digests import FileDigest
from customized_models.files.streams import FileWriter
from customized_models.gguf import plan
from customized_models.gguf.adapter import AdapterPlan, plan_adapter
from customized_models.testing.tiny_models import tiny_adapter, tiny_llama, tiny_lora
from tests.gguf.models import MODELS, tiny_model
from tests.gguf.test_families import no_progress, source
from tests.gguf.test_reading_back import PROMPT, endings, model_size, served
from tests.servers import build_llama_cpp
from tests.servers.llama_cpp_oracle import Oracle

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of what is refused here

FAMILIES = [name for name in MODELS if "," not in name and name != "mixtral of eight"]
EXPERTS = {  # of whose layers PEFT's "all-linear" means stacks, to which no adapter is applied
    "mixtral", "granitemoe", "granitemoeshared", "qwen2moe", "qwen3moe", "olmoe", "glm4moe",
    "gpt_oss", "ernie4_5_moe",
}  # fmt: skip
AGREEMENT = 0.99999  # correlation of logits; an adapter that is left out has less than 0.99


def planned(base: Path, adapter: Path) -> AdapterPlan:
    return plan_adapter(source(base), Adapter.open(adapter), name="tiny")


def continued(model: Any, ending: list[int]) -> tuple[list[int], torch.Tensor]:
    """What transformers continues with, and the first token's log-probabilities."""
    expected, tokens = [], list(PROMPT)
    with torch.no_grad():
        for _ in range(8):
            logits = model(torch.tensor([tokens])).logits[0, -1]
            logits[ending] = -torch.inf
            expected.append(logits.log_softmax(0))
            tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :], expected[0]


def assert_served_as_by_peft(base: Path, adapter: Path, directory: Path) -> None:
    """llama.cpp answers as the adapter in PEFT's hands does, and otherwise than without it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole, beside = directory / "base.gguf", directory / "adapter.gguf"
    plan(source(base), "no_quantization", name="tiny", chat_template=True).write(whole, no_progress)
    planned(base, adapter).write(beside, no_progress)
    bare, applied = served([[whole], [whole, beside]], model_size(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ending = endings(whole)
    tokens, logprobs = continued(PeftModel.from_pretrained(model, adapter).eval(), ending)
    assert applied[0] == tokens
    ids = [number for number in map(int, applied[1]) if number not in ending]
    assert agreement(applied[1], logprobs, ids) >= AGREEMENT
    assert agreement(bare[1], logprobs, ids) < 0.99


def agreement(found: dict[str, float], expected: torch.Tensor, ids: list[int]) -> float:
    ours = torch.tensor([found[str(number)] for number in ids])
    return float(torch.corrcoef(torch.stack([ours, expected[ids]]))[0, 1])


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_makes_of_an_adapters_file_what_peft_makes_of_the_adapter(
    tmp_path: Path, name: str
) -> None:
    from peft import LoraConfig

    base = tiny_model(tmp_path / "base", MODELS[name], "float32")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if name in EXPERTS else "all-linear"
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    adapter = tiny_adapter(tmp_path / "adapter", base, config)
    assert_served_as_by_peft(base, adapter, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "lora_alpha": 12},
        {
            "rank_pattern": {"q_proj": 8, "layers.1.self_attn.v_proj": 2},
            "target_modules": ["q_proj", "v_proj"],
        },
        {"alpha_pattern": {"down_proj": 31}, "rank_pattern": {"down_proj": 3}, "use_rslora": True},
        {"target_modules": ["embed_tokens", "k_proj"], "lora_alpha": 40},
        {"target_modules": ["lm_head", "o_proj"]},
        {"layers_to_transform": [1], "lora_alpha": 64},
        {"exclude_modules": ["q_proj"], "lora_alpha": -32},
        {"init_lora_weights": "gaussian", "lora_alpha": 32},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_scales_and_chooses_layers_is_in_the_file(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    base = tiny_model(tmp_path / "base", MODELS["llama"], "float32")
    adapter = tiny_lora(tmp_path / "adapter", base, **({"lora_alpha": 16} | options))
    assert_served_as_by_peft(base, adapter, tmp_path)


def test_an_alpha_of_zero_changes_nothing(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", MODELS["llama"], "float32")
    adapter = tiny_lora(tmp_path / "adapter", base, lora_alpha=0)
    whole, beside = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    plan(source(base), "no_quantization", name="tiny", chat_template=True).write(whole, no_progress)
    planned(base, adapter).write(beside, no_progress)
    bare, applied = served([[whole], [whole, beside]], model_size(base))
    assert applied == bare


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_plain_adapters_file_holds_what_upstream_writes(
    tmp_path: Path, llama_cpp: Oracle, dtype: str
) -> None:
    base = tiny_llama(tmp_path / "base", dtype=dtype)
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules="all-linear")
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    planned(base, adapter).write(ours, no_progress)
    script = build_llama_cpp.directory() / "convert_lora_to_gguf.py"
    command = [sys.executable, script, "--base", base, "--outfile", theirs, adapter]
    subprocess.run(command, check=True, capture_output=True, timeout=300)

    one, two = (gguf.GGUFReader(path) for path in (ours, theirs))
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert one.fields[key].contents() == two.fields[key].contents()
    mine, upstream = ({t.name: t.data for t in reader.tensors} for reader in (one, two))
    assert mine.keys() == upstream.keys()
    assert all((mine[name] == upstream[name]).all() for name in mine)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_more_than_pairs_of_factors_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    base = tiny_llama(tmp_path / "base", attention_bias=True)
    adapter = tiny_lora(tmp_path / "adapter", base, **options)
    with pytest.raises(UnsupportedAdapterError, match=named):
        planned(base, adapter)


def test_adapters_of_other_types_are_refused_by_name(tmp_path: Path) -> None:
    from peft import IA3Config

    base = tiny_llama(tmp_path / "base")
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapter = tiny_adapter(tmp_path / "adapter", base, config)
    with pytest.raises(UnsupportedAdapterError, match="IA3"):
        planned(base, adapter)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_end_of_a_tied_base_is_refused(tmp_path: Path, target: str) -> None:
    base = tiny_llama(tmp_path / "base", tied=True)
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules=[target, "q_proj"])
    with pytest.raises(UnsupportedAdapterError, match=r"shares its weight|output layer is its"):
        planned(base, adapter)


def test_experts_are_refused(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", MODELS["qwen3moe"], "float32")
    adapter = tiny_lora(
        tmp_path / "adapter",
        base,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.down_proj"],
    )
    with pytest.raises(UnsupportedAdapterError, match="target_parameters"):
        planned(base, adapter)


def test_a_file_that_does_not_add_what_peft_adds_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(tmp_path / "base")
    ready = planned(base, tiny_lora(tmp_path / "adapter", base))

    finish = FileWriter.finish

    def damaging(writer: FileWriter) -> FileDigest:
        digest = finish(writer)
        with (tmp_path / "a.gguf").open("r+b") as file:
            file.seek(-200, 2)
            file.write(b"\x3f" * 100)
        return digest

    monkeypatch.setattr(FileWriter, "finish", damaging)
    with pytest.raises(MergeError, match="not what PEFT adds"):
        ready.write(tmp_path / "a.gguf", no_progress)
    assert not (tmp_path / "a.gguf").exists()
