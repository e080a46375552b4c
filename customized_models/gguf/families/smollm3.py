"""SmolLM3: Llama, every fourth layer of which has no rotary embedding."""

from __future__ import annotations

from ...errors import UnsupportedArchitectureError
from ..family import register
from ..settings import Settings
from .llama import Llama


@register("SmolLM3ForCausalLM")
class SmolLM3(Llama):
    """Upstream's `SmolLM3Model`."""

    architecture = "smollm3"
    assumes = {**Llama.assumes, "use_sliding_window": (False, None)}

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        rotary = [int((layer + 1) % 4 != 0) for layer in range(self.layers)]
        if settings.get("no_rope_layers", rotary) != rotary:
            raise UnsupportedArchitectureError(
                "config.json: no_rope_layers; llama.cpp leaves the rotary embedding out of every "
                "fourth layer"
            )
