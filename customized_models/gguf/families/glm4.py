"""GLM-4 of 2025."""

from __future__ import annotations

from ..family import Family, Values, register
from ..format import u32
from ..names import ATTENTION, TEXT_MODEL, in_layers
from ..tokenizer import TokenizerFiles

_MODULES = {
    "input_layernorm": "attn_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOKENS = {
    "eos": "<|endoftext|>",
    "eot": "<|user|>",
    "unk": "<|endoftext|>",
    "bos": "<|endoftext|>",
}


@register("Glm4ForCausalLM")
class Glm4(Family):
    """Upstream's `Glm4Model`."""

    architecture = "glm4"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **_MODULES})}
    assumes = {"hidden_act": ("silu", "swish")}
    rope_types = ("default", "linear", "yarn")
    partial_rotary = True

    def metadata(self) -> Values:
        part = self.settings.rope.get("partial_rotary_factor", 0.5)
        turned = int(self.settings.head_size * part)
        return self.common() | {"rope.dimension_count": u32(turned)}

    def tokenizer(self, files: TokenizerFiles) -> Values:
        return files.bpe(self.vocabulary, named=_TOKENS)
