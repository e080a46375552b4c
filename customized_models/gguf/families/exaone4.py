"""LG's EXAONE 4."""

from __future__ import annotations

from ...errors import UnsupportedArchitectureError
from .. import rotary
from ..family import Family, Values, register
from ..format import Tensor, flags, u32
from ..names import ATTENTION, GATED_MLP, POST_NORMS, QK_NORMS, TEXT_MODEL, in_layers
from ..settings import Settings

_SLIDING = 64  # layers of the one size that has sliding windows: `src/models/exaone4.cpp`


@register("Exaone4ForCausalLM")
class Exaone4(Family):
    """Upstream's `Exaone4Model`."""

    architecture = "exaone4"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **QK_NORMS, **POST_NORMS, **GATED_MLP})}
    assumes = {"hidden_act": ("silu", "swish")}
    rope_types = ("default", "linear", "llama3")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        slides = "sliding_attention" in settings.get("layer_types", ())
        if slides and self.layers != _SLIDING:
            raise UnsupportedArchitectureError(
                f"config.json: layers with a sliding window; llama.cpp has them for {_SLIDING} "
                f"layers alone"
            )

    def metadata(self) -> Values:
        values, settings = self.common() | {"vocab_size": u32(self.vocabulary)}, self.settings
        if settings.get("sliding_window") is not None:
            slides = [kind == "sliding_attention" for kind in settings["layer_types"]]
            values["attention.sliding_window"] = u32(settings["sliding_window"])
            values["attention.sliding_window_pattern"] = flags(slides)
        return values

    def extra_tensors(self) -> list[Tensor]:
        factors = rotary.llama3_factors(self.settings)
        return [Tensor("rope_freqs.weight", (len(factors),), (), values=factors)] if factors else []
