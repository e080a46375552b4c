"""The first OLMo, whose norms have no weights."""

from __future__ import annotations

from .. import rotary
from ..family import Family, Values, register
from ..format import Change, f32
from ..names import ATTENTION, GATED_MLP, in_layers

_EPSILON = 1e-5  # of transformers' `OlmoLayerNorm`, which has no setting for it


@register("OlmoForCausalLM")
class Olmo(Family):
    """Upstream's `OlmoModel`."""

    architecture = "olmo"
    names = {
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
        **in_layers({**ATTENTION, **GATED_MLP}),
    }
    assumes = {"hidden_act": ("silu", "swish"), "attention_bias": (False,)}
    rope_types = ("default", "linear")

    def metadata(self) -> Values:
        values = self.common() | {"attention.layer_norm_epsilon": f32(_EPSILON)}
        if (clip := self.settings.get("clip_qkv")) is not None:
            values["attention.clamp_kqv"] = f32(clip)
        return values

    def change(self, name: str) -> Change | None:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return rotary.pairs_of_halves(self.settings.head_size)
        return None
