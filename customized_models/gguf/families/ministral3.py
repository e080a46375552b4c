"""Ministral 3: Llama with a YaRN embedding, and queries that grow with their position."""

from __future__ import annotations

from ..family import Values, register
from ..format import f32
from .llama import Llama


@register("Ministral3ForCausalLM")
class Ministral3(Llama):
    """Upstream's `Mistral3Model.Ministral3Model`."""

    architecture = "mistral3"
    rope_types = ("yarn",)

    def metadata(self) -> Values:
        rope = self.settings.rope
        return super().metadata() | {
            "rope.scaling.yarn_log_multiplier": f32(rope["mscale_all_dim"]),
            "attention.temperature_scale": f32(rope["llama_4_scaling_beta"]),
        }
