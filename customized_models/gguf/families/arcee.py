"""Arcee's AFM: Llama with a feed-forward layer that has no gate."""

from __future__ import annotations

from ..family import register
from ..names import ATTENTION, PRE_NORMS, TEXT_MODEL, in_layers
from .llama import Llama

_MLP = {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


@register("ArceeForCausalLM")
class Arcee(Llama):
    """Upstream's `ArceeModel`."""

    architecture = "arcee"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **PRE_NORMS, **_MLP})}
    assumes = {"hidden_act": ("relu2",)}
