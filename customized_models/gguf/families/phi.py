"""Phi 1, 1.5 and 2."""

from __future__ import annotations

from ..family import FILE_TYPE, Family, Values, register
from ..format import f32, flag, u32
from ..names import in_layers

_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


@register("PhiForCausalLM")
class Phi(Family):
    """Upstream's `Phi2Model`."""

    architecture = "phi2"
    names = {
        "model.embed_tokens": "token_embd",
        "model.final_layernorm": "output_norm",
        "lm_head": "output",
        **in_layers(_MODULES),
    }
    assumes = {"hidden_act": ("gelu_new", "gelu_pytorch_tanh"), "qk_layernorm": (False,)}
    rope_types = ("default",)
    partial_rotary = True

    def metadata(self) -> Values:
        settings = self.settings
        width, heads = settings["hidden_size"], settings["num_attention_heads"]
        part = settings.rope["partial_rotary_factor"]
        return {
            "context_length": u32(settings["max_position_embeddings"]),
            "embedding_length": u32(width),
            "feed_forward_length": u32(4 * width),
            "block_count": u32(self.layers),
            "attention.head_count": u32(heads),
            "attention.head_count_kv": u32(heads),
            "attention.layer_norm_epsilon": f32(settings["layer_norm_eps"]),
            "rope.dimension_count": u32(int(part * width) // heads),
            **FILE_TYPE,
            "tokenizer.ggml.add_bos_token": flag(False),
        }
