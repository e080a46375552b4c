"""Baidu's ERNIE 4.5."""

from __future__ import annotations

from ..family import Family, Values, register
from ..names import ATTENTION, GATED_MLP, PRE_NORMS, TEXT_MODEL, in_layers
from ..tokenizer import TokenizerFiles


@register("Ernie4_5ForCausalLM")
class Ernie45(Family):
    """Upstream's `Ernie4_5Model`."""

    architecture = "ernie4_5"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **PRE_NORMS, **GATED_MLP})}
    assumes = {"hidden_act": ("silu", "swish")}
    rope_types = ("default", "linear", "yarn")

    def tokenizer(self, files: TokenizerFiles) -> Values:
        values = files.sentencepiece(self.vocabulary)
        if prefix := files.space_prefix():
            values.pop("ggml.add_space_prefix", None)
            values |= prefix
        return values
