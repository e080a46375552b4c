"""Qwen 3: Qwen 2 with norms of queries and keys."""

from __future__ import annotations

from ..family import register
from ..names import ATTENTION, GATED_MLP, PRE_NORMS, QK_NORMS, TEXT_MODEL, in_layers
from .qwen2 import Qwen2


@register("Qwen3ForCausalLM")
class Qwen3(Qwen2):
    """Upstream's `Qwen3Model`."""

    architecture = "qwen3"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **QK_NORMS, **PRE_NORMS, **GATED_MLP})}
