"""OpenAI's gpt-oss, whose experts have been dequantized."""

from __future__ import annotations

from collections.abc import Iterable

from ..family import Family, Part, Values, register
from ..format import Change, u32
from ..names import ATTENTION, TEXT_MODEL, in_layers

_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": "ffn_gate_exps.weight",
    "mlp.experts.gate_up_proj_bias": "ffn_gate_exps.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}


@register("GptOssForCausalLM")
class GptOss(Family):
    """Upstream's `GptOssModel`; gate and up projection take turns in one tensor."""

    architecture = "gpt-oss"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **_MODULES})}
    assumes = {"hidden_act": ("silu", "swish")}
    rope_types = ("yarn",)

    def metadata(self) -> Values:
        return self.common() | {
            "attention.sliding_window": u32(self.settings["sliding_window"]),
            "expert_feed_forward_length": u32(self.settings["intermediate_size"]),
        }

    def parts(self, name: str, stored: str, shape: tuple[int, ...]) -> Iterable[Part]:
        up = stored.replace("gate", "up")
        if name.endswith("gate_up_proj"):
            experts, columns, rows = shape
            half = (experts, rows // 2, columns)
            yield Part(stored, half, Change(lambda v: v.transpose(-1, -2)[:, ::2], rows=0))
            yield Part(up, half, Change(lambda v: v.transpose(-1, -2)[:, 1::2], rows=0))
        elif name.endswith("gate_up_proj_bias"):
            experts, rows = shape
            every = (experts, rows // 2)
            yield Part(stored, every, Change(lambda values: values[:, ::2], rows=0))
            yield Part(up, every, Change(lambda values: values[:, 1::2], rows=0))
        elif name.endswith("down_proj"):
            experts, columns, rows = shape
            turned = Change(lambda values: values.transpose(-1, -2), rows=0)
            yield Part(stored, (experts, rows, columns), turned)
        else:
            yield Part(stored, shape)
