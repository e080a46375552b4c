"""ByteDance's Seed-OSS."""

from __future__ import annotations

from ..family import Family, register
from ..names import ATTENTION, GATED_MLP, TEXT_MODEL, in_layers

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}


@register("SeedOssForCausalLM")
class SeedOss(Family):
    """Upstream's `SeedOssModel`."""

    architecture = "seed_oss"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **_NORMS, **GATED_MLP})}
    assumes = {"hidden_act": ("silu", "swish")}
    rope_types = ("default", "linear", "yarn")
