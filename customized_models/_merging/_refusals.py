"""What cannot be merged exactly, by the name it has in a configuration, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._checkpoints import json_object
from .._errors import MalformedError, UnsupportedAdapterError, shown

_TYPES = ("LORA",)
_TASKS = (None, "CAUSAL_LM")
_INITIALISATIONS = (None, True, False, "gaussian", "eva")  # none of them changes the base

_READ = frozenset(
    {
        "peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
        "use_rslora", "use_dora", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "modules_to_save", "init_lora_weights",
    }
)  # fmt: skip
"""Keys that say how the weights are merged: PEFT acts on them, and so the result has them in."""

_INERT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
        "fan_in_fan_out", "inference_mode", "lora_dropout", "megatron_core", "peft_version",
        "qalora_group_size", "revision", "runtime_config",
    }
)  # fmt: skip
"""Keys that only matter while training, or only to kinds of layers that are refused."""

_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only, so no weights are it",
    "arrow_config": "a router chooses among adapters for every token, so no weights are it",
    "bias": "trained biases come with the adapter as whole tensors; not supported yet",
    "corda_config": "CorDA replaces the base's weights when it starts; convert it to plain LoRA",
    "kasa_config": "KaSA replaces the base's weights when it starts; not supported yet",
    "layer_replication": "PEFT merges replicated layers into one another, which is wrong",
    "loftq_config": "LoftQ replaces the base's weights when it starts; convert it to plain LoRA",
    "lora_bias": "a LoRA with biases is not supported yet",
    "lora_ga_config": "LoRA-GA replaces the base's weights when it starts; convert it",
    "megatron_config": "Megatron's layers are not those of the base's files",
    "monteclora_config": "MonteCLoRA is not supported yet",
    "target_parameters": "LoRA on bare parameters, such as fused experts, is not supported yet",
    "trainable_token_indices": "trained tokens are not supported yet",
    "use_bdlora": "block-diagonal LoRA is not supported yet",
    "use_qalora": "QALoRA has no exact merge: PEFT refuses it",
    "velora_config": "VeLoRA is not supported yet",
}
_OFF = {"bias": "none"}

_REFUSED_OF_BASE = {
    "quantization_config": "the base model is quantized, and merging would round it a second time; "
    "use the model it was quantized from",
    "compression_config": "the base model is compressed; use the model it was made from",
    "transformers_weights": "it loads weights from files of other names",
}


def refuse_adapter(config: Mapping[str, Any]) -> None:
    """Refuse a PEFT configuration unless every switch that is on is known to be merged exactly.

    Raises:
        UnsupportedAdapterError: naming the key and the reason.
    """
    if config["peft_type"] not in _TYPES:
        raise UnsupportedAdapterError(
            f"adapters of type {config['peft_type']} are not supported yet, only LORA"
        )
    if config.get("task_type") not in _TASKS:
        raise UnsupportedAdapterError(
            f"task_type {shown(config['task_type'])} has a head of its own; only CAUSAL_LM is "
            f"supported"
        )
    start = config.get("init_lora_weights")
    if not any(start is known or start == known for known in _INITIALISATIONS):
        raise UnsupportedAdapterError(
            f"init_lora_weights {shown(start)} replaces the base's weights when it starts; convert "
            f"the adapter to plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in config.items():
        if key in _READ or key in _INERT or not value or value == _OFF.get(key):
            continue
        reason = _REFUSED.get(key, "this version does not know what it does to the weights")
        raise UnsupportedAdapterError(f"the adapter has {shown(key)} set: {reason}")


def refuse_base(directory: Path) -> None:
    """Refuse a base whose tensors are not what the model computes with.

    Raises:
        UnsupportedAdapterError: naming the key of its `config.json` and the reason.
    """
    config = json_object(directory / "config.json")
    for key, reason in _REFUSED_OF_BASE.items():
        if config.get(key):
            raise UnsupportedAdapterError(f"the base's config.json has {key}: {reason}")
    if not isinstance(config.get("model_type"), str):
        raise MalformedError("the base's config.json has no model_type")
