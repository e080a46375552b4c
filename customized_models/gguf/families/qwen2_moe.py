"""Qwen 1.5 and 2 with experts, and a shared one with a gate of its own."""

from __future__ import annotations

from collections.abc import Iterable

from ..family import Family, Part, Values, gate_and_up, register
from ..format import u32
from ..names import ATTENTION, EXPERTS, GATED_MLP, PRE_NORMS, TEXT_MODEL, in_layers

_SHARED = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_LENGTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_STACKED = {
    "mlp.experts.gate_up_proj": "ffn_gate_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
"""How a checkpoint has experts that were never taken apart."""


@register("Qwen2MoeForCausalLM")
class Qwen2Moe(Family):
    """Upstream's `Qwen2MoeModel`."""

    architecture = "qwen2moe"
    names = {
        **TEXT_MODEL,
        **in_layers({**ATTENTION, **PRE_NORMS, **GATED_MLP, **EXPERTS, **_SHARED, **_STACKED}),
    }
    assumes = {
        "hidden_act": ("silu", "swish"),
        "use_sliding_window": (False, None),
        "mlp_only_layers": ([], None),
        "decoder_sparse_step": (1,),
        "norm_topk_prob": (False,),
    }
    rope_types = ("default", "linear", "yarn")

    def metadata(self) -> Values:
        lengths = {key: self.settings.get(name) for key, name in _LENGTHS.items()}
        return self.common() | {key: u32(n) for key, n in lengths.items() if n is not None}

    def parts(self, name: str, stored: str, shape: tuple[int, ...]) -> Iterable[Part]:
        if name.endswith("experts.gate_up_proj"):
            return gate_and_up(stored, shape)
        return super().parts(name, stored, shape)
