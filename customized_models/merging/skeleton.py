"""The base model as transformers would load it, on the meta device: everything but its weights.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import field, frozen
from transformers import PreTrainedModel

from ..adapters.intake import Adapter
from ..errors import (
    BaseModelMismatch,
    CustomizedModelsError,
    UnsupportedArchitectureError,
    UnsupportedBaseError,
    shown,
)
from ..files.reading import json_object
from ..files.safetensors import FLOATS, INDEX, Checkpoint
from .adapter_sizes import embedding_weights, has_new_head, label_count, resized_vocabulary
from .base_formats import HINT
from .conversion import Conversion, Conversions
from .model_choice import choose_model, load_config, text_config
from .private_apis import private
from .quantized_bases import describe_base, quantized_conversions, take_quantizer


@frozen
class Skeleton:
    """A model without values, and where its parameters come from.

    Attributes:
        model: On the meta device.
        base: The checkpoint that it is loaded from.
        dtypes: Of all parameters and saved buffers, by name.
        shapes: Likewise.
        conversions: Which of the checkpoint's tensors each parameter is loaded from.
        tied: Parameters that share the weights of another one, which the files have.
        head: The output layer's weight, if it shares that of the embedding and of nothing else.
        embeddings: The weights of the output layer and of the embedding.
        vocabulary: How many rows those have, if the adapter came with a resized vocabulary.
        quantized: Conversions that dequantize.
        base_description: What a recipe says about how the base was read.
        config: Values of the merged model's `config.json` that differ from the base's.
    """

    model: PreTrainedModel = field(repr=False)
    base: Checkpoint = field(repr=False)
    dtypes: Mapping[str, torch.dtype] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    conversions: Conversions = field(repr=False)
    tied: Mapping[str, str]
    head: str | None
    embeddings: frozenset[str] = field(repr=False)
    vocabulary: int | None
    quantized: tuple[Conversion, ...] = field(repr=False)
    base_description: str
    config: Mapping[str, Any]

    def conversion(self, parameter: str) -> Conversion:
        """The checkpoint's tensors that `parameter`, or the one it is tied to, is loaded from.

        Raises:
            UnsupportedBaseError: It is quantized.
            UnsupportedArchitectureError: It is not known how transformers makes it of them.
            BaseModelMismatch: The base's files lack it, or have another shape.
        """
        parameter = self.tied.get(parameter, parameter)
        found = self.conversions.by_parameter.get(parameter)
        if found is None:
            raise BaseModelMismatch(f"the base model's files lack {shown(parameter)}")
        if found.unsupported_reason:
            raise UnsupportedArchitectureError(
                f"the adapter changes {shown(parameter)}, but {found.unsupported_reason} in the "
                f"base's files"
            )
        for info in (self.base.infos[name] for name in found.tensors):
            resized = self.vocabulary is not None and parameter in self.embeddings
            if found.patterns is None and info.shape != self.shapes[parameter] and not resized:
                raise BaseModelMismatch(
                    f"{shown(info.name)} has the shape {info.shape} in the base's files and "
                    f"{self.shapes[parameter]} by its config.json"
                )
            if info.dtype not in FLOATS and not found.quantized:
                raise UnsupportedBaseError(
                    f"{shown(info.name)} is quantized to {info.dtype}; {HINT}"
                )
        return found

    def tensors_of(self, parameter: str) -> list[str]:
        """The checkpoint's tensors that hold `parameter` as it is, or one that is tied to it."""
        alike = [parameter, *(name for name, of in self.tied.items() if of == parameter)]
        every = (self.conversions.by_parameter.get(name) for name in alike)
        return [found.tensors[0] for found in every if found and found.patterns is None]

    def read(self, parameter: str) -> torch.Tensor:
        """A fresh copy of the parameter's values, as transformers would load them.

        Raises:
            UnsupportedBaseError, UnsupportedArchitectureError, BaseModelMismatch: As
                `conversion`.
        """
        values = self.conversions.load(self.conversion(parameter))
        return values[self.tied.get(parameter, parameter)]


def build_skeleton(
    base: Checkpoint, adapter: Adapter, *, trust_remote_code: bool = False
) -> Skeleton:
    """The model that `from_pretrained(base, dtype="auto")` gives, without values.

    If `adapter` comes with embeddings of another number of rows, or with a head for other labels,
    the model has those.

    Raises:
        UnsupportedArchitectureError: transformers has no class for the base and the adapter's task.
    """
    trust = trust_remote_code
    try:
        config = load_config(base.directory, trust_remote_code=trust)
        quantizer = take_quantizer(config)
        dtype = _dtype(config, base, quantizer)
        build, empty = choose_model(config, adapter, dtype, base.directory, trust_remote_code=trust)
        vocabulary, changes = _adjust(config, adapter, empty)
        model = build(config, dtype) if changes else empty
        untouched = build(config, dtype)
    except CustomizedModelsError:
        raise
    except Exception as error:  # its classes raise of all kinds at a config that they do not like
        raise UnsupportedArchitectureError(
            f"transformers builds no model for the adapter's task from the base's config.json: "
            f"{shown(error, 500)}"
        ) from error
    dtypes, _ = _dtypes(model, dtype), _dtypes(untouched, dtype)
    conversions = Conversions(untouched, base, dtypes, quantizer)  # PEFT alters the other one
    tied = _ties(model, conversions)
    return Skeleton(
        model=model.eval(),  # type: ignore[no-untyped-call]
        base=base,
        dtypes=dtypes,
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        conversions=conversions,
        tied=tied,
        head=_head(model, conversions, tied),
        embeddings=frozenset(embedding_weights(model)),
        vocabulary=vocabulary,
        quantized=quantized_conversions(base, conversions) if quantizer else (),
        base_description=describe_base(base),
        config=changes,
    )


def _adjust(
    config: Any, adapter: Adapter, model: PreTrainedModel
) -> tuple[int | None, dict[str, Any]]:
    """Set the adapter's vocabulary and labels in `config` where they differ from `model`'s.

    Returns:
        The vocabulary, if it differs, and what changes in `config.json`.
    """
    changes: dict[str, Any] = {}
    vocabulary, labels = resized_vocabulary(adapter, model), label_count(adapter, model)
    if vocabulary is not None:
        text_config(config).vocab_size = changes["vocab_size"] = vocabulary
    if labels is not None:
        config.num_labels = labels
        changes |= {"id2label": config.id2label, "label2id": config.label2id}
    if has_new_head(model) and config.architectures != [type(model).__name__]:
        changes["architectures"] = [type(model).__name__]
    return vocabulary, changes


def _dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each parameter once it is loaded; those of `model` are changed to it.

    Some architectures keep some of their layers in float32.

    Source: `transformers/modeling_utils.py`, `PreTrainedModel._get_dtype_plan`.
    """
    patterns = model._get_dtype_plan(dtype)
    glob = private("transformers.core_model_loading", "build_glob_alternation")
    kept, of_group, _ = glob(list(patterns)) if patterns else (None, {}, {})
    dtypes: dict[str, torch.dtype] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        match = kept.search(name) if kept else None
        dtypes[name] = patterns[of_group[match.lastgroup]] if match else tensor.dtype
        if tensor.dtype != dtypes[name]:
            tensor.data = tensor.data.to(dtypes[name])
    return dtypes


def _ties(model: PreTrainedModel, conversions: Conversions) -> dict[str, str]:
    """The parameter that each tied one is tied to, by the rules of `from_pretrained`.

    Source: `transformers/modeling_utils.py`, `PreTrainedModel.tie_weights`.
    """
    groups: dict[str, list[str]] = {}
    for one, other in (model.all_tied_weights_keys or {}).items():
        if not _differ(one, other, conversions):
            groups.setdefault(other, [other]).append(one)
    tied: dict[str, str] = {}
    for first, group in groups.items():
        holder = next((name for name in group if name in conversions.by_parameter), first)
        tied |= {name: holder for name in group if name != holder}
    return tied


def _head(model: PreTrainedModel, conversions: Conversions, tied: Mapping[str, str]) -> str | None:
    ends = embedding_weights(model)
    stored = conversions.by_parameter
    plain = len(ends) == 2 and tied == dict([ends]) and ends[0] not in stored
    configs = (model.config, text_config(model.config))
    flag = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    return ends[0] if plain and flag else None


def _differ(one: str, other: str, conversions: Conversions) -> bool:
    """Whether the files have both, with different values: then transformers does not tie them."""
    stored = conversions.by_parameter
    if not stored.keys() >= {one, other}:
        return False
    first, second = (conversions.load(stored[name])[name] for name in (one, other))
    return not torch.equal(first, second)


def _dtype(config: Any, base: Checkpoint, quantizer: Any) -> torch.dtype:
    get_dtype = private("transformers.modeling_utils", "_get_dtype")
    files = [str(base.directory / file) for file in base.shards]
    sharded = None
    if (base.directory / INDEX).is_file() and len(base.shards) > 1:
        sharded = json_object(base.directory / INDEX).get("metadata")
    dtype: torch.dtype = get_dtype("auto", files, config, sharded, None, True, quantizer)[1]
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"its dtype {dtype} is not float16, bfloat16 or float32")
    return dtype
