"""StarCoder 2."""

from __future__ import annotations

from ..family import Family, register
from ..names import ATTENTION, PRE_NORMS, TEXT_MODEL, in_layers

_MLP = {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


@register("Starcoder2ForCausalLM")
class Starcoder2(Family):
    """Upstream's `StarCoder2Model`, which leaves the sliding window out."""

    architecture = "starcoder2"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **PRE_NORMS, **_MLP})}
    assumes = {"hidden_act": ("gelu_pytorch_tanh", "gelu_new")}
    rope_types = ("default", "linear", "yarn")
