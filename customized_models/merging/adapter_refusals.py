"""Adapters that cannot be merged exactly, refused by what their configuration says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..adapters.peft_types import (
    BASE_DEPENDENT_STARTS,
    KNOWN_PEFT,
    PLAIN_STARTS,
    adapter_type,
)
from ..errors import UnsupportedAdapterError, shown

_TASKS = (
    None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
)  # fmt: skip


def refuse_adapter(config: Mapping[str, Any]) -> None:
    """Refuse a PEFT configuration with an option set that is not known to be merged exactly.

    Keys that no PEFT up to the known one has are other tools': PEFT does not look at them.

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
    later = _saved_by_later_peft(config)
    for key, value in config.items():
        if value and key in kind.refused:
            raise UnsupportedAdapterError(f"the adapter has {shown(key)} set: {kind.refused[key]}")
        if value and later and key not in kind.supported_options:
            raise UnsupportedAdapterError(
                f"the adapter has {shown(key)} set, and was saved by PEFT {later}: this version "
                f"knows the options of {kind.method} up to PEFT {'.'.join(map(str, KNOWN_PEFT))}. "
                f"Take a later version of customized-models, or, if the option does not change "
                f"what the adapter does, remove it from adapter_config.json"
            )
    if "init_lora_weights" in kind.supported_options:
        _refuse_start(config.get("init_lora_weights"))
    bias = config.get("bias") or "none"
    if bias not in ("none", "all") and not str(bias).endswith("_only"):
        raise UnsupportedAdapterError(
            f"the adapter has bias set to {shown(bias)}, which is unknown"
        )


def _saved_by_later_peft(config: Mapping[str, Any]) -> str:
    """The version of PEFT that saved the adapter, if it may have options unknown here; else ""."""
    stated = config.get("peft_version")  # since 0.18
    if stated is None:
        return ""
    numbers = re.match(r"(\d{1,4})\.(\d{1,4})(?!\d)", str(stated), re.ASCII)
    known = numbers is not None and (int(numbers[1]), int(numbers[2])) <= KNOWN_PEFT
    return "" if known else shown(stated, 40)


def _refuse_start(start: object) -> None:
    if not any(start is known or start == known for known in PLAIN_STARTS + BASE_DEPENDENT_STARTS):
        random = str(start).startswith("pissa_niter")
        why = "starts from a random approximation" if random else "replaces the base's weights"
        raise UnsupportedAdapterError(
            f"init_lora_weights {shown(start)} {why} when it starts; convert the adapter to plain "
            f"LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
