"""JetBrains' Mellum 2."""

from __future__ import annotations

from ..family import Family, Values, register
from ..format import flags, u32
from ..names import ATTENTION, EXPERTS, PRE_NORMS, QK_NORMS, TEXT_MODEL, in_layers


@register("MellumForCausalLM")
class Mellum(Family):
    """Upstream's `MellumModel`."""

    architecture = "mellum"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **QK_NORMS, **PRE_NORMS, **EXPERTS})}
    assumes = {"hidden_act": ("silu", "swish"), "norm_topk_prob": (True,)}

    def metadata(self) -> Values:
        settings = self.settings
        values = self.common()
        values["expert_feed_forward_length"] = u32(settings["moe_intermediate_size"])
        slides = settings.get("use_sliding_window")
        if slides in (True, None) and settings.get("sliding_window") is not None:
            pattern = [kind == "sliding_attention" for kind in settings["layer_types"]]
            values["attention.sliding_window"] = u32(settings["sliding_window"])
            values["attention.sliding_window_pattern"] = flags(pattern)
        return values
