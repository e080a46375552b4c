"""GPT-NeoX: Pythia and its like."""

from __future__ import annotations

from ..family import Family, Values, register
from ..format import Change, f32, flag, u32
from ..names import in_layers
from ..projections import apart_by_kind

_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "attention.bias": None,
    "attention.masked_bias": None,
    "attention.rotary_emb.inv_freq": None,
}


@register("GPTNeoXForCausalLM")
class GPTNeoX(Family):
    """Upstream's `GPTNeoXModel`, which writes no `general.file_type`."""

    architecture = "gptneox"
    names = {
        "gpt_neox.embed_in": "token_embd",
        "gpt_neox.final_layer_norm": "output_norm",
        "embed_out": "output",
        **in_layers(_MODULES, "gpt_neox.layers"),
    }
    assumes = {"hidden_act": ("gelu",), "attention_bias": (True,)}
    rope_types = ("default",)
    partial_rotary = True

    def metadata(self) -> Values:
        settings = self.settings
        heads = settings["num_attention_heads"]
        part = settings.first("rotary_pct")
        part = settings.rope["partial_rotary_factor"] if part is None else part
        return {
            "context_length": u32(settings["max_position_embeddings"]),
            "embedding_length": u32(settings["hidden_size"]),
            "block_count": u32(self.layers),
            "feed_forward_length": u32(settings["intermediate_size"]),
            "rope.dimension_count": u32(int(part * (settings["hidden_size"] // heads))),
            "attention.head_count": u32(heads),
            "use_parallel_residual": flag(settings.get("use_parallel_residual", True)),
            "attention.layer_norm_epsilon": f32(settings["layer_norm_eps"]),
        }

    def change(self, name: str) -> Change | None:
        if "query_key_value" in name:
            return apart_by_kind(self.settings["num_attention_heads"])
        return None
