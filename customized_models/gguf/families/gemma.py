"""The first Gemma."""

from __future__ import annotations

from ...errors import UnsupportedArchitectureError, shown
from ..family import FILE_TYPE, PLUS_ONE, Family, Values, register
from ..format import Change, f32, flag, u32
from ..names import ATTENTION, GATED_MLP, PRE_NORMS, TEXT_MODEL, in_layers
from ..tokenizer import TokenizerFiles

GELU = ("gelu_pytorch_tanh",)

# Upstream gives every Gemma those tokens of CodeGemma's that `special_tokens` has not named.
_CODE_TOKENS = {"eot": 107}


def check_scale(family: Family, layers_of_27b: int) -> None:
    """Whether queries are scaled as llama.cpp takes for granted.

    Source: `load_arch_hparams` in `src/models/gemma2.cpp` and `gemma3.cpp` of llama.cpp b11434.

    Raises:
        UnsupportedArchitectureError: they are not.
    """
    settings = family.settings
    assumed = settings["head_dim"]
    if family.layers == layers_of_27b:
        assumed = settings["hidden_size"] // settings["num_attention_heads"]
    if settings["query_pre_attn_scalar"] != assumed:
        raise UnsupportedArchitectureError(
            f"config.json: query_pre_attn_scalar is {shown(settings['query_pre_attn_scalar'])}; "
            f"llama.cpp takes {assumed} for granted"
        )


def sizes(family: Family) -> Values:
    """The keys that the first two Gemmas have, in their own order."""
    settings = family.settings
    return {
        "context_length": u32(settings["max_position_embeddings"]),
        "embedding_length": u32(settings["hidden_size"]),
        "block_count": u32(family.layers),
        "feed_forward_length": u32(settings["intermediate_size"]),
        "attention.head_count": u32(settings["num_attention_heads"]),
        "attention.head_count_kv": u32(settings["num_key_value_heads"]),
        "attention.layer_norm_rms_epsilon": f32(settings["rms_norm_eps"]),
        "attention.key_length": u32(settings["head_dim"]),
        "attention.value_length": u32(settings["head_dim"]),
        **FILE_TYPE,
    }


@register("GemmaForCausalLM")
class Gemma(Family):
    """Upstream's `GemmaModel`; the output layer is always the embedding."""

    architecture = "gemma"
    names = {
        **TEXT_MODEL,
        **in_layers({**ATTENTION, **PRE_NORMS, **GATED_MLP}),
        "lm_head": None,
    }
    assumes = {"hidden_act": GELU, "attention_bias": (False,), "tie_word_embeddings": (True,)}
    rope_types = ("default",)

    def metadata(self) -> Values:
        return sizes(self)

    def change(self, name: str) -> Change | None:
        return PLUS_ONE if name.endswith("norm.weight") else None

    def tokenizer(self, files: TokenizerFiles) -> Values:
        values = files.sentencepiece(self.vocabulary)
        values.pop("ggml.add_space_prefix", None)
        eot = {f"ggml.{role}_token_id": u32(number) for role, number in _CODE_TOKENS.items()}
        return values | eot | {"ggml.add_space_prefix": flag(False)}
