"""rednote's dots.llm1."""

from __future__ import annotations

from ..family import Family, Values, register
from ..format import f32, flag, u32
from ..names import ATTENTION, EXPERTS, GATED_MLP, PRE_NORMS, QK_NORMS, TEXT_MODEL, in_layers

_SHARED = {
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


@register("Dots1ForCausalLM")
class Dots1(Family):
    """Upstream's `Dots1Model`."""

    architecture = "dots1"
    names = {
        **TEXT_MODEL,
        **in_layers({**ATTENTION, **QK_NORMS, **PRE_NORMS, **GATED_MLP, **EXPERTS, **_SHARED}),
    }
    assumes = {"hidden_act": ("silu", "swish"), "n_group": (1, None), "topk_group": (1, None)}
    rope_types = ("default", "linear", "yarn")
    some_layers = ("ffn_", "exp_probs_b")

    def metadata(self) -> Values:
        settings = self.settings
        return self.common() | {
            "expert_feed_forward_length": u32(settings["moe_intermediate_size"]),
            "leading_dense_block_count": u32(settings["first_k_dense_replace"]),
            "expert_shared_count": u32(settings["n_shared_experts"]),
            "expert_weights_scale": f32(settings["routed_scaling_factor"]),
            "expert_weights_norm": flag(settings["norm_topk_prob"]),
        }
