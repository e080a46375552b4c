"""Which class of model an adapter was made on: the one whose modules its tensors name.

An adapter states a task, which may not be its model's, and the base the class that it was saved
from. Both are asked, and the names of the adapter's tensors decide.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from ..adapters.intake import Adapter
from ..adapters.tensor_names import PREFIX
from .private_apis import private

Build: TypeAlias = Callable[[Any, torch.dtype], PreTrainedModel]
"""Makes a model on the meta device, from a configuration and a dtype."""

_CLASSES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    "SEQ_CLS": ("AutoModelForSequenceClassification",),
    "TOKEN_CLS": ("AutoModelForTokenClassification",),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering",),
    "FEATURE_EXTRACTION": ("AutoModel",),
}
"""The transformers classes that may load the base, by PEFT's task type.

The first that knows the base's configuration does, unless that names another one's architecture."""

_OTHERS = (
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForCTC",
    "AutoModelForMaskedLM",
)
"""Those that no task type of PEFT stands for."""

_STEPS = 3  # that PEFT adds to the name of a module at most


def text_config(config: Any) -> Any:
    """The language model's part of a configuration; of several, as Musicgen has, the decoder's."""
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(decoder=True)


def load_config(directory: Path, *, trust_remote_code: bool) -> Any:
    """The base's configuration: transformers' own class of it, or else, if trusted, the base's."""
    load = partial(AutoConfig.from_pretrained, directory, local_files_only=True)
    try:
        return load(trust_remote_code=False)
    except ValueError:  # no class of its own
        if not trust_remote_code:
            raise
        return load(trust_remote_code=True)


def choose_model(
    config: Any, adapter: Adapter, dtype: torch.dtype, directory: Path, *, trust_remote_code: bool
) -> tuple[Build, PreTrainedModel]:
    """The way to make the model that the adapter was made on, and one that was made so.

    Args:
        config: The base's.
        adapter: The adapter.
        dtype: Of the model.
        directory: The base's.
        trust_remote_code: Whether code in the base's directory may be run.

    Raises:
        ValueError: There is no class for the configuration.
        Exception: Of any kind, out of the only class there is.
    """
    best: tuple[int, Build, PreTrainedModel] | None = None
    errors, tried = list[Exception](), set[object]()
    for key, build in _candidates(config, adapter, directory, trust_remote_code):
        if key in tried:
            continue
        tried.add(key)
        try:
            model = build(config, dtype)
        except Exception as error:  # model classes raise of all kinds at a config they do not like
            errors.append(error)
            continue
        strays = _count_strays(adapter, model)
        if best is None or strays < best[0]:
            best = strays, build, model
        if not strays:
            break
    if best is None:
        raise errors[0] if errors else ValueError(_no_class(config, adapter, trust_remote_code))
    return best[1:]


def _candidates(
    config: Any, adapter: Adapter, directory: Path, trusted: bool
) -> Iterator[tuple[object, Build]]:
    """Classes that may be the adapter's, the likeliest first, and how to make their models."""
    task = str(adapter.config.get("task_type") or "")
    stated = [*map(str, config.architectures or ())]
    if not task and (made_on := adapter.config.get("auto_mapping")):
        stated.insert(0, str(made_on.get("base_model_class")))
    every = {name: getattr(transformers, name) for names in _CLASSES.values() for name in names}
    every |= {name: getattr(transformers, name) for name in _OTHERS}
    known = {name: auto for name, auto in every.items() if type(config) in auto._model_mapping}
    of_task = [known[name] for name in _CLASSES.get(task, ()) if name in known]
    named = [auto for auto in of_task if {*stated} & {c.__name__ for c in _classes(auto, config)}]
    for auto in (*named, *of_task):
        yield _classes(auto, config), partial(_empty, auto.from_config)
    for name in stated:
        model_class: Any = getattr(transformers, name, None)
        if getattr(model_class, "config_class", None) is type(config):
            yield (model_class,), partial(_empty, model_class._from_config)
    for auto in known.values() if not task else ():
        yield _classes(auto, config), partial(_empty, auto.from_config)
    auto_map = getattr(config, "auto_map", None)
    for name, reference in auto_map.items() if trusted and isinstance(auto_map, dict) else ():
        if name.startswith("AutoModel"):
            yield reference, partial(_empty_of_own_code, reference, directory)


def _classes(auto: Any, config: Any) -> tuple[type, ...]:
    """The classes among which an Auto class chooses; it takes the architecture's, or the first."""
    found = auto._model_mapping[type(config)]
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def _empty(from_config: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.device("meta"), without_initialization():
        model: PreTrainedModel = from_config(config, dtype=dtype, attn_implementation="eager")
        return model


@contextmanager
def without_initialization() -> Iterator[None]:
    """Within the `with` block, layers are made without drawing numbers for their parameters.

    For layers without memory: it takes a third of the time of making them.
    """
    init: Any = torch.nn.init
    names = [name for name in vars(init) if name.endswith("_") and not name.startswith("_")]
    before = {name: getattr(init, name) for name in names}
    try:
        for name in names:
            setattr(init, name, lambda tensor, *arguments, **named: tensor)
        yield
    finally:
        for name, function in before.items():
            setattr(init, name, function)


def _empty_of_own_code(
    reference: str, directory: Path, config: Any, dtype: torch.dtype
) -> PreTrainedModel:
    load = private("transformers.dynamic_module_utils", "get_class_from_dynamic_module")
    model_class = load(reference, str(directory), local_files_only=True)
    return _empty(model_class._from_config, config, dtype)


def _no_class(config: Any, adapter: Adapter, trusted: bool) -> str:
    task = adapter.config.get("task_type") or "any task"
    own = getattr(config, "auto_map", None) and not trusted
    hint = "; add the base with trust_remote_code=True, so that its own code counts" if own else ""
    return f"no class for a {type(config).__name__} and {task}{hint}"


def _count_strays(adapter: Adapter, model: PreTrainedModel) -> int:
    """How many of the adapter's tensors name no module of the model."""
    modules = {path for path, _ in model.named_modules()}
    return sum(
        not _names_one(name.removeprefix(PREFIX), modules)
        for name in adapter.tensors
        if name.startswith(PREFIX)
    )


def _names_one(name: str, modules: Container[str]) -> bool:
    """Whether a module's name stands before what PEFT adds, such as `base_layer.lora_A.weight`."""
    for _ in range(_STEPS):
        name = name.rpartition(".")[0]
        if name and name in modules:
            return True
    return False
