"""`adapter_config.json`: its values checked, and one byte string for each adapter."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import MalformedError, UnsupportedAdapterError, shown
from ..naming import is_hub_id
from .peft_types import NAME_SETS, AdapterType, adapter_type

CONFIG = "adapter_config.json"

_REGEX_OPTIONS = ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules")
_MAX_RANK = 1 << 16  # no model has layers as wide: a larger rank only asks for memory
_MAX_EXPRESSION = 20_000  # characters; a hundred modules by their full names have about 5,000
_OUTSIDE = (
    "adapters",
    "megatron_config",
    "prompt_tuning_init_state_dict_path",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
)
"""Options of PEFT that make it import a module or open another file."""

_PATH_OPTION = re.compile(r".*(_path|_file|_dir|_directory|_or_id)", re.ASCII)
_MEGATRON = "megatron.core"  # what PEFT writes for an adapter that has nothing to do with it
_MODULE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*", re.ASCII)
_TRANSFORMERS = "transformers.models."


def check_settings(config: Mapping[str, Any]) -> None:
    """Check the values that PEFT acts on.

    Raises:
        MalformedError: One has the wrong type, or is out of range.
        UnsupportedAdapterError: One makes PEFT run code or open files outside the adapter.
    """
    if not re.fullmatch(r"[A-Z0-9_]{1,40}", str(config.get("peft_type")), re.ASCII):
        raise MalformedError(
            f"peft_type {shown(config.get('peft_type'))} is not the name of a PEFT type"
        )
    kind = adapter_type(config)
    if "r" in config and (kind.requires_rank or config["r"] is not None):
        _check_rank("r", config["r"], 1 if kind.requires_rank else 0)
    if "lora_alpha" in config and (kind.requires_rank or config["lora_alpha"] is not None):
        _check_number("lora_alpha", config["lora_alpha"])
    for key in kind.switches & config.keys():
        if not isinstance(config[key], bool | None):
            raise MalformedError(f"{key} {shown(config[key])} is neither true nor false")
    _check_pattern_values(config, kind)
    for key in dict.fromkeys(NAME_SETS + _REGEX_OPTIONS):
        _check_names(key, config.get(key))
    _refuse_outside(config, CONFIG)


def canonical(config: Mapping[str, Any]) -> bytes:
    """The configuration as it is stored: the same for the same adapter, without what is elsewhere.

    Keys are sorted, and so are lists that PEFT treats as sets. `base_model_name_or_path` is null
    unless it is a Hub id. What PEFT does not look at is null where it names a class of another
    package or a file of the machine that it was trained on.

    Raises:
        MalformedError: It is no JSON that could be written again.
        UnsupportedAdapterError: A class is of Python's own library.
    """
    kind, base = adapter_type(config), config.get("base_model_name_or_path")
    portable = isinstance(base, str) and is_hub_id(base) and not os.path.exists(base)
    changed = {**config, "base_model_name_or_path": base if portable else None}
    for key in NAME_SETS:
        value = config.get(key)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            changed[key] = sorted(set(value))
    if "auto_mapping" in config:
        changed["auto_mapping"] = _stored_class(config["auto_mapping"])
    for key in kind.inert_options(config):
        changed[key] = None
    known = kind.supported_options.union(kind.refused, _OUTSIDE)
    for key in [key for key in changed if key not in known and _PATH_OPTION.fullmatch(key)]:
        changed[key] = None
    try:
        text = json.dumps(changed, indent=2, sort_keys=True, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise MalformedError(
            f"{CONFIG} has a number that is not finite, or is nested too deeply"
        ) from error
    return text.encode() + b"\n"


def _stored_class(mapping: Any) -> Any:
    """What PEFT noted of the base's class, if transformers has it; PEFT itself does not read it.

    Raises:
        UnsupportedAdapterError: It is Python's own, which no model's class is.
    """
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if not isinstance(library, str) or not _MODULE.fullmatch(library):
        return None if mapping is None or library is None else _refuse("auto_mapping", mapping)
    if library.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return _refuse("auto_mapping", mapping)
    return mapping if _is_transformers_class(mapping) else None


def _check_pattern_values(config: Mapping[str, Any], kind: AdapterType) -> None:
    """Check `rank_pattern`, `alpha_pattern` and the like: values by patterns of module names."""
    for key in sorted(kind.pattern_options & config.keys()):
        patterns = config[key]
        if patterns is None:
            continue
        if not isinstance(patterns, dict):
            raise MalformedError(f"{key} is not a JSON object")
        for pattern, value in patterns.items():
            _check_expression(key, pattern)
            if key != "rank_pattern":
                _check_number(f"{key} value", value)
            elif kind.rank_masks:
                _check_masks(f"{key} value", value)
            elif kind.requires_rank or not isinstance(value, float):
                _check_rank(f"{key} value", value)
            else:  # a part of the whole
                _check_number(f"{key} value", value)


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
    try:
        finite = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        finite = False
    if not finite:
        raise MalformedError(f"{what} {shown(value)} is not a finite number")


def _check_names(key: str, value: object) -> None:
    """None, a list of names, or, where PEFT takes one, a regular expression."""
    if value is None:
        return
    if isinstance(value, str) and key in _REGEX_OPTIONS:
        _check_expression(key, value)
        return
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise MalformedError(f"{key} is not a list of names: {shown(value)}")
    for item in value:
        _check_expression(key, item)


def _check_expression(key: str, value: str) -> None:
    """How long it takes to match is seen by `check_patterns`; how long to compile is bounded."""
    if len(value) > _MAX_EXPRESSION:
        raise UnsupportedAdapterError(
            f"{key} has a pattern of {len(value)} characters, more than {_MAX_EXPRESSION}: "
            f"{shown(value)}; list the modules' names instead"
        )


def _refuse_outside(config: Mapping[str, Any], where: str) -> None:
    """Refuse what makes PEFT import a module or open another file."""
    for key, value in config.items():
        if not value or key == "base_model_name_or_path":
            continue
        if key == "auto_mapping" and _is_transformers_class(value):
            continue
        outside = key in (*_OUTSIDE, "auto_mapping")
        outside = outside or (key == "megatron_core" and value != _MEGATRON)
        if outside or (_PATH_OPTION.fullmatch(key) and isinstance(value, str)):
            _refuse(key, value, where)
        if isinstance(value, dict):
            _refuse_outside(value, f"{shown(key)} in {where}")


def _refuse(key: str, value: object, where: str = CONFIG) -> None:
    raise UnsupportedAdapterError(
        f"{shown(key)} in {where} makes PEFT run code or open files outside the adapter: "
        f"{shown(value)}; remove it from {CONFIG}, if the adapter does not need it"
    )


def _is_transformers_class(mapping: object) -> bool:
    """PEFT writes down the base's class for an adapter without a task type; others add to it."""
    if not isinstance(mapping, dict):
        return False
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    if not isinstance(library, str) or not isinstance(name, str):
        return False
    known = library.startswith(_TRANSFORMERS) and _MODULE.fullmatch(library) is not None
    return known and name.isidentifier()
