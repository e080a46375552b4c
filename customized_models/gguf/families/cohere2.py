"""Cohere's Command R7B and A."""

from __future__ import annotations

from ..family import Family, Values, register
from ..format import f32, text, u32
from ..names import ATTENTION, GATED_MLP, TEXT_MODEL, in_layers
from .cohere import NORM


@register("Cohere2ForCausalLM")
class Cohere2(Family):
    """Upstream's `Cohere2Model`."""

    architecture = "cohere2"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **NORM, **GATED_MLP})}
    assumes = {"hidden_act": ("silu", "swish"), "attention_bias": (False,)}
    rope_types = ("default",)

    def metadata(self) -> Values:
        settings = self.settings
        size = settings["hidden_size"] // settings["num_attention_heads"]
        return self.common() | {
            "logit_scale": f32(settings["logit_scale"]),
            "attention.sliding_window": u32(settings["sliding_window"]),
            "vocab_size": u32(self.vocabulary),
            "rope.dimension_count": u32(int(settings.get("rotary_pct", 1.0) * size)),
            "rope.scaling.type": text("none"),
        }
