"""GLM-4.5 and 4.6: experts behind a few dense layers."""

from __future__ import annotations

from ..family import Family, Values, register
from ..format import f32, flag, u32
from ..names import ATTENTION, EXPERTS, GATED_MLP, QK_NORMS, TEXT_MODEL, in_layers
from ..tokenizer import TokenizerFiles

_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_TOKENS = {
    "bos": "[gMASK]",
    "eot": "<|user|>",
    "unk": "<|endoftext|>",
    "eom": "<|observation|>",
}
_SIGMOID = 2  # ExpertGatingFuncType.SIGMOID


@register("Glm4MoeForCausalLM")
class Glm4Moe(Family):
    """Upstream's `Glm4MoeModel`; without the layer that predicts further tokens."""

    architecture = "glm4moe"
    names = {
        **TEXT_MODEL,
        **in_layers({**ATTENTION, **QK_NORMS, **GATED_MLP, **EXPERTS, **_MODULES}),
    }
    assumes = {"hidden_act": ("silu", "swish"), "num_nextn_predict_layers": (0, None)}
    rope_types = ("default",)
    partial_rotary = True
    some_layers = ("ffn_", "exp_probs_b")

    def metadata(self) -> Values:
        settings = self.settings
        part = settings.rope.get("partial_rotary_factor", 0.5)
        values = self.common() | {
            "rope.dimension_count": u32(int(settings.head_size * part)),
            "expert_feed_forward_length": u32(settings["moe_intermediate_size"]),
            "expert_shared_count": u32(settings["n_shared_experts"]),
            "leading_dense_block_count": u32(settings["first_k_dense_replace"]),
            "expert_gating_func": u32(_SIGMOID),
            "expert_weights_scale": f32(settings["routed_scaling_factor"]),
            "expert_weights_norm": flag(settings["norm_topk_prob"]),
        }
        if (further := settings.get("num_nextn_predict_layers")) is not None:
            values["nextn_predict_layers"] = u32(further)
        return values

    def tokenizer(self, files: TokenizerFiles) -> Values:
        return files.bpe(self.vocabulary, named=_TOKENS)
