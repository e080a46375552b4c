"""Gemma 2."""

from __future__ import annotations

from ..family import Values, register
from ..format import f32, flag, u32
from ..names import ATTENTION, GATED_MLP, SANDWICH_NORMS, TEXT_MODEL, in_layers
from ..tokenizer import TokenizerFiles
from .gemma import Gemma, check_scale, sizes


@register("Gemma2ForCausalLM")
class Gemma2(Gemma):
    """Upstream's `Gemma2Model`."""

    architecture = "gemma2"
    names = {
        **TEXT_MODEL,
        **in_layers({**ATTENTION, **SANDWICH_NORMS, **GATED_MLP}),
        "lm_head": None,
    }

    def metadata(self) -> Values:
        settings = self.settings
        check_scale(self, layers_of_27b=46)
        return sizes(self) | {
            "attn_logit_softcapping": f32(settings["attn_logit_softcapping"]),
            "final_logit_softcapping": f32(settings["final_logit_softcapping"]),
            "attention.sliding_window": u32(settings["sliding_window"]),
        }

    def tokenizer(self, files: TokenizerFiles) -> Values:
        values = files.sentencepiece(self.vocabulary)
        values.pop("ggml.add_space_prefix", None)
        return values | {"ggml.add_space_prefix": flag(False)}
