"""Modules that many networks have, by what checkpoints call them and what the file does.

`{}` stands for a number, as `Family.names` has it.
"""

from __future__ import annotations

from collections.abc import Mapping


def in_layers(
    names: Mapping[str, str | None], layer: str = "model.layers"
) -> dict[str, str | None]:
    """`names` of a layer's modules, as entries of `Family.names`."""
    return {
        f"{layer}.{{}}.{name}": stored and f"blk.{{}}.{stored}" for name, stored in names.items()
    }


TEXT_MODEL: Mapping[str, str | None] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
SANDWICH_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GATED_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.{}.down_proj": "ffn_down_exps",  # upstream's order
    "mlp.experts.{}.gate_proj": "ffn_gate_exps",
    "mlp.experts.{}.up_proj": "ffn_up_exps",
}
