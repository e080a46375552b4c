"""Baidu's ERNIE 4.5 with experts."""

from __future__ import annotations

from ..family import Values, register
from ..format import u32
from ..names import ATTENTION, EXPERTS, GATED_MLP, PRE_NORMS, TEXT_MODEL, in_layers
from .ernie45 import Ernie45

_MODULES = {
    "mlp.gate": EXPERTS["mlp.gate"],
    "mlp.experts.{}.gate_proj": "ffn_gate_exps",  # upstream's order
    "mlp.experts.{}.up_proj": "ffn_up_exps",
    "mlp.experts.{}.down_proj": "ffn_down_exps",
    "mlp.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


@register("Ernie4_5_MoeForCausalLM")
class Ernie45Moe(Ernie45):
    """Upstream's `Ernie4_5MoeModel`."""

    architecture = "ernie4_5-moe"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **PRE_NORMS, **GATED_MLP, **_MODULES})}
    some_layers = ("ffn_", "exp_probs_b")

    def metadata(self) -> Values:
        settings = self.settings
        shared = settings["moe_num_shared_experts"]
        values = self.common() | {
            "expert_count": u32(settings["moe_num_experts"]),
            "expert_used_count": u32(settings["moe_k"]),
            "interleave_moe_layer_step": u32(settings["moe_layer_interval"]),
            "leading_dense_block_count": u32(settings["moe_layer_start_index"]),
            "expert_feed_forward_length": u32(settings["moe_intermediate_size"]),
            "expert_shared_count": u32(shared),
        }
        if shared:  # upstream's formula; in Baidu's models it is what the experts share
            length = settings["intermediate_size"] // settings["num_key_value_heads"]
            values["expert_shared_feed_forward_length"] = u32(length)
        return values
