"""Gemma 3: its text models, and the text part of those that see."""

from __future__ import annotations

from ...errors import UnsupportedError
from ..family import PLUS_ONE, Family, Values, register
from ..format import Change, f32, flag, u32
from ..names import ATTENTION, GATED_MLP, QK_NORMS, SANDWICH_NORMS, TEXT_MODEL, in_layers
from ..tokenizer import TokenizerFiles
from ..vision import text_name
from .gemma import GELU, check_scale


@register("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
class Gemma3(Family):
    """Upstream's `Gemma3Model`."""

    architecture = "gemma3"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **QK_NORMS, **SANDWICH_NORMS, **GATED_MLP})}
    assumes = {
        "hidden_activation": GELU,
        "attention_bias": (False,),
        "attn_logit_softcapping": (None,),
    }
    rope_types = ("default", "linear")

    def source_name(self, name: str) -> str | None:
        return text_name(name)

    def metadata(self) -> Values:
        values, settings = self.common(), self.settings
        check_scale(self, layers_of_27b=62)
        if cap := settings.get("final_logit_softcapping"):
            values["final_logit_softcapping"] = f32(cap)
        if settings.get("sliding_window_pattern") != 1:
            values["attention.sliding_window"] = u32(settings["sliding_window"])
        return values

    def change(self, name: str) -> Change | None:
        return PLUS_ONE if name.endswith("norm.weight") else None

    def tokenizer(self, files: TokenizerFiles) -> Values:
        if "tokenizer.model" in files.files:
            values = files.sentencepiece(self.vocabulary)
            values.pop("ggml.add_space_prefix", None)
            return values | {"ggml.add_space_prefix": flag(False)}
        values = files.bpe(self.vocabulary)
        entries = len(files.document["model"]["vocab"]) + len(files.document["added_tokens"])
        if entries < self.vocabulary:
            raise UnsupportedError(
                f"upstream cuts Gemma 3's embedding to the {entries} entries of tokenizer.json, "
                f"which llama.cpp does not load with {self.vocabulary} tokens"
            )
        return values
