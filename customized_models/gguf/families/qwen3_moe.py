"""Qwen 3 with experts."""

from __future__ import annotations

from ..family import register
from ..names import QK_NORMS, in_layers
from .qwen2_moe import Qwen2Moe


@register("Qwen3MoeForCausalLM")
class Qwen3Moe(Qwen2Moe):
    """Upstream's `Qwen3MoeModel`."""

    architecture = "qwen3moe"
    names = {**Qwen2Moe.names, **in_layers(QK_NORMS)}
    assumes = {**Qwen2Moe.assumes, "norm_topk_prob": (True,)}
