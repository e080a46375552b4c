"""A LoRA's product and sum in one pass: torch's bits, whatever the base holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from customized_models.merging.strategies import fused
from customized_models.merging.strategies.fused import fused_bit_identical, fused_sum
from customized_models.merging.strategies.rows import LoraFactors
from customized_models.merging.threads import Workspace
from customized_models.testing import tiny_llama, tiny_lora

from .parity import assert_parity, tiny_model

DTYPES = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
RANKS = (1, 2, 8, 16, 64)


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of every size and sign that the dtype has; NaN and infinity are among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = DTYPES[dtype]
    limit = torch.iinfo(bits)
    return torch.randint(limit.min, limit.max, shape, generator=generator).to(bits).view(dtype)


def total(factors: LoraFactors, base: torch.Tensor) -> torch.Tensor:
    product = torch.mm(factors.up, factors.down).mul_(factors.scaling)
    return base.to(torch.float32) + product


@given(
    seed=st.integers(0, 1 << 30),
    rank=st.sampled_from(RANKS),
    rows=st.integers(64, 131),
    columns=st.sampled_from([16, 272, 512]),
    scaling=st.sampled_from([1.0, 2.0, 0.3, -1e-30, 3e38]),
    dtype=st.sampled_from(list(DTYPES)),
)
@settings(max_examples=60, deadline=None)
def test_the_sum_has_the_bits_of_torch(
    seed: int, rank: int, rows: int, columns: int, scaling: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(rows, rank, generator=generator)
    up[::5] = 0
    factors = LoraFactors(up, torch.randn(rank, columns, generator=generator), scaling)
    one = LoraFactors(factors.up, factors.down, 1.0)
    assume(fused_bit_identical(one, torch.mm(one.up, one.down), Workspace()))  # else it is not used
    base = drawn((rows, columns), seed, dtype)
    exact, after, bits = total(factors, base), torch.empty_like(base), DTYPES[dtype]
    add = fused_sum(factors, dtype)
    assert add is not None
    assert add(base, after, 0, rows) == bool(torch.isfinite(exact).all())
    numbers = torch.isfinite(exact)
    assert torch.equal(after.view(bits)[numbers], exact.to(dtype).view(bits)[numbers])


@pytest.mark.parametrize("rank", RANKS)
def test_it_suits_ordinary_shapes_here(rank: int) -> None:
    """Else the test above asserts little."""
    factors = LoraFactors(torch.randn(256, rank), torch.randn(rank, 512), 1.0)
    assert fused_bit_identical(factors, torch.mm(factors.up, factors.down), Workspace())


@pytest.mark.parametrize(
    ("rank", "columns", "dtype"),
    [(16, 500, torch.bfloat16), (65, 512, torch.bfloat16), (16, 512, torch.float16)],
)
def test_what_no_kernel_is_for_is_left_to_torch(
    rank: int, columns: int, dtype: torch.dtype
) -> None:
    factors = LoraFactors(torch.ones(8, rank), torch.ones(rank, columns), 1.0)
    assert fused_sum(factors, dtype) is None


def test_a_scaling_that_is_no_float32_is_left_to_torch() -> None:
    factors = LoraFactors(torch.ones(64, 16), torch.ones(16, 64), 1e300)
    assert fused_sum(factors, torch.bfloat16) is None


def test_a_product_of_other_bits_is_left_to_torch() -> None:
    factors = LoraFactors(torch.randn(64, 16), torch.randn(16, 64), 1.0)
    whole = torch.mm(factors.up, factors.down)
    whole.view(torch.int32)[63, 63] ^= 1
    assert not fused_bit_identical(factors, whole, Workspace())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("installed", [True, False])
def test_a_merge_has_the_same_bits_with_numba_and_without(
    installed: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not installed:
        monkeypatch.setattr(fused, "kernels", lambda: None)
    base = tiny_llama(tmp_path / "base", dtype=dtype, hidden_size=128, num_attention_heads=4)
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules="all-linear")
    assert_parity(base, adapter, tmp_path, 14)


def test_a_matrix_of_one_row_has_the_bits_of_peft(tmp_path: Path) -> None:
    """Such is the gate of the shared expert; torch multiplies a vector otherwise than a matrix."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = {"shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen2MoeConfig(vocab_size=64, **sizes, **heads, **experts)
    base = tiny_model(tmp_path / "base", config, "float32")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    lora = LoraConfig(r=2, target_modules=["shared_expert_gate"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert_parity(base, tmp_path / "adapter", tmp_path, changed=2, aligned=True)


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_what_is_no_number_in_the_base_stays_as_torch_has_it(lost: float, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", shard_size="1GB", hidden_size=128, num_attention_heads=4)
    path = base / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][3, ::5] = lost
    save_file(tensors, path, {"format": "pt"})
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules="all-linear")
    assert_parity(base, adapter, tmp_path, 14)
