"""Base models as people have them: older files of transformers', and models with their own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig

from customized_models import MalformedError, Merger, ModelRegistry, UnsupportedBaseError
from customized_models.testing import tiny_llama, tiny_lora
from tests.merging.parity import merged_by_peft, same_bits, tiny_model

CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n"
    "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\n"
    "from .configuration_own import OwnConfig\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


def set_config(directory: Path, **values: Any) -> None:
    """Change keys of `config.json`; those that are None are removed."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def with_code(directory: Path, **values: Any) -> Path:
    """A tiny model that brings code of its own."""
    base = tiny_llama(directory / "base")
    for name, text in CODE.items():
        (base / name).write_text(text)
    set_config(base, auto_map=AUTO_MAP, **values)
    return base


def saved_as_peft_merges(
    registry: ModelRegistry, base: Path, adapter: Path, **loading: Any
) -> Path:
    """Register an adapter of the base that is called "base", save it, compare; where it is."""
    expected = merged_by_peft(base, adapter, AutoModelForCausalLM, **loading)
    customized = registry.register(adapter, train_name="x", base_model="base")
    complete = Merger(registry).save(customized).result(progress=False)
    saved = registry.local_path(complete)
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype="auto", **loading).state_dict()
    assert expected.changed
    assert all(same_bits(loaded[name], tensor) for name, tensor in expected.tensors.items())
    return saved


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models")


# Code of its own


@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_a_model_with_code_of_its_own_is_taken_where_it_is_trusted_and_keeps_all_of_it(
    registry: ModelRegistry, tmp_path: Path, model_type: str
) -> None:
    base = with_code(tmp_path, model_type=model_type)
    with pytest.raises(UnsupportedBaseError, match=r"modeling_own\.py.*trust_remote_code=True"):
        registry.add_base_model("base", base)
    registry.add_base_model("base", base, trust_remote_code=True)
    adapter = tiny_lora(tmp_path / "adapter", tiny_llama(tmp_path / "plain"))
    trusted = {"trust_remote_code": model_type == "own"}
    saved = saved_as_peft_merges(registry, base, adapter, **trusted)
    assert {name: (saved / name).read_text() for name in CODE} == CODE
    assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_model_without_all_of_its_code_is_refused(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    base = with_code(tmp_path)
    (base / "configuration_own.py").unlink()
    with pytest.raises(MalformedError, match=r"configuration_own\.py"):
        registry.add_base_model("base", base, trust_remote_code=True)


def test_a_model_of_which_no_code_was_downloaded_is_loaded_by_transformers_own(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    base = with_code(tmp_path)
    for name in CODE:
        (base / name).unlink()
    registry.add_base_model("base", base)
    saved_as_peft_merges(registry, base, tiny_lora(tmp_path / "adapter", base))


# Files as older versions wrote them


def test_infinity_in_a_configuration_is_kept(registry: ModelRegistry, tmp_path: Path) -> None:
    config = GraniteMoeHybridConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=32,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
    )
    base = tiny_model(tmp_path / "base", config, "bfloat16")
    set_config(base, time_step_limit=[0.0, float("inf")])
    assert "Infinity" in (base / "config.json").read_text()
    registry.add_base_model("base", base)
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])
    saved = saved_as_peft_merges(registry, base, adapter)
    assert json.loads((saved / "config.json").read_text())["time_step_limit"] == [0, float("inf")]


def test_a_configuration_without_architectures_is_enough(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "base")
    set_config(base, architectures=None)
    registry.add_base_model("base", base)
    saved_as_peft_merges(registry, base, tiny_lora(tmp_path / "adapter", base))


def test_keys_that_are_there_twice_and_agree_are_one(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "base")
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace("{", '{"model_type": "llama",', 1))
    registry.add_base_model("base", base)
    saved_as_peft_merges(registry, base, tiny_lora(tmp_path / "adapter", base))
    (base / "config.json").write_text(text.replace("{", '{"model_type": "gemma",', 1))
    with pytest.raises(MalformedError, match="model_type"):
        registry.add_base_model("other", base)
