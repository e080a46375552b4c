"""Whether an adapter fits a base, by the names and shapes in their headers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from customized_models.adapters.fitting import check_fits
from customized_models.adapters.intake import WEIGHTS, Adapter
from customized_models.errors import BaseModelMismatch
from customized_models.files.safetensors import Checkpoint
from customized_models.testing import tiny_llama


def save_weights(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / WEIGHTS)


def base_of(directory: Path, **options: Any) -> Checkpoint:
    return Checkpoint.open(tiny_llama(directory, tokenizer=False, **options))


def test_an_adapter_fits_the_base_it_was_trained_on(trained: Path) -> None:
    check_fits(Adapter.open(trained), Checkpoint.open(trained.parent / "base"))


@pytest.mark.parametrize(
    "options",
    [{"hidden_size": 32}, {"num_hidden_layers": 1}, {"intermediate_size": 80},
     {"num_attention_heads": 2, "head_dim": 16}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_an_adapter_does_not_fit_a_base_of_other_size(
    options: dict[str, int], trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelMismatch, match=r"layers\.[01]\."):
        check_fits(Adapter.open(trained), base_of(tmp_path / "base", **options))


def test_an_adapter_for_modules_that_the_base_lacks_does_not_fit(
    untrusted: Path, trained: Path, tmp_path: Path
) -> None:
    tensors = load_file(untrusted / WEIGHTS)
    save_weights(untrusted, {name.replace("layers", "h"): t for name, t in tensors.items()})
    base = Checkpoint.open(trained.parent / "base")
    check_fits(Adapter.open(untrusted), base)  # a checkpoint may call its layers otherwise
    renamed = {re.sub(r"layers\.(\d)\.\w+\.\w+", r"h.\1.other", n): t for n, t in tensors.items()}
    save_weights(untrusted, renamed)
    check_fits(Adapter.open(untrusted), base)  # and all modules, as EXAONE's and DeepSeek-V4's do
    with pytest.raises(BaseModelMismatch, match="none belongs to a module"):
        check_fits(Adapter.open(untrusted), base_of(tmp_path / "base", hidden_size=32))


def test_a_vision_tower_may_call_its_modules_as_the_language_model_does(
    untrusted: Path, trained: Path
) -> None:
    """Step 3.7's is such: its files have `attn.in_proj_weight` where the model has `k_proj`."""
    base = Checkpoint.open(trained.parent / "base")
    tower = "base_model.model.model.vision_model.layers.0.self_attn.k_proj."
    own = {f"{tower}lora_A.weight": torch.ones(4, 24), f"{tower}lora_B.weight": torch.ones(24, 4)}
    save_weights(untrusted, load_file(untrusted / WEIGHTS) | own)
    check_fits(Adapter.open(untrusted), base)
    save_weights(untrusted, own)  # and none of its modules is known to be the base's
    with pytest.raises(BaseModelMismatch, match=r"vision_model\.layers\.0"):
        check_fits(Adapter.open(untrusted), base)


def test_a_layer_beyond_the_last_is_named(untrusted: Path, trained: Path) -> None:
    tensors = load_file(untrusted / WEIGHTS)
    name = next(iter(tensors))
    tensors[re.sub(r"layers\.\d", "layers.99", name)] = tensors[name].clone()
    save_weights(untrusted, tensors)
    with pytest.raises(BaseModelMismatch, match=r"layers\.99"):
        check_fits(Adapter.open(untrusted), Checkpoint.open(trained.parent / "base"))


def test_a_saved_head_of_another_width_does_not_fit(untrusted: Path, trained: Path) -> None:
    tensors = load_file(untrusted / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(320, 65)
    save_weights(untrusted, tensors)
    with pytest.raises(BaseModelMismatch, match="lm_head"):
        check_fits(Adapter.open(untrusted), Checkpoint.open(trained.parent / "base"))


def test_an_output_layer_may_have_the_rows_of_a_vocabulary_that_came_with_the_adapter(
    untrusted: Path, trained: Path
) -> None:
    tensors = load_file(untrusted / WEIGHTS)
    prefix = "base_model.model.lm_head."
    tensors[f"{prefix}lora_A.weight"] = torch.ones(4, 64)
    tensors[f"{prefix}lora_B.weight"] = torch.ones(323, 4)
    save_weights(untrusted, tensors)
    base = Checkpoint.open(trained.parent / "base")
    with pytest.raises(BaseModelMismatch, match=r"lm_head.*save_embedding_layers=True"):
        check_fits(Adapter.open(untrusted), base)
    save_weights(untrusted, tensors | {f"{prefix}base_layer.weight": torch.ones(323, 64)})
    check_fits(Adapter.open(untrusted), base)
