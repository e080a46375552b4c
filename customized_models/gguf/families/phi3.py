"""Phi 3, 3.5 and 4."""

from __future__ import annotations

import math

from ...errors import MalformedError
from ..family import FILE_TYPE, Family, Values, register
from ..format import Tensor, f32, u32
from ..names import PRE_NORMS, TEXT_MODEL, in_layers
from ..tokenizer import TokenizerFiles

_MODULES = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@register("Phi3ForCausalLM")
class Phi3(Family):
    """Upstream's `Phi3MiniModel`."""

    architecture = "phi3"
    names = {**TEXT_MODEL, **in_layers({**PRE_NORMS, **_MODULES})}
    assumes = {"hidden_act": ("silu", "swish")}
    rope_types = ("default", "longrope", "su")
    partial_rotary = True

    @property
    def _turned(self) -> int:
        part = self.settings.rope.get("partial_rotary_factor", 1.0)
        width, heads = self.settings["hidden_size"], self.settings["num_attention_heads"]
        return int(part * width) // int(heads)

    @property
    def _original(self) -> int:
        return int(self.settings.rope["original_max_position_embeddings"])

    def metadata(self) -> Values:
        settings = self.settings
        return {
            "context_length": u32(settings["max_position_embeddings"]),
            "rope.scaling.original_context_length": u32(self._original),
            "embedding_length": u32(settings["hidden_size"]),
            "feed_forward_length": u32(settings["intermediate_size"]),
            "block_count": u32(self.layers),
            "attention.head_count": u32(settings["num_attention_heads"]),
            "attention.head_count_kv": u32(settings["num_key_value_heads"]),
            "attention.layer_norm_rms_epsilon": f32(settings["rms_norm_eps"]),
            "rope.dimension_count": u32(self._turned),
            "rope.freq_base": f32(settings.full_rope["rope_theta"]),
            **FILE_TYPE,
            # 0 tells Phi 4, which has no window, from the others.
            "attention.sliding_window": u32(settings.get("sliding_window") or 0),
        }

    def leading_metadata(self) -> Values:
        if not self.settings.rope.get("long_factor"):
            return {}
        original = self._original
        scale = self.settings["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        return {"rope.scaling.attn_factor": f32(factor)}

    def extra_tensors(self) -> list[Tensor]:
        """The divisors of the rotary frequencies for long and for short texts."""
        if not self.settings.rope.get("long_factor"):
            return []
        found = []
        for length in ("long", "short"):
            factors = tuple(map(float, self.settings.rope.get(f"{length}_factor") or ()))
            if len(factors) != self._turned // 2:
                raise MalformedError(
                    f"config.json: {length}_factor has {len(factors)} numbers, not "
                    f"{self._turned // 2}"
                )
            found.append(
                Tensor(f"rope_factors_{length}.weight", (len(factors),), (), None, factors)
            )
        return found

    def tokenizer(self, files: TokenizerFiles) -> Values:
        if files.settings.get("tokenizer_class") == "GPT2Tokenizer" or (
            "tokenizer.model" not in files.files and not files.is_sentencepiece
        ):
            return files.bpe(self.vocabulary)
        return files.sentencepiece(self.vocabulary, all_added=True)
