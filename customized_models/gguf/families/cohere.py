"""Cohere's Command R and Aya."""

from __future__ import annotations

from ..family import Family, Values, register
from ..format import f32, text, u32
from ..names import ATTENTION, GATED_MLP, QK_NORMS, TEXT_MODEL, in_layers

NORM = {"input_layernorm": "attn_norm"}


@register("CohereForCausalLM")
class Cohere(Family):
    """Upstream's `CommandR2Model`."""

    architecture = "command-r"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **QK_NORMS, **NORM, **GATED_MLP})}
    assumes = {"hidden_act": ("silu", "swish"), "attention_bias": (False,)}
    rope_types = ("default",)

    def metadata(self) -> Values:
        values = self.common()
        if (length := self.settings.get("model_max_length")) is not None:
            values["context_length"] = u32(length)  # what it was trained on, if that is said
        scale = {"logit_scale": f32(self.settings["logit_scale"])}
        return values | scale | {"rope.scaling.type": text("none")}
