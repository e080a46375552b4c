"""Cards: what a model's own files say of it, and the `README.md` the Hub and we both can read.

Law: `parse_card(render_customized(model, base)) == storable_card(model.card)`, and the same for
complete models. A number that is not finite is no measurement: it is left out of a mapping, and
None where a field holds one number.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ._bases import refuse_stray_link, small_files
from ._checkpoints import INDEX, MAX_JSON, Checkpoint, json_object, opened, read_at
from ._errors import MalformedError, UnsafeFileError, shown
from ._manifest import README, from_document, to_document
from ._models import (
    BaseModel,
    BaseModelCard,
    CompleteModel,
    CustomizedModel,
    EvaluationSummary,
    ModelCard,
    TrainingConfiguration,
    is_hub_id,
)

MAX_README = 4 << 20  # bytes; cards with thousands of benchmark results have about one million
MAX_DEPTH = 64  # levels of a README's header

PEFT_SETTINGS = frozenset(
    "peft_type task_type peft_version revision r lora_alpha lora_dropout target_modules "
    "exclude_modules target_parameters modules_to_save layers_to_transform layers_pattern "
    "layer_replication rank_pattern alpha_pattern bias lora_bias fan_in_fan_out use_dora use_rslora "
    "use_qalora qalora_group_size init_lora_weights init_weights trainable_token_indices "
    "ensure_weight_tying alpha rank_dropout module_dropout decompose_both decompose_factor "
    "oft_block_size boft_block_size boft_block_num boft_n_butterfly_factor feedforward_modules "
    "d_initial projection_prng_key init_r target_r num_virtual_tokens".split()
)
"""The keys of `adapter_config.json` that a card repeats."""

TRAINER_ARGUMENTS = frozenset(
    "learning_rate num_train_epochs max_steps per_device_train_batch_size "
    "per_device_eval_batch_size gradient_accumulation_steps lr_scheduler_type warmup_steps "
    "warmup_ratio weight_decay optim adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed "
    "data_seed full_determinism bf16 fp16 tf32 gradient_checkpointing label_smoothing_factor "
    "neftune_noise_alpha eval_strategy eval_steps save_strategy save_steps load_best_model_at_end "
    "metric_for_best_model greater_is_better torch_compile use_liger_kernel "
    "max_length packing completion_only_loss assistant_only_loss beta loss_type".split()
)
"""The arguments of transformers' Trainer, and of TRL's, that bear on the result."""

_METHODS = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA"}
_VARIANTS = {"use_dora": "DoRA", "use_rslora": "rsLoRA", "use_qalora": "QALoRA"}
_NOT_METRICS = frozenset({"step", "epoch", "loss", "learning_rate", "grad_norm", "total_flos"})
_NOT_METRICS_ENDINGS = ("_runtime", "_per_second", "_flos", "_samples")
_RESULTS = ("train_results.json", "eval_results.json", "all_results.json")
_WORD = re.compile(r"[\w.+-]{1,64}", re.ASCII)
_DATASET = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_HEADER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


# What files say


def read_base_card(directory: Path, checkpoint: Checkpoint) -> BaseModelCard:
    """What the files of the base model in `directory` say of it.

    The license is a single identifier in the header of its `README.md`. That file is other
    people's prose: where its header is missing, too large or does not parse, the license is None.

    Raises:
        MalformedError: a configuration does not parse, or names no architecture.
    """
    config = json_object(directory / "config.json")
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise MalformedError("config.json names no architecture")
    files = small_files(directory)
    generation = files.get("generation_config.json")
    sizes: Counter[str] = Counter()
    for info in checkpoint.infos.values():
        sizes[info.dtype] += math.prod(info.shape)
    content = {*checkpoint.shards, *files} | ({INDEX} if (directory / INDEX).is_file() else set())
    return BaseModelCard(
        architecture=str(architectures[0]),
        parameters=sizes.total(),
        dtype=max(sizes, key=lambda dtype: (sizes[dtype], dtype), default=""),
        size=sum((directory / name).stat().st_size for name in content),
        context_length=_whole((config, text), "max_position_embeddings", "n_positions"),
        vocabulary_size=_whole((config, text), "vocab_size"),
        license=_license(directory),
        generation=json_object(generation) if generation else {},
        chat_template=_has_chat_template(files),
    )


def _whole(configs: Iterable[Mapping[str, Any]], *keys: str) -> int | None:
    found = (config.get(key) for config in configs for key in keys)
    return next((value for value in found if type(value) is int and value > 0), None)


def _license(directory: Path) -> str | None:
    try:
        stated = readme_header(plain_text(directory / README, MAX_README)).get("license")
    except MalformedError:
        return None
    return stated if isinstance(stated, str) and _WORD.fullmatch(stated) else None


def _has_chat_template(files: Mapping[str, Path]) -> bool:
    if "chat_template.jinja" in files or "chat_template.json" in files:
        return True
    path = files.get("tokenizer_config.json")
    return path is not None and bool(json_object(path).get("chat_template"))


def training_facts(directory: Path, adapter_config: Mapping[str, Any]) -> ModelCard:
    """What a finished training directory says of the training. Nothing is unpickled.

    Read are `adapter_config`, `trainer_state.json`, `train_results.json`, `eval_results.json`,
    `all_results.json` (later ones win) and the datasets in the header of `README.md`.

    Raises:
        MalformedError: one of the JSON files does not parse.
        UnsafeFileError: one of them is a link, a pipe or too large.
    """
    state = _log_file(directory / "trainer_state.json")
    summary = evaluation_summary(state)
    metrics, epochs = dict(summary.metrics), summary.epochs
    for name in _RESULTS:
        results = _log_file(directory / name)
        metrics |= _metrics(results)
        epochs = _finite(results.get("epoch")) if epochs is None else epochs
    arguments = {key: state[key] for key in ("max_steps", "num_train_epochs") if key in state}
    return ModelCard(
        TrainingConfiguration(
            peft=peft_settings(adapter_config),
            arguments=training_arguments(arguments),
            datasets=_datasets(directory),
        ),
        EvaluationSummary(
            metrics=metrics,
            best_metric=summary.best_metric,
            steps=summary.steps,
            epochs=epochs,
            first_loss=summary.first_loss,
            last_loss=summary.last_loss,
            log_entries=summary.log_entries,
        ),
    )


def peft_settings(adapter_config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `adapter_config.json` that bear on the result, and the method's name.

    What is off, empty or unset is left out.

    >>> peft_settings({"peft_type": "LORA", "r": 8, "use_dora": True, "base_model_name_or_path": "x"})
    {'method': 'LoRA, DoRA', 'peft_type': 'LORA', 'r': 8, 'use_dora': True}
    """
    kind = str(adapter_config.get("peft_type"))
    variants = [name for key, name in _VARIANTS.items() if adapter_config.get(key) is True]
    settings: dict[str, Any] = {"method": ", ".join([_METHODS.get(kind, kind), *variants])}
    for key in sorted(PEFT_SETTINGS & adapter_config.keys()):
        value = adapter_config[key]
        if value not in (None, False, [], {}, ""):
            settings[key] = sorted(value) if key in ("target_modules", "modules_to_save") else value
    return settings


def training_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the Trainer's `args.to_dict()`, what bears on the result.

    Numbers, booleans and single words only: never a path, a token or a host's name.
    """
    kept = {key: arguments[key] for key in sorted(TRAINER_ARGUMENTS & arguments.keys())}
    return {key: value for key, value in kept.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return isinstance(value, bool) or _finite(value) is not None


def evaluation_summary(state: Mapping[str, Any]) -> EvaluationSummary:
    """What a Trainer's state, such as `trainer_state.json`, says was measured.

    `first_loss` and `last_loss` are those of the first and the last logged training loss.
    """
    history = state.get("log_history")
    entries = [e for e in history if isinstance(e, dict)] if isinstance(history, list) else []
    metrics: dict[str, float] = {}
    for entry in entries:
        metrics |= _metrics(entry)
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


def _metrics(entry: Mapping[str, Any]) -> dict[str, float]:
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


def _log_file(path: Path) -> dict[str, Any]:
    """The JSON object that the Trainer wrote, with null for the NaN it may have written."""
    if not os.path.lexists(path):
        return {}
    try:
        document = json.loads(plain_text(path, MAX_JSON), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path.name} is not JSON: {shown(error)}") from error
    if not isinstance(document, dict):
        raise MalformedError(f"{path.name} holds no JSON object")
    return document


def _datasets(directory: Path) -> tuple[str, ...]:
    try:
        stated = readme_header(plain_text(directory / README, MAX_README)).get("datasets")
    except MalformedError:
        return ()
    every = stated if isinstance(stated, list) else [stated]
    return tuple(n for n in every if isinstance(n, str) and _DATASET.fullmatch(n))
