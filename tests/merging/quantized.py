"""Tiny quantized checkpoints as they are released, and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from customized_models.files.safetensors import INDEX
from tests.merging.parity import tiny_model

Tensors = dict[str, torch.Tensor]

FP8_MAX = 448.0  # the largest finite float8_e4m3fn
FP4_MAX = 6.0  # the largest float4_e2m1
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Values of the codes 0 to 7; 8 more is their negative."""

DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}  # as in openai/gpt-oss-20b


def fp8_blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` (out, in) as float8_e4m3fn and the float32 factor of each block of it.

    Blocks at the far ends may be smaller: there are as many as DeepSeek's `weight_quant` has.
    """
    out, in_ = weight.shape
    padded = torch.zeros(-(-out // rows) * rows, -(-in_ // columns) * columns)
    padded[:out, :in_] = weight.float()
    blocks = padded.view(-1, rows, padded.shape[1] // columns, columns)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / FP8_MAX
    codes = (blocks / scale[:, None, :, None]).view(padded.shape)[:out, :in_]
    return codes.contiguous().to(torch.float8_e4m3fn), scale


def fp8_tensors(
    name: str, weight: torch.Tensor, block: tuple[int, int] | None, scales: torch.dtype
) -> Tensors:
    """`weight` and its `weight_scale_inv`, of blocks or a single number."""
    codes, scale = fp8_blocks(weight, *(block or weight.shape))
    scale = scale.to(scales) if block else scale.to(scales).reshape(())
    return {name: codes, f"{name}_scale_inv": scale}


def mxfp4_tensors(name: str, weight: torch.Tensor) -> Tensors:
    """`weight` (experts, in, out) as gpt-oss stores it: 32 values along `in` share a power of 2."""
    groups = weight.float().transpose(1, 2).unflatten(2, (-1, 32))
    largest = groups.abs().amax(dim=3).clamp(min=2.0**-100)
    exponent = torch.ceil(torch.log2(largest / FP4_MAX))
    scaled = groups / torch.exp2(exponent)[..., None]
    codes = (scaled.abs()[..., None] - FP4).abs().argmin(dim=-1) + 8 * (scaled < 0)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return {
        f"{name}_blocks": packed.to(torch.uint8),
        f"{name}_scales": (exponent + 127).to(torch.uint8),
    }


def quantized(
    base: Path,
    directory: Path,
    config: Mapping[str, Any],
    quantize: Callable[[str, torch.Tensor], Tensors],
) -> Path:
    """A copy of `base` whose tensors are replaced by those that `quantize` gives, file by file."""
    directory.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for path in sorted(base.iterdir()):
        if path.suffix == ".safetensors":
            tensors: Tensors = {}
            for name, tensor in load_file(path).items():
                tensors |= {n: t.contiguous() for n, t in quantize(name, tensor).items()}
            save_file(tensors, directory / path.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, path.name)
        else:
            (directory / path.name).write_bytes(path.read_bytes())
    state_quantization(directory, dict(config))
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text())
        (directory / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
    return directory


def state_quantization(directory: Path, value: object) -> None:
    """Set the `quantization_config` in a model's `config.json`."""
    document = json.loads((directory / "config.json").read_text())
    document["quantization_config"] = value
    (directory / "config.json").write_text(json.dumps(document))


def fp8(
    base: Path,
    directory: Path,
    *,
    block: tuple[int, int] | None = (32, 32),
    scales: torch.dtype = torch.float32,
    skip: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """`base` as DeepSeek and Qwen release theirs in FP8: all linear layers but the output.

    `block`: rows and columns that share a scale; None is the whole weight. `skip`: modules that
    stay as they are. `config`: more of its `quantization_config`.
    """
    kept = ("embed_tokens", "lm_head", "mlp.gate", *skip)

    def quantize(name: str, tensor: torch.Tensor) -> Tensors:
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or tensor.dim() != 2 or module.endswith(kept):
            return {name: tensor}
        return fp8_tensors(name, tensor, block, scales)

    settings = DEEPSEEK | {"weight_block_size": list(block) if block else None} | config
    return quantized(base, directory, settings, quantize)


def mxfp4(base: Path, directory: Path) -> Path:
    """A gpt-oss as OpenAI releases it: its experts in MXFP4."""

    def quantize(name: str, tensor: torch.Tensor) -> Tensors:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        return mxfp4_tensors(name, tensor)

    return quantized(base, directory, GPT_OSS, quantize)


def loaded(directory: Path, auto_class: Any = None) -> Tensors:
    """The parameters that transformers loads, dequantized if the checkpoint is quantized.

    Raises:
        AssertionError: it missed some, or found some that it has no use for.
    """
    from transformers import AutoModelForCausalLM

    model, info = (auto_class or AutoModelForCausalLM).from_pretrained(
        directory, dtype="auto", output_loading_info=True, **_dequantizing(directory)
    )
    assert not any(info.values()), info
    return dict(model.state_dict())


def dequantized_reference(base: Path, adapter: Path, auto_class: Any = None) -> Tensors:
    """What PEFT makes of `adapter` on the quantized `base` that transformers has dequantized."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = (auto_class or AutoModelForCausalLM).from_pretrained(
        base, dtype="auto", **_dequantizing(base)
    )
    assert not hasattr(model.config, "quantization_config")
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


def _dequantizing(directory: Path) -> dict[str, Any]:
    from transformers import FineGrainedFP8Config, Mxfp4Config

    stated = json.loads((directory / "config.json").read_text()).get("quantization_config")
    configs = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
    # None would not be the same as nothing: transformers would then load the codes as weights
    wanted = configs[stated["quant_method"]](dequantize=True) if stated else None
    return {"quantization_config": wanted} if wanted else {}


def tiny_qwen3_moe(directory: Path, shard_size: str = "40KB") -> Path:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    return tiny_model(directory, config, "bfloat16", shard_size)


def tiny_deepseek(directory: Path, shard_size: str = "40KB") -> Path:
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4,
        n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
        q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=32, qk_nope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    return tiny_model(directory, config, "bfloat16", shard_size)


def tiny_gpt_oss(directory: Path, shard_size: str = "40KB") -> Path:
    from transformers import GptOssConfig

    config = GptOssConfig(
        vocab_size=128, hidden_size=64, intermediate_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=512, sliding_window=32,
    )  # fmt: skip
    return tiny_model(directory, config, "bfloat16", shard_size)
