"""Copies an untrusted adapter directory, checks the copy, and reads its facts.

Nothing of Hugging Face's runs here. Whatever would make PEFT run code, open other files or match a
pattern for a very long time is refused before PEFT reads the adapter.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from ..errors import (
    BaseModelMismatch,
    MalformedError,
    UnsupportedAdapterError,
    listed,
    shown,
)
from ..files.digests import FileDigest, hash_file
from ..files.model_directory import CARRIED, Role, checked_size, files_of, row_of
from ..files.reading import json_object, opened
from ..files.safetensors import Checkpoint, TensorInfo, read_header
from ..files.streams import FileWriter, copy_range
from ..files.writing import disk_errors
from ..naming import is_hub_id
from .patterns import check_pattern
from .peft_types import NAME_SETS, AdapterType, adapter_type

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the names of a model's modules
_TAKEN = (Role.ADAPTER, *CARRIED)

_MAX_HEADER = 32 << 20  # bytes: one adapted expert by expert has about 100,000 tensors
_MAX_FILES = 1000  # an adapter has a dozen

_REGEX_FIELDS = ("target_modules", "exclude_modules", "layers_pattern")
_DTYPES = ("F16", "BF16", "F32")
_INDEX_DTYPES = ("I64", "I32", "I16", "U8", "BOOL")
_MAX_RANK = 1 << 16  # no model has layers as wide: a larger rank only asks for memory
_LOADS_CODE = ("megatron_config", "adapters", "tokenizer_kwargs")
_PATH_FIELD = re.compile(r".*(_path|_file|_dir|_directory|_or_id)", re.ASCII)
_HERE_BY_DEFAULT = {"megatron_core": "megatron.core"}


@frozen
class Intake:
    """A checked copy of an adapter.

    Attributes:
        adapter: The copy.
        content: Size and digest of each of its files, by name.
        stated_base: `base_model_name_or_path` of the original, which the copy has only if it is a
            Hub id.
    """

    adapter: Adapter
    content: Mapping[str, FileDigest]
    stated_base: object


def take_in(source: Path, destination: Path) -> Intake:
    """Copy an adapter's files into the empty directory `destination`, and check them.

    Each file of `source` is read once. Weights in other formats and files that only the training
    needs are left out. The configuration is rewritten so that equal adapters have equal bytes: its
    keys are sorted, and so are lists that PEFT treats as sets; `base_model_name_or_path` is null
    unless it is a Hub id.

    Args:
        source: The directory that a training saved.
        destination: An empty directory.

    Raises:
        MalformedError: A required file is missing, the configuration or the weights' header does
            not parse, or a file changed while it was copied.
        UnsafeFileError: A file is a link, pipe or device, or is too large.
        UnsupportedAdapterError: The weights are pickled, or the configuration could run code.
        StorageError: The disk failed.
    """
    if not os.path.lexists(source / WEIGHTS) and (source / "adapter_model.bin").exists():
        raise UnsupportedAdapterError(
            f"adapter_model.bin is a pickle, which can run code when it is read; save the adapter "
            f"as {WEIGHTS}: load it where you trust it, then "
            f"PeftModel.save_pretrained(..., safe_serialization=True)"
        )
    with disk_errors(f"the adapter in {shown(source)} cannot be copied"):
        names = [*dict.fromkeys((CONFIG, WEIGHTS, *files_of(source, *_TAKEN)))]
        if len(names) > _MAX_FILES:
            raise MalformedError(
                f"{shown(source)} has {len(names)} files; an adapter has at most {_MAX_FILES}"
            )
        content = {name: _copy_file(source, destination, name) for name in names}
        config = json_object(destination / CONFIG)
        (destination / CONFIG).write_bytes(_canonical(config))
        content[CONFIG] = hash_file(destination / CONFIG)
    return Intake(Adapter.open(destination), content, config.get("base_model_name_or_path"))


def _copy_file(source: Path, destination: Path, name: str) -> FileDigest:
    (destination / name).parent.mkdir(parents=True, exist_ok=True)
    with opened(source / name, os.O_NOFOLLOW) as fd, FileWriter(destination / name) as writer:
        before = os.fstat(fd)
        checked_size(name, before.st_size)
        if name == WEIGHTS:
            read_header(source / name, limit=_MAX_HEADER)  # a sparse file would take long to copy
        copy_range(fd, 0, before.st_size, writer, shown(name))
        digest = writer.finish()
        after = os.fstat(fd)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise MalformedError(f"{shown(name)} changed while it was copied")
    return digest


def _canonical(config: dict[str, Any]) -> bytes:
    base = config.get("base_model_name_or_path")
    portable = isinstance(base, str) and is_hub_id(base) and not os.path.exists(base)
    config = config | {"base_model_name_or_path": base if portable else None}
    for key in NAME_SETS:
        value = config.get(key)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[key] = sorted(set(value))
    try:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{CONFIG} has a number that is not finite") from error
    return text.encode() + b"\n"


@frozen
class Adapter:
    """A PEFT adapter that was checked, in a private directory.

    Attributes:
        directory: Where it is.
        config: Its `adapter_config.json`.
        tensors: The tensors of its weights, by PEFT's names.
    """

    directory: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, directory: Path) -> Adapter:
        """Read and check the configuration and the header of the weights.

        Raises:
            MalformedError: A value has the wrong type or is out of range, or there are no weights.
            UnsupportedAdapterError: The configuration could run code, open other files or match a
                pattern for very long, or a tensor has an unusual dtype.
        """
        config = json_object(directory / CONFIG, limit=row_of(CONFIG).limit)
        _check_config(config)
        tensors = read_header(directory / WEIGHTS, limit=_MAX_HEADER).tensors
        if not tensors:
            raise MalformedError(f"{WEIGHTS} has no tensors")
        if empty := {name for name, info in tensors.items() if not info.size}:
            raise MalformedError(f"{WEIGHTS} has tensors without elements: {listed(empty)}")
        dtypes = _DTYPES + (_INDEX_DTYPES if adapter_type(config).saves_indices else ())
        if odd := {name for name, info in tensors.items() if info.dtype not in dtypes}:
            raise UnsupportedAdapterError(
                f"{WEIGHTS} has tensors with a dtype other than {', '.join(dtypes)}: {listed(odd)}"
            )
        return cls(directory.resolve(), config, tensors)


def _check_config(config: Mapping[str, Any]) -> None:
    if not re.fullmatch(r"[A-Z0-9_]{1,40}", str(config.get("peft_type")), re.ASCII):
        raise MalformedError(
            f"peft_type {shown(config.get('peft_type'))} is not the name of a PEFT type"
        )
    kind = adapter_type(config)
    if "r" in config and (kind.requires_rank or config["r"] is not None):
        _check_rank("r", config["r"], 1 if kind.requires_rank else 0)
    if "lora_alpha" in config and (kind.requires_rank or config["lora_alpha"] is not None):
        _check_number("lora_alpha", config["lora_alpha"])
    _check_pattern_values(config, kind)
    for key in NAME_SETS + _REGEX_FIELDS:
        _check_names(key, config.get(key))
    _refuse_outside(config, CONFIG)


def _check_pattern_values(config: Mapping[str, Any], kind: AdapterType) -> None:
    """Check `rank_pattern` and `alpha_pattern`: values by patterns of module names."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = {} if config.get(key) is None else config[key]
        if not isinstance(patterns, dict):
            raise MalformedError(f"{key} is not a JSON object")
        for pattern, value in patterns.items():
            check_pattern(key, pattern)
            if key == "alpha_pattern":
                _check_number(f"{key} value", value)
            elif kind.rank_masks:
                _check_masks(f"{key} value", value)
            else:
                _check_rank(f"{key} value", value)


def _check_rank(what: str, value: object, lowest: int = 1) -> None:
    if type(value) is not int or not lowest <= value <= _MAX_RANK:
        raise MalformedError(
            f"{what} {shown(value)} is not a whole number from {lowest} to {_MAX_RANK}"
        )


def _check_masks(what: str, value: object) -> None:
    """Which of a module's ranks are left."""
    if not isinstance(value, list) or not all(isinstance(item, bool) for item in value):
        raise MalformedError(f"{what} {shown(value)} is not a list of true and false")


def _check_number(what: str, value: object) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise MalformedError(f"{what} {shown(value)} is not a finite number")


def _check_names(key: str, value: object) -> None:
    """None, a list of names, or, where PEFT takes one, a regular expression."""
    if value is None:
        return
    if isinstance(value, str) and key in _REGEX_FIELDS:
        check_pattern(key, value)
        return
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise MalformedError(f"{key} is not a list of names: {shown(value)}")
    for item in value:
        check_pattern(key, item)


def _refuse_outside(config: Mapping[str, Any], where: str) -> None:
    """Refuse what makes PEFT import a module or open another file."""
    for key, value in config.items():
        if not value or key == "base_model_name_or_path" or value == _HERE_BY_DEFAULT.get(key):
            continue
        if key == "auto_mapping" and _is_transformers_class(value):
            continue
        outside = key in (*_LOADS_CODE, *_HERE_BY_DEFAULT, "auto_mapping")
        if outside or (_PATH_FIELD.fullmatch(key) and isinstance(value, str)):
            raise UnsupportedAdapterError(
                f"{shown(key)} in {where} makes PEFT run code or open files outside the adapter: "
                f"{shown(value)}"
            )
        if isinstance(value, dict):
            _refuse_outside(value, f"{shown(key)} in {where}")


def _is_transformers_class(mapping: object) -> bool:
    """PEFT writes down the base's class for an adapter without a task type."""
    if not isinstance(mapping, dict) or mapping.keys() != {"base_model_class", "parent_library"}:
        return False
    library = mapping["parent_library"]
    return isinstance(library, str) and bool(
        re.fullmatch(r"transformers\.models(\.[a-z0-9_]+)+", library, re.ASCII)
    )


# Whether it fits a base

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|block)\.(\d+)\.")


def check_fits(adapter: Adapter, base: Checkpoint) -> None:
    """Check by names and shapes in the headers that the adapter may have been trained on `base`.

    Where `base` has a weight with the name of an adapted module, the shapes must agree. Other
    modules are not checked as long as some are found, because transformers renames and fuses the
    tensors of some architectures while it loads them. The merge plan checks those.

    Raises:
        BaseModelMismatch: Shapes differ, the base has too few layers, or no module is found.
    """
    here, weights = {name: [info] for name, info in base.infos.items()}, _by_tail(base)
    modules = {name.split(".")[-2] for name in base.infos if "." in name}
    layers = max((layer_of(name) for name in base.infos), default=-1)
    wrong, found = set(), False
    for name, info in adapter.tensors.items():
        path = name.removeprefix(PREFIX)
        if layer_of(path) > layers:
            wrong.add(name)
            continue
        targets = _targets(path, here) or _targets(_tail(path), weights)
        if not targets:  # renamed while it is loaded, or a tied head without a tensor
            alike = modules.intersection(path.split("."))
            found = found or "experts" in alike or bool(alike and layer_of(path) < 0)
            found = found or path.startswith("lm_head.")
            continue
        found = True
        if not any(_same_shape(path, info, target, adapter) for target in targets):
            wrong.add(name)
    elsewhere = adapter_type(adapter.config).shared or adapter.config.get("target_parameters")
    if wrong or not (found or elsewhere):
        reason = f"{listed(wrong)} do not fit" if wrong else "none belongs to a module of it"
        raise BaseModelMismatch(
            f"the adapter was not trained on this base model, as its tensors show: {reason}; "
            f"register it with the base model that it was trained on"
        )


def layer_of(name: str) -> int:
    """The layer's number in a tensor's or module's name; -1 if there is none."""
    match = _LAYER.search(name)
    return int(match[1]) if match and len(match[1]) < 10 else (10**9 if match else -1)


def _tail(name: str) -> str:
    """From the layer's number on: what stays when a model is nested in another."""
    match = _LAYER.search(name)
    return name[match.start(1) :] if match else name


def _by_tail(base: Checkpoint) -> dict[str, list[TensorInfo]]:
    """The base's tensors by tail. A language model and a vision tower may share one."""
    result: dict[str, list[TensorInfo]] = {}
    for name, info in base.infos.items():
        result.setdefault(_tail(name), []).append(info)
    return result


def _targets(path: str, infos: Mapping[str, list[TensorInfo]]) -> list[TensorInfo]:
    """The tensor of that name, or the weight of the nearest module around it."""
    if path in infos:
        return infos[path]
    while "." in path:
        path = path.rpartition(".")[0]
        if f"{path}.weight" in infos:
            return infos[f"{path}.weight"]
    return []


def _same_shape(path: str, info: TensorInfo, target: TensorInfo, adapter: Adapter) -> bool:
    """Whether a LoRA factor or a full copy fits its target; other kinds are not checked."""
    if _tail(path) == _tail(target.name):
        resizable = layer_of(path) < 0 and len(info.shape) == 2  # embeddings, for added tokens
        return info.shape[resizable:] == target.shape[resizable:]
    blocks = adapter.config.get("use_bdlora")
    if len(target.shape) != 2 or len(info.shape) != 2 or blocks:
        return True
    out, into = target.shape[::-1] if adapter.config.get("fan_in_fan_out") else target.shape
    if path.endswith(".lora_A.weight"):
        return info.shape[1] == into
    if path.endswith(".lora_B.weight"):
        return info.shape[0] == out
    return True
