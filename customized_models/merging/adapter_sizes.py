"""What an adapter's own tensors say about the model that it was trained on.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..adapters.intake import Adapter
from ..adapters.tensor_names import PREFIX
from ..errors import MalformedError

_HEADED = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForImageClassification",
    "ForAudioClassification",
)


def has_new_head(model: PreTrainedModel) -> bool:
    """Whether its head is usually drawn at random before the training."""
    return type(model).__name__.endswith(_HEADED)


def embedding_weights(model: PreTrainedModel) -> list[str]:
    """Names of the weights of the output layer and the embedding, in this order."""
    get_ends: list[Any] = [model.get_output_embeddings, model.get_input_embeddings]
    paths = {id(module): path for path, module in model.named_modules()}
    found = (paths.get(id(_module_or_none(get))) for get in get_ends)
    weights = [f"{path}.weight" for path in found if path is not None]
    known = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in weights if name in known and known[name].dim() == 2]


def _module_or_none(get: Any) -> Any:
    """What `get` returns; None for models of images and sounds, which have no such thing."""
    try:
        return get()
    except (NotImplementedError, AttributeError):
        return None


def resized_vocabulary(adapter: Adapter, model: PreTrainedModel) -> int | None:
    """How many rows the adapter's own embeddings have, if not as many as the model's."""
    rows = set()
    for parameter in embedding_weights(model):
        count, size = model.get_parameter(parameter).shape
        for name, info in adapter.tensors.items():
            if base_parameter(name) == parameter and info.shape[1:] == (size,):
                rows |= {info.shape[0]} - {count}
    if len(rows) > 1:
        raise MalformedError(f"the adapter's embeddings have {sorted(rows)} rows")
    return next(iter(rows), None)


def label_count(adapter: Adapter, model: PreTrainedModel) -> int | None:
    """How many labels the adapter's own head has, if not as many as the model's."""
    if not has_new_head(model):
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
    """The base's parameter that an adapter's tensor would replace, by the names PEFT gives."""
    path = name.removeprefix(PREFIX)
    for inside in (".base_layer.", ".token_adapter.", ".original_module."):
        path = path.replace(inside, ".")
    return path.replace(".base_layer.", ".")
