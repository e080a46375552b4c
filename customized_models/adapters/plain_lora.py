"""Adapters that are nothing but pairs of low-rank factors, which servers apply beside a base.

llama.cpp, vLLM and SGLang add `scaling * B @ A` to matrices of the base, and know nothing else of
what PEFT can train. Some of the rest they ignore without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedAdapterError, shown
from .peft_types import PLAIN_STARTS, adapter_type

_EXPRESSED = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules",
        "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
        "lora_dropout", "peft_type", "peft_version", "r", "rank_pattern", "revision",
        "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip
"""Options that say which matrices have factors, and what their product is multiplied by."""

_HARMLESS = frozenset(
    {
        "ensure_weight_tying", "eva_config", "init_lora_weights", "init_weights", "megatron_core",
        "qalora_group_size", "runtime_config",
    }
)  # fmt: skip
"""Options that only matter while the adapter is trained, or together with another that is not."""

_EXTRA = {
    "bias": "it changes biases",
    "lora_bias": "it changes biases",
    "modules_to_save": "it replaces whole modules",
    "target_parameters": "it changes stacked parameters, such as those of experts",
    "trainable_token_indices": "it changes rows of the embedding",
    "use_dora": "DoRA scales the sum of the base's weight and the change",
}
_WAY_OUT = "Merge it, with Merger(registry).save, and deploy the complete model"


def refuse_unless_plain(config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than pairs of factors, by what its configuration says.

    Args:
        config: The JSON object of an `adapter_config.json` that `Adapter.open` accepts.

    Raises:
        UnsupportedAdapterError: Naming the option and the reason.
    """
    kind = adapter_type(config)
    if not kind.low_rank_factors:
        raise UnsupportedAdapterError(
            f"an adapter of type {kind.name} is not applied beside a base: only LoRA is. {_WAY_OUT}"
        )
    for key, value in config.items():
        if not value or key in _EXPRESSED | _HARMLESS or (key == "bias" and value == "none"):
            continue
        reason = _EXTRA.get(key) or kind.refused.get(key) or "it is not known what it changes"
        raise UnsupportedAdapterError(
            f"the adapter has {shown(key)} set, which is not applied beside a base: {reason}. "
            f"{_WAY_OUT}"
        )
    start = config.get("init_lora_weights")
    if not any(start is known or start == known for known in PLAIN_STARTS):
        raise UnsupportedAdapterError(
            f"init_lora_weights {shown(start)} replaces the base's weights when it starts, so the "
            f"factors do not go with the base as it is. {_WAY_OUT}"
        )


def largest_rank(config: Mapping[str, Any]) -> int:
    """The rank for which a server must have room."""
    return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)
