"""The text model of Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from ..family import register
from ..vision import text_name
from .qwen2 import Qwen2


@register("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
class Qwen2VL(Qwen2):
    """Upstream's `Qwen2VLModel`; what it sees with is a file of its own."""

    architecture = "qwen2vl"
    rope_types = (*Qwen2.rope_types, "mrope")

    def source_name(self, name: str) -> str | None:
        return text_name(name)
