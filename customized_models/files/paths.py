"""Where a model's files state a path of the host that wrote them, and what is left without it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..naming import is_hub_id
from .digests import FileDigest, hash_file
from .model_directory import Role, role_of, row_of
from .reading import json_object

NAMES = ("_name_or_path", "name_or_path")
"""Keys that state what a model or tokenizer was loaded from: a Hub id or a path."""

_FILES = ("tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file", "spm_file")
"""Keys of files that `save_pretrained` of older releases has written with their directory."""


def without_paths(document: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and what is nested in it, without those keys where they state a path.

    >>> without_paths({"_name_or_path": "/home/me/base", "text_config": {"name_or_path": "org/b"}})
    {'text_config': {'name_or_path': 'org/b'}}
    """
    kept = {key: value for key, value in document.items() if not _is_path(key, value)}
    return {key: _nested(value) for key, value in kept.items()}


def _nested(value: Any) -> Any:
    if isinstance(value, list):
        return [_nested(item) for item in value]
    return without_paths(value) if isinstance(value, dict) else value


def may_state_paths(name: str) -> bool:
    """Whether a file of a model directory is one that transformers may write a path into."""
    return name == "tokenizer_config.json" or (
        role_of(name) in (Role.CONFIG, Role.PROCESSOR) and name.endswith(".json")
    )


def strip_paths(directory: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Write those files of a private copy again that state a path, without it.

    Returns:
        Size and digest of each that was written.

    Raises:
        MalformedError: One of them holds no JSON object.
    """
    written = {}
    for name in filter(may_state_paths, names):
        document = json_object(directory / name, limit=row_of(name).limit)
        if (plain := without_paths(document)) != document:
            (directory / name).write_text(json.dumps(plain, indent=2) + "\n")
            written[name] = hash_file(directory / name)
    return written


_PATH = re.compile(r"(?:[/~]|\.\.?/|[A-Za-z]:[\\/]|\\\\|file:).*", re.DOTALL)


def without_path_values(value: Any) -> Any:
    """A document without the texts in it that are paths.

    >>> without_path_values({"output_dir": "/home/me/out", "datasets": ["org/data", "~/data.csv"]})
    {'datasets': ['org/data']}
    """
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not _is_path_value(v)}
        return {key: without_path_values(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [without_path_values(item) for item in value if not _is_path_value(item)]
    return value


def _is_path_value(value: object) -> bool:
    return isinstance(value, str) and _PATH.fullmatch(value) is not None


def _is_path(key: str, value: object) -> bool:
    if not isinstance(value, str) or not value:
        return False
    return (key in NAMES and not is_hub_id(value)) or (key in _FILES and "/" in value)
