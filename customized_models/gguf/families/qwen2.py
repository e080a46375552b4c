"""Qwen 2 and 2.5."""

from __future__ import annotations

from typing import ClassVar

from attrs import evolve

from ..family import Family, Values, register
from ..names import ATTENTION, GATED_MLP, PRE_NORMS, TEXT_MODEL, in_layers
from ..quantization import Network
from ..tokenizer import TokenizerFiles


@register("Qwen2ForCausalLM")
class Qwen2(Family):
    """Upstream's `Qwen2Model`."""

    architecture = "qwen2"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **PRE_NORMS, **GATED_MLP})}
    assumes = {"hidden_act": ("silu", "swish"), "use_sliding_window": (False, None)}
    rope_types = ("default", "linear", "yarn")
    large_layers: ClassVar[int | None] = 80  # of what upstream calls the 70B model

    def tokenizer(self, files: TokenizerFiles) -> Values:
        if "tokenizer.model" in files.files:
            return files.sentencepiece(self.vocabulary)
        return files.bpe(self.vocabulary)

    @property
    def network(self) -> Network:
        return evolve(super().network, large=self.layers == self.large_layers)
