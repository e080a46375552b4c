"""Mixtral: Llama whose feed-forward layers are experts."""

from __future__ import annotations

from ..family import register
from ..names import ATTENTION, PRE_NORMS, TEXT_MODEL, in_layers
from .llama import Llama

_EXPERTS = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
    "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
}


@register("MixtralForCausalLM")
class Mixtral(Llama):
    """Upstream's `LlamaModel` with experts."""

    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **PRE_NORMS, **_EXPERTS})}
