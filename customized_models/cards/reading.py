"""Reads model cards from a base model's files, and from those that a training saved.

The files are not trusted: they are parsed strictly and within limits, and nothing is unpickled or
downloaded.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve

from ..adapters.peft_types import NAME_SETS, adapter_type
from ..errors import MalformedError
from ..files.links import linked_file
from ..files.manifest import README
from ..files.model_directory import Role, carried_files, role_of, row_of
from ..files.reading import json_object, plain_text
from ..files.safetensors import INDEX, Checkpoint
from ..models import BaseModelCard, EvaluationSummary, ModelCard, TrainingConfiguration
from ..naming import is_hub_id
from .checkpoints import checkpoint_step, state_of_adapter
from .readme import MAX_README, readme_header, storable, storable_card
from .tool_settings import ToolSettings, tool_settings

TRAINER_ARGUMENTS = {
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "lr_scheduler_type",
    "warmup_steps", "warmup_ratio", "weight_decay", "optim", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "seed", "data_seed", "full_determinism", "bf16", "fp16",
    "tf32", "gradient_checkpointing", "label_smoothing_factor", "neftune_noise_alpha",
    "eval_strategy", "eval_steps", "save_strategy", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "torch_compile", "use_liger_kernel",
    "max_length", "packing", "completion_only_loss", "assistant_only_loss", "beta",
    "loss_type", "stage",
}  # fmt: skip
"""Arguments of transformers' Trainer, and of TRL's trainers, that affect the result."""

MAX_ENTRIES = 200
"""Of a setting in a card; AdaLoRA's ranks by module, for one, have many more."""

_VARIANTS = {"use_dora": "DoRA", "use_rslora": "rsLoRA", "use_qalora": "QALoRA"}
_NOT_METRICS = frozenset({"step", "epoch", "loss", "learning_rate", "grad_norm", "total_flos"})
_NOT_METRICS_ENDINGS = ("_runtime", "_per_second", "_flos", "_samples")
_RESULTS = ("train_results.json", "eval_results.json", "all_results.json")
_WORD = re.compile(r"[\w.+-]{1,64}", re.ASCII)


def read_base_card(directory: Path, checkpoint: Checkpoint) -> BaseModelCard:
    """The card of the base model in `directory`.

    The license is None unless the header of `README.md` is readable and states a single identifier.

    Raises:
        MalformedError: A configuration does not parse, or names neither architecture nor type.
    """
    config = json_object(directory / "config.json")
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    files = carried_files(directory, checkpoint.shards)
    generation = files.get("generation_config.json")
    sizes: Counter[str] = Counter()
    for info in checkpoint.infos.values():
        sizes[info.dtype] += math.prod(info.shape)
    content = {*checkpoint.shards, *files} | ({INDEX} if (directory / INDEX).is_file() else set())
    return BaseModelCard(
        architecture=_architecture(config),
        parameters=sizes.total(),
        dtype=max(sizes, key=lambda dtype: (sizes[dtype], dtype), default=""),
        size=sum((directory / name).stat().st_size for name in content),
        context_length=_whole((config, text), "max_position_embeddings", "n_positions"),
        vocabulary_size=_whole((config, text), "vocab_size"),
        license=_license(directory),
        generation=storable(json_object(generation)) if generation else {},
        chat_template=_has_chat_template(files),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    """The class that `config.json` names, or else the type of model, which transformers goes by."""
    stated = config.get("architectures")
    named = stated[0] if isinstance(stated, list) and stated else config.get("model_type")
    if not isinstance(named, str):
        raise MalformedError(
            "config.json names neither architectures nor a model_type; is this the directory of a "
            "model that transformers opens?"
        )
    return named


def _whole(configs: Iterable[Mapping[str, Any]], *keys: str) -> int | None:
    found = (config.get(key) for config in configs for key in keys)
    return next((value for value in found if type(value) is int and value > 0), None)


def _license(directory: Path) -> str | None:
    try:
        readme = linked_file(directory, README, trusted=True)
        stated = readme_header(plain_text(readme, MAX_README)).get("license")
    except MalformedError:
        return None
    return stated if isinstance(stated, str) and _WORD.fullmatch(stated) else None


def _has_chat_template(files: Mapping[str, Path]) -> bool:
    if any(role_of(name) is Role.CHAT_TEMPLATE for name in files):
        return True
    path = files.get("tokenizer_config.json")
    return path is not None and bool(json_object(path).get("chat_template"))


FULL = {"method": "full fine-tuning"}
"""The settings of a training that changed the model's own weights."""


def training_facts(directory: Path, adapter_config: Mapping[str, Any] | None) -> ModelCard:
    """The card that the files in a training's output directory give.

    These are `trainer_state.json`, here or in the last checkpoint, as far as it is of these weights
    (`checkpoints.state_of_adapter`); `train_results.json`, `eval_results.json` and
    `all_results.json`, of which later ones win; the settings of axolotl, LLaMA-Factory and
    ms-swift, here or beside the checkpoint; and the header of `README.md` for the datasets.

    Args:
        directory: The directory.
        adapter_config: The contents of its `adapter_config.json`; None for a full model.

    Raises:
        MalformedError: One of the JSON files does not parse.
        UnsafeFileError: One of them is a link or a pipe, or is too large.
    """
    directory = directory.resolve()
    state = state_of_adapter(directory, trainer_state)
    settings = _tool_settings(directory)
    evaluation = evaluation_summary(state)
    for name in _RESULTS:
        results = _log_file(directory, name)
        epochs = (
            evaluation.epochs
            if state or evaluation.epochs is not None
            else _finite(results.get("epoch"))
        )
        evaluation = evolve(
            evaluation, metrics={**evaluation.metrics, **metrics_of(results)}, epochs=epochs
        )
    lengths = {key: state[key] for key in ("max_steps", "num_train_epochs") if key in state}
    training = TrainingConfiguration(
        peft=FULL if adapter_config is None else peft_settings(adapter_config),
        arguments=training_arguments({**settings.arguments, **lengths}),
        datasets=_datasets(directory) or tuple(filter(_is_name, settings.datasets)),
    )
    return storable_card(ModelCard(training, evaluation))


def trainer_state(directory: Path) -> dict[str, Any]:
    """The contents of the `trainer_state.json` in a directory; empty if there is none.

    Raises:
        MalformedError: It does not parse.
        UnsafeFileError: It is a link or a pipe, or is too large.
    """
    return _log_file(directory.resolve(), "trainer_state.json")


def _tool_settings(directory: Path) -> ToolSettings:
    found = tool_settings(directory)
    if not found.tool and checkpoint_step(directory) is not None:
        return tool_settings(directory.parent)
    return found


def peft_settings(adapter_config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `adapter_config.json` that affect the result, and the method's name.

    Settings that are off, empty or unset are left out.

    >>> peft_settings({"peft_type": "LORA", "r": 8, "use_dora": True, "inference_mode": True})
    {'method': 'LoRA, DoRA', 'peft_type': 'LORA', 'r': 8, 'use_dora': True}
    """
    kind = adapter_type(adapter_config)
    variants = [name for key, name in _VARIANTS.items() if adapter_config.get(key) is True]
    settings: dict[str, Any] = {"method": ", ".join([kind.method, *variants])}
    for key in sorted(kind.card_options & adapter_config.keys()):
        value = adapter_config[key]
        if key in NAME_SETS and isinstance(value, list):
            value = sorted(map(str, value))
        if value not in (None, False, [], {}, ""):
            settings[key] = _brief(value)
    return settings


def _brief(value: Any) -> Any:
    """A setting, or how much of it there is if that would fill a card."""
    many = isinstance(value, list | dict) and len(value) > MAX_ENTRIES
    return f"{len(value)} entries" if many else value


def training_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The values in the Trainer's `args.to_dict()` that affect the result.

    Only numbers, booleans, single words and lists of these are kept; never a path, a token or a
    host name.
    """
    kept = {key: arguments[key] for key in sorted(TRAINER_ARGUMENTS & arguments.keys())}
    return {key: value for key, value in kept.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, list):  # TRL's `loss_type`
        return bool(value) and all(_is_plain(v) and not isinstance(v, list) for v in value)
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return isinstance(value, bool) or _finite(value) is not None


def evaluation_summary(state: Mapping[str, Any]) -> EvaluationSummary:
    """The measurements in a Trainer's state, such as the contents of `trainer_state.json`."""
    history = state.get("log_history")
    entries = [e for e in history if isinstance(e, dict)] if isinstance(history, list) else []
    metrics: dict[str, float] = {}
    for entry in entries:
        metrics |= metrics_of(entry)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    steps = state.get("global_step")
    return EvaluationSummary(
        metrics=metrics,
        best_metric=_finite(state.get("best_metric")),
        steps=steps if type(steps) is int else None,
        epochs=_finite(state.get("epoch")),
        first_loss=_finite(losses[0]) if losses else None,
        last_loss=_finite(losses[-1]) if losses else None,
        log_entries=len(losses),
    )


def metrics_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers in an entry of a Trainer's log that measure the model."""
    measured = {
        key: _finite(value)
        for key, value in entry.items()
        if key not in _NOT_METRICS and not key.endswith(_NOT_METRICS_ENDINGS)
    }
    return {key: value for key, value in measured.items() if value is not None}


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _log_file(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the Trainer's, which may have NaN."""
    if not os.path.lexists(directory / name):
        return {}
    file = linked_file(directory, name)
    try:
        return json_object(file, limit=row_of(name).limit)
    except MalformedError as error:
        raise MalformedError(
            f"{name} is damaged, as one that was cut off while it was written is; move it out of "
            f"the directory, and the card has nothing of it ({error})"
        ) from error


def _datasets(directory: Path) -> tuple[str, ...]:
    try:
        readme = linked_file(directory, README)
        stated = readme_header(plain_text(readme, MAX_README)).get("datasets")
    except MalformedError:
        return ()
    every = stated if isinstance(stated, list) else [stated]
    names = [name for name in every if isinstance(name, str)]
    return tuple(filter(_is_name, names))


def _is_name(dataset: str) -> bool:
    return is_hub_id(dataset) or _WORD.fullmatch(dataset) is not None
