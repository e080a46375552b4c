"""Where a model's configuration states a path of the host that wrote it."""

from __future__ import annotations

from typing import Any

from ..naming import is_hub_id

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
    return {k: without_paths(v) if isinstance(v, dict) else v for k, v in kept.items()}


def _is_path(key: str, value: object) -> bool:
    if not isinstance(value, str) or not value:
        return False
    return (key in NAMES and not is_hub_id(value)) or (key in _FILES and "/" in value)
