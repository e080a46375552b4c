"""IBM's Granite: Llama with factors here and there."""

from __future__ import annotations

from ...errors import UnsupportedArchitectureError
from ..family import Values, register
from ..format import f32
from ..settings import Settings
from .llama import Llama

_FACTORS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


@register("GraniteForCausalLM")
class Granite(Llama):
    """Upstream's `GraniteModel`."""

    architecture = "granite"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if settings.pop("head_dim", None) not in (None, settings.head_size):
            raise UnsupportedArchitectureError(
                "config.json: head_dim; llama.cpp divides the width of Granite among its heads"
            )

    def metadata(self) -> Values:
        factors = {key: self.settings.get(name) for key, name in _FACTORS.items()}
        return super().metadata() | {key: f32(value) for key, value in factors.items() if value}
