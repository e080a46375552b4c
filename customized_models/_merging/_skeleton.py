"""The base as transformers would load it, on the meta device: all but the memory of its weights.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import field, frozen
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .._adapters import PREFIX, Adapter
from .._checkpoints import INDEX, Checkpoint, TensorInfo, json_object
from .._errors import (
    BaseModelMismatch,
    CustomizedModelsError,
    MalformedError,
    UnsupportedAdapterError,
    UnsupportedArchitectureError,
    shown,
)
from ._versions import private

_MERGEABLE = ("F16", "BF16", "F32")


@frozen
class Skeleton:
    """A model without values and where its parameters come from.

    `dtype`: that of all parameters. `shapes`: theirs, by name. `names`: the checkpoint's name of
    each parameter that is one tensor of it, unconverted. `converted`: parameters that transformers
    computes from tensors of other shapes. `tied`: the output layer's weight, and the embedding's
    that it is; other parameters that share their weights are in `shared`. `vocabulary`: the number
    of rows that both have, if the adapter came with a resized vocabulary.
    """

    model: PreTrainedModel = field(repr=False)
    base: Checkpoint = field(repr=False)
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    converted: frozenset[str] = field(repr=False)
    tied: Mapping[str, str]
    shared: frozenset[str] = field(repr=False)
    embeddings: frozenset[str] = field(repr=False)
    vocabulary: int | None = None

    def tensor(self, parameter: str) -> TensorInfo:
        """The checkpoint's tensor that `parameter` is loaded from.

        Raises:
            UnsupportedAdapterError: it is one of several that are tied, or quantized.
            UnsupportedArchitectureError: transformers computes it from several tensors.
            BaseModelMismatch: the base's files lack it, or have another shape.
        """
        parameter = self.tied.get(parameter, parameter)
        if parameter in self.shared:
            raise UnsupportedAdapterError(
                f"the adapter changes {shown(parameter)}, which the base model ties to another "
                f"tensor: PEFT would change both, which is not what was trained"
            )
        if parameter in self.converted:
            raise UnsupportedArchitectureError(
                f"transformers converts {shown(parameter)} while it loads the base; merging into "
                f"converted tensors is not supported yet"
            )
        if parameter not in self.names:
            raise BaseModelMismatch(f"the base model's files lack {shown(parameter)}")
        info = self.base.infos[self.names[parameter]]
        resized = self.vocabulary is not None and parameter in self.embeddings
        if info.shape != self.shapes[parameter] and not resized:
            raise BaseModelMismatch(
                f"{shown(info.name)} has the shape {info.shape} in the base's files and "
                f"{self.shapes[parameter]} by its config.json"
            )
        if info.dtype not in _MERGEABLE:
            raise UnsupportedAdapterError(
                f"{shown(info.name)} is quantized to {info.dtype}; use the model it was made from"
            )
        return info

    def read(self, parameter: str) -> torch.Tensor:
        """A fresh copy of the parameter's values, as transformers would load them.

        Raises:
            UnsupportedAdapterError, UnsupportedArchitectureError, BaseModelMismatch: as `tensor`.
        """
        return self.base.read(self.tensor(parameter).name).to(self.dtype)


def build_skeleton(base: Checkpoint, adapter: Adapter) -> Skeleton:
    """The model class, dtype and names that `from_pretrained(base, dtype="auto")` comes to.

    If `adapter` comes with embeddings of another number of rows, the model has those.

    Raises:
        UnsupportedArchitectureError: transformers has no such causal language model, or keeps
            some of its weights in another dtype than the rest.
    """
    try:
        config = AutoConfig.from_pretrained(
            base.directory, local_files_only=True, trust_remote_code=False
        )
        dtype = _dtype(config, base)
        model = _empty_model(config, dtype)
        vocabulary = _resized(adapter, model)
        if vocabulary is not None:
            config.vocab_size = vocabulary
            model = _empty_model(config, dtype)
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
    tied, shared = _ties(model, names)
    return Skeleton(
        model=model.eval(),  # type: ignore[no-untyped-call]
        base=base,
        dtype=dtype,
        shapes={name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)},
        names=names,
        converted=converted,
        tied=tied,
        shared=shared,
        embeddings=frozenset(_embeddings(model)),
        vocabulary=vocabulary,
    )


def _empty_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return AutoModelForCausalLM.from_config(  # type: ignore[no-any-return,no-untyped-call]
            config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
        )


def _embeddings(model: PreTrainedModel) -> list[str]:
    """Names of the weights of the output layer and the embedding, in this order."""
    ends: list[Any] = [
        model.get_output_embeddings(),  # type: ignore[no-untyped-call]
        model.get_input_embeddings(),
    ]
    paths = {id(module): path for path, module in model.named_modules()}
    return [f"{paths[id(module)]}.weight" for module in ends if id(module) in paths]


def _ties(
    model: PreTrainedModel, names: Mapping[str, str]
) -> tuple[dict[str, str], frozenset[str]]:
    """The output layer tied to the embedding, and all that is tied in another way."""
    ties = dict(model.all_tied_weights_keys or {})
    ends = _embeddings(model)
    plain = len(ends) == 2 and ties == dict([ends]) and ends[0] not in names
    if plain and getattr(model.config, "tie_word_embeddings", False):
        return ties, frozenset()
    return {}, frozenset(ties) | frozenset(ties.values())


def _resized(adapter: Adapter, model: PreTrainedModel) -> int | None:
    """How many rows the adapter's own embeddings have, if not as many as the model's."""
    rows = set()
    for parameter in _embeddings(model):
        count, size = model.get_parameter(parameter).shape
        for name, info in adapter.tensors.items():
            if base_parameter(name) == parameter and info.shape[1:] == (size,):
                rows |= {info.shape[0]} - {count}
    if len(rows) > 1:
        raise MalformedError(f"the adapter's embeddings have {sorted(rows)} rows")
    return next(iter(rows), None)


def base_parameter(name: str) -> str:
    """The base's parameter that a tensor of an adapter is, if it is one."""
    path = name.removeprefix(PREFIX)
    for inside in (".base_layer.", ".token_adapter.", ".original_module."):
        path = path.replace(inside, ".")
    return path.replace(".base_layer.", ".")


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
