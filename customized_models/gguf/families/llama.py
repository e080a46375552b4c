"""The Llama architecture: what its configuration means, and its tensors' names, shapes and order.

Mistral is the same network where its attention has no window. Anything that llama.cpp computes
differently from transformers is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import frozen

from ...errors import (
    MalformedError,
    UnsupportedArchitectureError,
    UnsupportedQuantizationError,
    listed,
    shown,
)
from ...files.safetensors import TensorInfo
from ..format import F32, PLAIN, Tensor, f32, text, u32

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

# Constants of the rotary embedding that old checkpoints keep; transformers ignores them too.
_IGNORED = ".rotary_emb.inv_freq"


@frozen
class Llama:
    """The numbers in `config.json`, checked. `rope`: "default", "linear" or "llama3".

    `head_size`: components of one attention head. `context`, `vocabulary`: tokens.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    context: int
    vocabulary: int
    epsilon: float
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    rope: str
    rope_theta: float
    rope_scaling: Mapping[str, float]


def read_config(config: Mapping[str, Any]) -> Llama:
    """`config.json`, as transformers 4 or 5 writes it.

    Raises:
        MalformedError: a number is missing or no number.
        UnsupportedArchitectureError: a setting that llama.cpp has no equal for.
    """
    _refuse_foreign_settings(config)
    heads = _count(config, "num_attention_heads")
    hidden = _count(config, "hidden_size")
    kv_heads = _count(config, "num_key_value_heads", heads)
    head_size = _count(config, "head_dim", hidden // heads)
    if heads % kv_heads or head_size % 2:
        raise MalformedError(
            f"config.json: {heads} heads do not share {kv_heads} evenly, or have odd size"
        )
    rope, theta, scaling = _rope(config)
    return Llama(
        layers=_count(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_count(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        context=_count(config, "max_position_embeddings"),
        vocabulary=_count(config, "vocab_size"),
        epsilon=_number(config, "rms_norm_eps"),
        tied=_truth(config, "tie_word_embeddings"),
        attention_bias=_truth(config, "attention_bias"),
        mlp_bias=_truth(config, "mlp_bias"),
        rope=rope,
        rope_theta=theta,
        rope_scaling=scaling,
    )


def metadata(model: Llama) -> dict[str, bytes]:
    """The `llama.*` key-values, in upstream's order."""
    values = {
        "block_count": u32(model.layers),
        "context_length": u32(model.context),
        "embedding_length": u32(model.hidden),
        "feed_forward_length": u32(model.intermediate),
        "attention.head_count": u32(model.heads),
        "attention.head_count_kv": u32(model.kv_heads),
    }
    if model.rope == "linear":
        values["rope.scaling.type"] = text("linear")
        values["rope.scaling.factor"] = f32(model.rope_scaling["factor"])
    values |= {
        "rope.freq_base": f32(model.rope_theta),
        "attention.layer_norm_rms_epsilon": f32(model.epsilon),
        "attention.key_length": u32(model.head_size),
        "attention.value_length": u32(model.head_size),
        "vocab_size": u32(model.vocabulary),
        "rope.dimension_count": u32(model.head_size),
    }
    return {f"llama.{key}": value for key, value in values.items()}


def tensors(model: Llama, infos: Mapping[str, TensorInfo]) -> list[Tensor]:
    """Every tensor of the file; matrices in the checkpoint's own dtype, vectors in float32.

    Raises:
        MalformedError: a tensor is missing or has another shape than `config.json` implies.
        UnsupportedArchitectureError: a tensor that the architecture does not have.
        UnsupportedQuantizationError: a dtype that is not a plain 16- or 32-bit float.
    """
    expected = {source: (name, shape, size) for source, name, shape, size in _expected(model)}
    # transformers unties a model whose two matrices differ, so one that is there is used.
    if "lm_head.weight" in infos or not model.tied:
        matrix = (model.vocabulary, model.hidden)
        expected["lm_head.weight"] = ("output.weight", matrix, 0)
    found = {name for name in infos if not name.endswith(_IGNORED)}
    if unknown := found - expected.keys():
        raise UnsupportedArchitectureError(
            f"the architecture has no place for the tensors {listed(unknown)}"
        )
    if missing := expected.keys() - found:
        raise MalformedError(f"the checkpoint lacks the tensors {listed(missing)}")
    result = [_rope_factors(model)] if model.rope == "llama3" else []
    for source, (name, shape, head_size) in expected.items():
        info = infos[source]
        if info.shape != shape:
            raise MalformedError(
                f"tensor {shown(source)} has shape {info.shape}; config.json implies {shape}"
            )
        if info.dtype not in PLAIN:
            raise UnsupportedQuantizationError(
                f"tensor {shown(source)} is {info.dtype}; only {', '.join(PLAIN)} are converted"
            )
        kind = PLAIN[info.dtype] if len(shape) > 1 else F32
        result.append(Tensor(name, shape, kind, source, head_size))
    return result


def _expected(model: Llama) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Checkpoint name, file name, shape, and the head size where heads are reordered."""
    hidden, inner = model.hidden, model.intermediate
    queries, keys = model.heads * model.head_size, model.kv_heads * model.head_size
    yield "model.embed_tokens.weight", "token_embd.weight", (model.vocabulary, hidden), 0
    yield "model.norm.weight", "output_norm.weight", (hidden,), 0
    linears = (
        ("self_attn.q_proj", "attn_q", (queries, hidden), model.attention_bias, model.head_size),
        ("self_attn.k_proj", "attn_k", (keys, hidden), model.attention_bias, model.head_size),
        ("self_attn.v_proj", "attn_v", (keys, hidden), model.attention_bias, 0),
        ("self_attn.o_proj", "attn_output", (hidden, queries), model.attention_bias, 0),
        ("mlp.gate_proj", "ffn_gate", (inner, hidden), model.mlp_bias, 0),
        ("mlp.up_proj", "ffn_up", (inner, hidden), model.mlp_bias, 0),
        ("mlp.down_proj", "ffn_down", (hidden, inner), model.mlp_bias, 0),
    )
    norms = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"))
    for layer in range(model.layers):
        source, name = f"model.layers.{layer}", f"blk.{layer}"
        for norm, short in norms:
            yield f"{source}.{norm}.weight", f"{name}.{short}.weight", (hidden,), 0
        for linear, short, shape, bias, head_size in linears:
            yield f"{source}.{linear}.weight", f"{name}.{short}.weight", shape, head_size
            if bias:
                yield f"{source}.{linear}.bias", f"{name}.{short}.bias", shape[:1], head_size


def _rope_factors(model: Llama) -> Tensor:
    """What each rotary frequency is divided by under Llama 3's rule.

    Source: `conversion/llama.py` `generate_extra_tensors` of llama.cpp b11434, which restates
    `_compute_llama3_parameters` of transformers; in float32, as there.
    """
    import torch

    size, scaling = model.head_size, model.rope_scaling
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    old = scaling["original_max_position_embeddings"]
    factors = []
    for frequency in 1.0 / (model.rope_theta**exponents):
        wavelength = 2 * math.pi / frequency
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(scaling["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / scaling["factor"] + smooth)))
    return Tensor("rope_freqs.weight", (size // 2,), F32, None, values=tuple(factors))


def _rope(config: Mapping[str, Any]) -> tuple[str, float, dict[str, float]]:
    """Kind, base and scaling: under `rope_parameters` since transformers 5, spread out before."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise MalformedError("config.json: the rope settings are no object")
    kind = rope.get("rope_type", rope.get("type")) or "default"
    source = rope if "rope_theta" in rope else config
    theta = _number(source, "rope_theta", 10000.0)  # transformers' default for both classes
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UnsupportedArchitectureError("config.json: a partial rotary embedding")
    keys: tuple[str, ...]
    if kind == "default":
        keys = ()
    elif kind == "linear":
        keys = ("factor",)
    elif kind == "llama3":
        keys = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    else:
        raise UnsupportedArchitectureError(
            f"config.json: rope type {shown(kind)}; supported are default, linear and llama3"
        )
    scaling = {key: _number(rope, key) for key in keys}
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise MalformedError("config.json: low_freq_factor is not below high_freq_factor")
    return kind, theta, scaling


def _refuse_foreign_settings(config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedArchitectureError(
            f"config.json: hidden_act is {shown(config['hidden_act'])}; llama.cpp has only silu"
        )
    if config.get("partial_rotary_factor", 1) not in (1, None):
        raise UnsupportedArchitectureError("config.json: a partial rotary embedding")
    if list(config.get("architectures") or ()) == ["MistralForCausalLM"]:
        # MistralConfig fills in a window of 4096 and 8 key-value heads where a file has none.
        window = config.get("sliding_window", 4096)
        if window is not None and window < _count(config, "max_position_embeddings"):
            raise UnsupportedArchitectureError(
                f"config.json: a sliding window of {shown(window)}; llama.cpp attends to all"
            )
        _count(config, "num_key_value_heads")


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise MalformedError(f"config.json: {key} is {shown(value)}, not a positive whole number")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 3e38:
        raise MalformedError(f"config.json: {key} is {shown(value)}, not a positive number")
    return float(value)


def _truth(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if type(value) is not bool:
        raise MalformedError(f"config.json: {key} is {shown(value)}, neither true nor false")
    return value
