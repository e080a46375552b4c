"""The base as transformers would load it, on the meta device: all but the memory of its weights.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from attrs import field, frozen
from transformers import AutoConfig, PreTrainedModel

from ..adapters.intake import PREFIX, Adapter
from ..errors import (
    BaseModelMismatch,
    CustomizedModelsError,
    MalformedError,
    UnsupportedArchitectureError,
    UnsupportedBaseError,
    shown,
)
from ..files.reading import json_object
from ..files.safetensors import FLOATS, INDEX, Checkpoint
from .base_formats import HINT
from .conversion import Loading, Unit
from .private_apis import private
from .quantized_bases import dequantized_units, take_quantizer, treatment_of

_CLASSES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    "SEQ_CLS": ("AutoModelForSequenceClassification",),
    "TOKEN_CLS": ("AutoModelForTokenClassification",),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering",),
    "FEATURE_EXTRACTION": ("AutoModel",),
}
"""By PEFT's task type, the classes that may load the base; the first that knows it does, unless the
base's configuration names the class of another."""

_HEADED = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@frozen
class Skeleton:
    """A model without values and where its parameters come from.

    `dtypes`, `shapes`: of all parameters and saved buffers, by name. `loading`: the checkpoint's
    tensors that they are loaded from. `tied`: parameters that share the weights of another, which
    the files have. `head`: the output layer's weight, if it is that of the embedding and of nothing
    else. `embeddings`: both weights.
    `vocabulary`: the number of rows that they have, if the adapter came with a resized vocabulary.
    `quantized`: what is dequantized, and `treatment` what that makes of the base. `config`: values
    that the merged model's `config.json` has in place of the base's.
    """

    model: PreTrainedModel = field(repr=False)
    base: Checkpoint = field(repr=False)
    dtypes: Mapping[str, torch.dtype] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    loading: Loading = field(repr=False)
    tied: Mapping[str, str]
    head: str | None
    embeddings: frozenset[str] = field(repr=False)
    vocabulary: int | None
    quantized: tuple[Unit, ...] = field(repr=False)
    treatment: str
    config: Mapping[str, Any]

    def unit(self, parameter: str) -> Unit:
        """The checkpoint's tensors that `parameter` is loaded from.

        Raises:
            UnsupportedBaseError: it is quantized.
            UnsupportedArchitectureError: it is not known how transformers makes it of them.
            BaseModelMismatch: the base's files lack it, or have another shape.
        """
        parameter = self.tied.get(parameter, parameter)
        unit = self.loading.units.get(parameter)
        if unit is None:
            raise BaseModelMismatch(f"the base model's files lack {shown(parameter)}")
        if unit.flaw:
            raise UnsupportedArchitectureError(
                f"the adapter changes {shown(parameter)}, but {unit.flaw} in the base's files"
            )
        for info in (self.base.infos[name] for name in unit.tensors):
            resized = self.vocabulary is not None and parameter in self.embeddings
            if unit.patterns is None and info.shape != self.shapes[parameter] and not resized:
                raise BaseModelMismatch(
                    f"{shown(info.name)} has the shape {info.shape} in the base's files and "
                    f"{self.shapes[parameter]} by its config.json"
                )
            if info.dtype not in FLOATS and not unit.quantized:
                raise UnsupportedBaseError(
                    f"{shown(info.name)} is quantized to {info.dtype}; {HINT}"
                )
        return unit

    def tensors(self, parameter: str) -> list[str]:
        """The checkpoint's tensors that are `parameter` or tied to it, each as a whole."""
        alike = [parameter, *(name for name, of in self.tied.items() if of == parameter)]
        units = (self.loading.units.get(name) for name in alike)
        return [unit.tensors[0] for unit in units if unit and unit.patterns is None]

    def read(self, parameter: str) -> torch.Tensor:
        """A fresh copy of the parameter's values, as transformers would load them.

        Raises:
            UnsupportedBaseError, UnsupportedArchitectureError, BaseModelMismatch: as `unit`.
        """
        return self.loading.read(self.unit(parameter))[self.tied.get(parameter, parameter)]


def build_skeleton(base: Checkpoint, adapter: Adapter) -> Skeleton:
    """The model class, dtypes and names that `from_pretrained(base, dtype="auto")` comes to.

    If `adapter` comes with embeddings of another number of rows, or with a head of other labels,
    the model has those.

    Raises:
        UnsupportedArchitectureError: transformers has no class for the base and the adapter's task.
    """
    try:
        config = AutoConfig.from_pretrained(
            base.directory, local_files_only=True, trust_remote_code=False
        )
        quantizer = take_quantizer(config)
        dtype = _dtype(config, base, quantizer)
        build = _model_class(config, adapter)
        vocabulary, changes = _adjust(config, adapter, _empty_model(build, config, dtype))
        model, untouched = (_empty_model(build, config, dtype) for _ in range(2))
    except CustomizedModelsError:
        raise
    except Exception as error:  # its classes raise of all kinds at a config that they do not like
        raise UnsupportedArchitectureError(
            f"transformers builds no model for the adapter's task from the base's config.json: "
            f"{shown(error, 500)}"
        ) from error
    dtypes, _ = _dtypes(model, dtype), _dtypes(untouched, dtype)
    loading = Loading(untouched, base, dtypes, quantizer)  # PEFT alters the other one
    tied = _ties(model, loading)
    return Skeleton(
        model=model.eval(),  # type: ignore[no-untyped-call]
        base=base,
        dtypes=dtypes,
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        loading=loading,
        tied=tied,
        head=_head(model, loading, tied),
        embeddings=frozenset(_embeddings(model)),
        vocabulary=vocabulary,
        quantized=dequantized_units(base, loading) if quantizer else (),
        treatment=treatment_of(base),
        config=changes,
    )


def _adjust(
    config: Any, adapter: Adapter, model: PreTrainedModel
) -> tuple[int | None, dict[str, Any]]:
    """Have `config` state the adapter's vocabulary and labels where `model` has others.

    Returns the vocabulary, if it is another, and what changes in `config.json`.
    """
    changes: dict[str, Any] = {}
    vocabulary, labels = _resized(adapter, model), _labels(adapter, model)
    if vocabulary is not None:
        config.get_text_config().vocab_size = changes["vocab_size"] = vocabulary
    if labels is not None:
        config.num_labels = labels
        changes |= {"id2label": config.id2label, "label2id": config.label2id}
    if _is_headed(model) and config.architectures != [type(model).__name__]:
        changes["architectures"] = [type(model).__name__]
    return vocabulary, changes


def _is_headed(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith(_HEADED)


def _model_class(config: Any, adapter: Adapter) -> Any:
    """The transformers class with a `from_config` that makes the model the adapter was made on."""
    task = adapter.config.get("task_type")
    names = _CLASSES[task] if task else [name for names in _CLASSES.values() for name in names]
    made_on = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    wanted = [made_on, *(config.architectures or ())] if task is None else config.architectures
    classes = {name: getattr(transformers, name) for name in names}
    known = {n: c._model_mapping[type(config)] for n, c in classes.items() if _knows(c, config)}
    for architecture in wanted or ():
        for name, model_class in known.items():
            if model_class.__name__ == architecture:
                return classes[name]
    if not known:
        raise ValueError(f"no {' or '.join(names)} for a {type(config).__name__}")
    return classes[next(iter(known))]


def _knows(auto_class: Any, config: Any) -> bool:
    return type(config) in auto_class._model_mapping


def _empty_model(build: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build.from_config(  # type: ignore[no-any-return]
            config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
        )


def _dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What each parameter has when it is loaded; the model's are changed to it.

    Some architectures keep some of their layers in float32.
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


def _embeddings(model: PreTrainedModel) -> list[str]:
    """Names of the weights of the output layer and the embedding, in this order."""
    ends: list[Any] = [
        model.get_output_embeddings(),  # type: ignore[no-untyped-call]
        model.get_input_embeddings(),
    ]
    paths = {id(module): path for path, module in model.named_modules()}
    return [f"{paths[id(module)]}.weight" for module in ends if id(module) in paths]


def _ties(model: PreTrainedModel, loading: Loading) -> dict[str, str]:
    """What is tied, by the rules of `from_pretrained`."""
    groups: dict[str, list[str]] = {}
    for one, other in (model.all_tied_weights_keys or {}).items():
        if not _differ(one, other, loading):
            groups.setdefault(other, [other]).append(one)
    tied: dict[str, str] = {}
    for first, group in groups.items():
        holder = next((name for name in group if name in loading.units), first)
        tied |= {name: holder for name in group if name != holder}
    return tied


def _head(model: PreTrainedModel, loading: Loading, tied: Mapping[str, str]) -> str | None:
    ends = _embeddings(model)
    plain = len(ends) == 2 and tied == dict([ends]) and ends[0] not in loading.units
    configs = (model.config, model.config.get_text_config())
    flag = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    return ends[0] if plain and flag else None


def _differ(one: str, other: str, loading: Loading) -> bool:
    """Whether the files have both: then transformers ties them only if they are alike."""
    if not loading.units.keys() >= {one, other}:
        return False
    first, second = (loading.read(loading.units[name])[name] for name in (one, other))
    return not torch.equal(first, second)


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


def _labels(adapter: Adapter, model: PreTrainedModel) -> int | None:
    """How many labels the adapter's own head has, if not as many as the model's."""
    if not _is_headed(model):
        return None
    count, shapes = model.config.num_labels, dict(model.named_parameters())
    found = set()
    for name, info in adapter.tensors.items():
        of = shapes.get(base_parameter(name))
        if of is not None and of.shape[:1] == (count,) and of.shape[1:] == info.shape[1:]:
            found |= {info.shape[0]} - {count}
    if len(found) > 1:
        raise MalformedError(f"the adapter's head has {sorted(found)} labels")
    return next(iter(found), None)


def base_parameter(name: str) -> str:
    """The base's parameter that a tensor of an adapter is, if it is one."""
    path = name.removeprefix(PREFIX)
    for inside in (".base_layer.", ".token_adapter.", ".original_module."):
        path = path.replace(inside, ".")
    return path.replace(".base_layer.", ".")


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
