"""OLMo 2 and 3."""

from __future__ import annotations

from ..family import Family, Values, register
from ..format import flags, u32
from ..names import ATTENTION, GATED_MLP, POST_NORMS, QK_NORMS, TEXT_MODEL, in_layers


@register("Olmo2ForCausalLM", "Olmo3ForCausalLM")
class Olmo2(Family):
    """Upstream's `Olmo2Model`."""

    architecture = "olmo2"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **QK_NORMS, **POST_NORMS, **GATED_MLP})}
    assumes = {"hidden_act": ("silu", "swish"), "attention_bias": (False,)}
    rope_types = ("default", "linear", "yarn")

    def metadata(self) -> Values:
        values, settings = self.common(), self.settings
        if "sliding_window" in settings:
            slides = [kind == "sliding_attention" for kind in settings["layer_types"]]
            values["attention.sliding_window"] = u32(settings["sliding_window"])
            values["attention.sliding_window_pattern"] = flags(slides)
        return values
