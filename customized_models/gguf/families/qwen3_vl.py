"""The text model of Qwen3-VL."""

from __future__ import annotations

from ..family import Values, register
from ..format import u32
from ..vision import text_name
from .qwen3 import Qwen3


@register("Qwen3VLForConditionalGeneration")
class Qwen3VL(Qwen3):
    """Upstream's `Qwen3VLTextModel`; what it sees with is a file of its own."""

    architecture = "qwen3vl"
    rope_types = (*Qwen3.rope_types, "mrope")

    def source_name(self, name: str) -> str | None:
        return text_name(name)

    def metadata(self) -> Values:
        seen = self.settings.get("vision_config", {}).get("deepstack_visual_indexes", [])
        return super().metadata() | {"n_deepstack_layers": u32(len(seen))}
