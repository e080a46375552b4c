"""Configurations of tiny models, for every class that transformers has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

_SIZES = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "width": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32, "hidden_dim": 32, "model_dim": 32,
    "output_hidden_size": 32, "out_hidden_size": 32, "projection_dim": 32, "qk_hidden_size": 32,
    "intermediate_size": 48, "d_ff": 48, "n_inner": 48, "encoder_ffn_dim": 48, "ffn_dim": 48,
    "decoder_ffn_dim": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "mlp_dim": 48,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2, "depth": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "n_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "kv_channels": 8,
    "vocab_size": 96, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "top_k_experts": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_n_heads": 8,
    "mamba_d_head": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_n_groups": 1,
    "n_groups": 1, "time_step_rank": 4, "lru_width": 32, "attention_window_size": 16,
    "sliding_window": 16, "image_size": 16, "patch_size": 8, "window_size": 8,
}  # fmt: skip
"""Of a tiny model, by the names that configurations have for them."""

_PARTS = {"vocab": 96, "layers": 2, "experts": 4, "size": 32, "dim": 32, "channels": 32}
"""Of what has another name, by a part of it, if it is many times as large."""

_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2, "intermediate_size": 48,
}  # fmt: skip
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}

_OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default",
                                                                   "rope_theta": 1e4}}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "dots1": _EXPERTS,
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "esm": {"vocab_size": 96, "pad_token_id": 1, "mask_token_id": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gemma4_text": {"vocab_size_per_layer_input": 96},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 1,
                  "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
                 "attention_head_size": 8, "feed_forward_size": 48},
}  # fmt: skip
"""Of single types of models, by what their classes ask for."""

_OFTEN_DERIVED = ("head_dim", "num_key_value_heads", "intermediate_size")
"""Stated as None where they follow from others, which not every class does in time."""


def tiny_config(config_class: Any) -> Any:
    """A configuration of that class with small sizes, in the ones inside it as well."""
    default = config_class()
    small = _small(default) | {
        name: tiny_config(inside if isinstance(inside, type) else type(inside))
        for name, inside in _inside(config_class, default)
    }
    try:
        return config_class(**small)
    except Exception:  # of all kinds: a class may not take what it gives
        return config_class(**_accepted(config_class, small))


def _inside(config_class: Any, default: Any) -> Iterator[tuple[str, Any]]:
    """Names of the configurations inside one, and what they are, or their classes."""
    for name, known in getattr(config_class, "sub_configs", {}).items():
        value = getattr(default, name, None)
        plain = value is None and known.__name__ != "AutoConfig"
        if plain or hasattr(value, "to_dict"):
            yield name, known if plain else value


def _accepted(config_class: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """As many of the arguments as the class takes together."""
    accepted: dict[str, Any] = {}
    for name, value in arguments.items():
        with suppress(Exception):
            config_class(**accepted, **{name: value})
            accepted[name] = value
    return accepted


def _small(config: Any) -> dict[str, Any]:
    """The arguments that make a configuration of that class small."""
    stated = config.to_dict()
    small = {name: size for name, size in _SIZES.items() if _is_larger(stated.get(name, 0), size)}
    small |= {
        name: size
        for name, value in stated.items()
        for part, size in _PARTS.items()
        if part in name and name not in small and type(value) is int and value > 16 * size
    }
    small |= {name: _SIZES[name] for name in _OFTEN_DERIVED if name in stated} | small
    layers = [stated[k] for k in ("num_hidden_layers", "num_layers", "n_layer") if stated.get(k)]
    for name, value in stated.items():
        if isinstance(value, list) and len(value) > 2 and len(value) in layers:
            small[name] = value[:1] + value[-1:]  # one of each sort, mostly
        if isinstance(value, int) and name.endswith("_token_id") and value >= _SIZES["vocab_size"]:
            small[name] = 3 + len(small) % 16
    return small | _OWN.get(config.model_type, {})


def _is_larger(value: Any, size: int) -> bool:
    return type(value) is int and value > size
