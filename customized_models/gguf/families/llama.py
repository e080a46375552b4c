"""Llama, and the networks that are one with other numbers.

Mistral's sliding window is no part of the file, as upstream has it: llama.cpp attends to all.
"""

from __future__ import annotations

from typing import ClassVar

from .. import rotary
from ..family import Family, Values, register
from ..format import Change, Tensor, flag, u32
from ..names import ATTENTION, GATED_MLP, PRE_NORMS, TEXT_MODEL, in_layers
from ..tokenizer import TokenizerFiles

_SMALL_GRANITE = 49152  # a vocabulary that upstream takes for Granite's, which begins with no token


@register("LlamaForCausalLM", "MistralForCausalLM")
class Llama(Family):
    """The Llama architecture; upstream's `LlamaModel`."""

    architecture = "llama"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **PRE_NORMS, **GATED_MLP})}
    assumes = {"hidden_act": ("silu", "swish")}
    rope_types: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn", "llama3")

    def metadata(self) -> Values:
        sizes = {
            "vocab_size": u32(self.vocabulary),
            "rope.dimension_count": u32(self.settings.head_size),
        }
        return self.common() | sizes

    def change(self, name: str) -> Change | None:
        if name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            return rotary.pairs_of_halves(self.settings.head_size)
        return None

    def extra_tensors(self) -> list[Tensor]:
        factors = rotary.llama3_factors(self.settings)
        return [Tensor("rope_freqs.weight", (len(factors),), (), values=factors)] if factors else []

    def tokenizer(self, files: TokenizerFiles) -> Values:
        values = files.space_prefix()
        if "tokenizer.model" in files.files:
            values = values | files.sentencepiece(self.vocabulary) | values
        else:
            values |= files.bpe(self.vocabulary)
        if self.vocabulary == _SMALL_GRANITE:
            values["ggml.add_bos_token"] = flag(False)
        return values
