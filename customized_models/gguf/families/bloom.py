"""BLOOM."""

from __future__ import annotations

from ..family import FILE_TYPE, Family, Values, register
from ..format import Change, f32, u32
from ..names import in_layers
from ..projections import apart_by_kind

_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


@register("BloomForCausalLM")
class Bloom(Family):
    """Upstream's `BloomModel`."""

    architecture = "bloom"
    names = {
        "transformer.word_embeddings": "token_embd",
        "transformer.word_embeddings_layernorm": "token_embd_norm",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        **in_layers(_MODULES, "transformer.h"),
    }
    assumes = {"apply_residual_connection_post_layernorm": (False,)}

    def source_name(self, name: str) -> str | None:
        known = name.startswith(("transformer.", "lm_head."))
        return name if known else f"transformer.{name}"  # saved without its head

    def metadata(self) -> Values:
        settings = self.settings
        width, heads = settings["hidden_size"], settings["n_head"]
        return {
            "context_length": u32(settings.get("seq_length", width)),
            "embedding_length": u32(width),
            "feed_forward_length": u32(4 * width),
            "block_count": u32(self.layers),
            "attention.head_count": u32(heads),
            "attention.head_count_kv": u32(heads),
            "attention.layer_norm_epsilon": f32(settings["layer_norm_epsilon"]),
            **FILE_TYPE,
        }

    def change(self, name: str) -> Change | None:
        return apart_by_kind(self.settings["n_head"]) if "query_key_value" in name else None
