"""The tokens that end an answer beyond the one that a GGUF file names.

`generation_config.json` may list several, of which a file has room for one; llama.cpp knows some
others by their text. A server is told the rest as strings at which to stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MalformedError, shown
from ..files.reading import json_object
from .tokenizer import TokenizerFiles


def further_endings(files: Mapping[str, Path]) -> tuple[str, ...]:
    """Texts of the tokens that end an answer, without the end-of-text token; in the file's order.

    `files`: a model's small files, as `ModelSource.files`.

    Raises:
        MalformedError: a file does not parse, or a number is that of no token.
    """
    config = json_object(files["config.json"])
    generation: dict[str, Any] = {}
    if "generation_config.json" in files:
        generation = json_object(files["generation_config.json"])
    listed = generation.get("eos_token_id", config.get("eos_token_id"))
    numbers = listed if isinstance(listed, list) else [listed]
    tokenizer = TokenizerFiles(files, config)
    named = tokenizer.settings.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    texts = []
    for number in numbers:
        if number is None or tokenizer.backend is None:
            continue
        text = tokenizer.backend.id_to_token(number) if type(number) is int else None
        if text is None:
            raise MalformedError(f"eos_token_id: {shown(number)} is no token of the tokenizer")
        texts.append(text)
    return tuple(dict.fromkeys(text for text in texts if text != named))
