"""The tokens that end an answer: more than one, in many models, where a GGUF file names one.

transformers stops at each of `eos_token_id` in `generation_config.json`. llama.cpp stops at the
tokens that a file names as `eos`, `eot` and `eom`, and at some that it knows by their text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from ...errors import MalformedError, shown
from ...files.reading import json_object

FILES = ("generation_config.json", "config.json", "tokenizer.json", "tokenizer_config.json")
"""The files of a model directory that are read here."""

KNOWN_BY_TEXT = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
     "<EOT>", "_<EOT>")
)  # fmt: skip
"""Texts of tokens at which llama.cpp stops by itself.

Source: `llama_vocab::impl::load` in `src/llama-vocab.cpp`, `special_eog_ids`, of the llama.cpp in
Ollama 0.11.4; b11434 knows these and more.
"""

_SLOTS = ("eot", "eom")


@frozen
class EndTokens:
    """Where an answer ends.

    `ids`: as transformers has them. `file_keys`: what a GGUF file must say beside its
    `tokenizer.ggml.eos_token_id`, so that llama.cpp stops at the others. `stop`: the texts of
    those that are special tokens, which no answer has for another reason. `lost`: ids at which
    llama.cpp goes on all the same, as a file has room for three.
    """

    ids: tuple[int, ...] = ()
    file_keys: Mapping[str, int] = field(factory=dict, hash=False)
    stop: tuple[str, ...] = ()
    lost: tuple[int, ...] = ()

    @classmethod
    def read(cls, files: Mapping[str, Path]) -> EndTokens:
        """The end tokens of a model directory, given its files by name.

        Raises:
            MalformedError: A file does not parse, or an id is no number.
        """
        objects = {name: json_object(files[name]) for name in FILES if name in files}
        ids = _ids(objects.get("generation_config.json", {})) or _ids(
            objects.get("config.json", {})
        )
        texts, special = _texts(objects)
        named = _eos_text(objects.get("tokenizer_config.json", {}))
        in_file = (
            {number for number in ids if texts.get(number) == named} if named else set(ids[:1])
        )
        others = [n for n in ids if n not in in_file and texts.get(n) not in KNOWN_BY_TEXT]
        keys = {
            f"tokenizer.ggml.{slot}_token_id": number
            for slot, number in zip(_SLOTS, others, strict=False)
        }
        stop = tuple(texts[number] for number in ids if number in special)
        return cls(ids, keys, stop, tuple(others[len(_SLOTS) :]))


def _ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id`, one or several, in their order."""
    found = config.get("eos_token_id")
    if found is None and isinstance(text := config.get("text_config"), dict):
        found = text.get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    for number in listed:
        if type(number) is not int or number < 0:
            raise MalformedError(f"eos_token_id {shown(number)} is no token")
    return tuple(dict.fromkeys(listed))


def _texts(objects: Mapping[str, Mapping[str, Any]]) -> tuple[dict[int, str], set[int]]:
    """Texts by id, as far as they are known, and the ids of special tokens."""
    document = objects.get("tokenizer.json", {})
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    texts: dict[int, str] = {}
    special = set()
    try:
        if isinstance(vocabulary, dict):
            texts |= {number: text for text, number in vocabulary.items()}
        elif isinstance(vocabulary, list):
            texts |= {number: entry[0] for number, entry in enumerate(vocabulary)}
        decoder = objects.get("tokenizer_config.json", {}).get("added_tokens_decoder") or {}
        entries = [(int(number), entry) for number, entry in decoder.items()]
        entries += [(entry["id"], entry) for entry in document.get("added_tokens") or ()]
        for number, entry in entries:
            texts[number] = entry["content"]
            if entry.get("special"):
                special.add(number)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise MalformedError(f"the tokenizer's tokens do not parse: {shown(error)}") from error
    return texts, special


def _eos_text(settings: Mapping[str, Any]) -> str | None:
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
