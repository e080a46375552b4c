"""StableLM 2 and 3B."""

from __future__ import annotations

from ..family import FILE_TYPE, Family, Values, register
from ..format import f32, flag, u32
from ..names import ATTENTION, GATED_MLP, PRE_NORMS, TEXT_MODEL, in_layers

_NORMS = {
    "self_attn.q_layernorm.norms.{}": "attn_q_norm",
    "self_attn.k_layernorm.norms.{}": "attn_k_norm",
}


@register("StableLmForCausalLM")
class StableLm(Family):
    """Upstream's `StableLMModel`."""

    architecture = "stablelm"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **PRE_NORMS, **GATED_MLP, **_NORMS})}
    assumes = {"hidden_act": ("silu", "swish"), "qk_layernorm": (False,)}
    rope_types = ("default",)
    partial_rotary = True

    def metadata(self) -> Values:
        settings = self.settings
        heads, part = settings["num_attention_heads"], settings.rope["partial_rotary_factor"]
        return {
            "context_length": u32(settings["max_position_embeddings"]),
            "embedding_length": u32(settings["hidden_size"]),
            "block_count": u32(self.layers),
            "feed_forward_length": u32(settings["intermediate_size"]),
            "rope.dimension_count": u32(int(part * (settings["hidden_size"] // heads))),
            "attention.head_count": u32(heads),
            "attention.head_count_kv": u32(settings["num_key_value_heads"]),
            "use_parallel_residual": flag(settings.get("use_parallel_residual", True)),
            "attention.layer_norm_epsilon": f32(settings["layer_norm_eps"]),
            **FILE_TYPE,
        }
