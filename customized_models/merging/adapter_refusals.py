"""Adapters that cannot be merged exactly, refused by what their configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..adapters.peft_types import BASE_DEPENDENT_STARTS, PLAIN_STARTS, adapter_type
from ..errors import UnsupportedAdapterError, shown

_TASKS = (
    None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
)  # fmt: skip


def refuse_adapter(config: Mapping[str, Any]) -> None:
    """Refuse a PEFT configuration unless every option that is set is known to be merged exactly.

    Args:
        config: The JSON object of an `adapter_config.json` that `Adapter.open` accepts.

    Raises:
        UnsupportedAdapterError: Naming the option and the reason.
    """
    kind = adapter_type(config)
    if kind.unmergeable:
        raise UnsupportedAdapterError(
            f"adapters of type {kind.name} cannot be merged: {kind.unmergeable}"
        )
    if config.get("task_type") not in _TASKS:
        raise UnsupportedAdapterError(
            f"task_type {shown(config['task_type'])} is unknown; the known ones are "
            f"{', '.join(filter(None, _TASKS))}"
        )
    for key, value in config.items():
        if value and (key in kind.refused or key not in kind.supported_options):
            unknown = f"this version does not know it as an option of {kind.method}"
            raise UnsupportedAdapterError(
                f"the adapter has {shown(key)} set: {kind.refused.get(key, unknown)}"
            )
    if "init_lora_weights" in kind.supported_options:
        _refuse_start(config.get("init_lora_weights"))
    bias = config.get("bias") or "none"
    if bias not in ("none", "all") and not str(bias).endswith("_only"):
        raise UnsupportedAdapterError(
            f"the adapter has bias set to {shown(bias)}, which is unknown"
        )


def _refuse_start(start: object) -> None:
    if not any(start is known or start == known for known in PLAIN_STARTS + BASE_DEPENDENT_STARTS):
        random = str(start).startswith("pissa_niter")
        why = "starts from a random approximation" if random else "replaces the base's weights"
        raise UnsupportedAdapterError(
            f"init_lora_weights {shown(start)} {why} when it starts; convert the adapter to plain "
            f"LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
