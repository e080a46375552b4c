"""GPT-2, whose matrices lie on their side."""

from __future__ import annotations

from collections.abc import Iterable

from ..family import FILE_TYPE, Family, Part, Values, register
from ..format import Change, f32, u32
from ..names import in_layers

GPT_MODULES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "attn.bias": None,
    "attn.masked_bias": None,
}
GPT_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    **in_layers(GPT_MODULES, "transformer.h"),
}
_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


@register("GPT2LMHeadModel")
class GPT2(Family):
    """Upstream's `GPT2Model`."""

    architecture = "gpt2"
    names = GPT_NAMES
    assumes = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "n_inner": (None,),
    }

    def source_name(self, name: str) -> str | None:
        known = name.startswith(("transformer.", "lm_head."))
        return name if known else f"transformer.{name}"  # saved without its head

    def metadata(self) -> Values:
        settings = self.settings
        return {
            "block_count": u32(self.layers),
            "context_length": u32(settings.first("n_ctx", "n_positions")),
            "embedding_length": u32(settings["n_embd"]),
            "feed_forward_length": u32(4 * settings["n_embd"]),
            "attention.head_count": u32(settings["n_head"]),
            "attention.layer_norm_epsilon": f32(settings["layer_norm_epsilon"]),
            **FILE_TYPE,
        }

    def parts(self, name: str, stored: str, shape: tuple[int, ...]) -> Iterable[Part]:
        if name.endswith(_TRANSPOSED):
            yield Part(stored, shape[::-1], Change(lambda values: values.T, rows=0))
        else:
            yield Part(stored, shape)
