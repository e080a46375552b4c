"""The base as transformers would load it, on the meta device: all but the memory of its weights.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import field, frozen
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .._checkpoints import INDEX, Checkpoint, json_object
from .._errors import CustomizedModelsError, UnsupportedArchitectureError, shown
from ._versions import private


@frozen
class Skeleton:
    """A model without values and where its parameters come from.

    `names`: the checkpoint's name of each parameter that is one tensor of it, unconverted.
    `converted`: parameters that transformers computes from tensors of other shapes. `tied`:
    parameters that share their weights with another one.
    """

    model: PreTrainedModel = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    converted: frozenset[str] = field(repr=False)
    tied: frozenset[str]


def build_skeleton(base: Checkpoint) -> Skeleton:
    """The model class, dtype and names that `from_pretrained(base, dtype="auto")` comes to.

    Raises:
        UnsupportedArchitectureError: transformers has no such causal language model, or keeps
            some of its weights in another dtype than the rest.
    """
    try:
        config = AutoConfig.from_pretrained(
            base.directory, local_files_only=True, trust_remote_code=False
        )
        dtype = _dtype(config, base)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
            )
    except CustomizedModelsError:
        raise
    except Exception as error:  # its classes raise of all kinds at a config that they do not like
        raise UnsupportedArchitectureError(
            f"transformers builds no causal language model from the base's config.json: "
            f"{shown(error, 500)}"
        ) from error
    if model._get_dtype_plan(dtype):
        raise UnsupportedArchitectureError(
            f"transformers loads parts of a {type(model).__name__} in another dtype than the rest; "
            f"merging into one is not supported yet"
        )
    names, converted = _names(model, base)
    ties = model.all_tied_weights_keys or {}
    return Skeleton(model.eval(), names, converted, frozenset(ties) | frozenset(ties.values()))


def _dtype(config: Any, base: Checkpoint) -> torch.dtype:
    get_dtype = private("transformers.modeling_utils", "_get_dtype")
    files = [str(base.directory / file) for file in base.shards]
    sharded = None
    if (base.directory / INDEX).is_file() and len(base.shards) > 1:
        sharded = json_object(base.directory / INDEX).get("metadata")
    dtype: torch.dtype = get_dtype("auto", files, config, sharded, None, True)[1]
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"its dtype {dtype} is not float16, bfloat16 or float32")
    return dtype


def _names(model: PreTrainedModel, base: Checkpoint) -> tuple[dict[str, str], frozenset[str]]:
    """Which tensor of the checkpoint each parameter is, as transformers' loader decides it."""
    rename = private("transformers.core_model_loading", "rename_source_key")
    mapping = private("transformers.conversion_mapping", "get_model_conversion_mapping")(model)
    converter = private("transformers.core_model_loading", "WeightConverter")
    converters = [entry for entry in mapping if isinstance(entry, converter)]
    renaming = private("transformers.core_model_loading", "WeightRenaming")
    renamings = [entry for entry in mapping if isinstance(entry, renaming)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    parameters, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, str] = {}
    converted: set[str] = set()
    for name in base.infos:
        parameter, pattern = rename(name, renamings, converters, prefix, parameters)
        if parameter not in parameters and name in parameters:
            parameter, pattern = rename(name, [], [], prefix, parameters)
        if pattern is not None:
            first, *_ = targets = by_pattern[pattern].target_patterns
            converted.update(parameter.replace(first, target) for target in targets)
        elif parameter in names:  # which of the two is loaded depends on the order
            converted.add(parameter)
        elif parameter in parameters:
            names[parameter] = name
    return {p: name for p, name in names.items() if p not in converted}, frozenset(converted)
