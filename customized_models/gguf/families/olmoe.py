"""OLMoE."""

from __future__ import annotations

from ..family import Family, Values, register
from ..format import f32
from ..names import ATTENTION, EXPERTS, PRE_NORMS, QK_NORMS, TEXT_MODEL, in_layers

_EPSILON = 1e-5  # upstream sets it whatever the settings say


@register("OlmoeForCausalLM")
class Olmoe(Family):
    """Upstream's `OlmoeModel`."""

    architecture = "olmoe"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **QK_NORMS, **PRE_NORMS, **EXPERTS})}
    assumes = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "rms_norm_eps": (_EPSILON,),
        "clip_qkv": (None,),
        "norm_topk_prob": (False,),
    }
    grouped = False
    rope_types = ("default", "linear")

    def metadata(self) -> Values:
        return self.common() | {"attention.layer_norm_rms_epsilon": f32(_EPSILON)}
