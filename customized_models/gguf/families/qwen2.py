"""Qwen 2 and 2.5."""

from __future__ import annotations

from typing import ClassVar

from ..family import Family, Values, register
from ..names import ATTENTION, GATED_MLP, PRE_NORMS, TEXT_MODEL, in_layers
from ..tokenizer import TokenizerFiles


@register("Qwen2ForCausalLM")
class Qwen2(Family):
    """Upstream's `Qwen2Model`."""

    architecture = "qwen2"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **PRE_NORMS, **GATED_MLP})}
    assumes = {"hidden_act": ("silu", "swish"), "use_sliding_window": (False, None)}
    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn")

    def tokenizer(self, files: TokenizerFiles) -> Values:
        if "tokenizer.model" in files.files:
            return files.sentencepiece(self.vocabulary)
        return files.bpe(self.vocabulary)
