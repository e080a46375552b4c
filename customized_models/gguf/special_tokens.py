"""The special tokens' ids, and which of them are added to a text.

Source: `SpecialVocab` in `gguf-py/gguf/vocab.py` of llama.cpp b11434.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import Factory, define

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@define
class SpecialTokens:
    """`ids` by role, and by role whether the token is `added` to a text."""

    ids: dict[str, int] = Factory(dict)
    added: dict[str, bool] = Factory(dict)

    def name(self, role: str, number: object, size: int) -> None:
        """Let `role` be token `number`, unless it is another already or there is none such."""
        if type(number) is int and 0 <= number < size:
            self.ids.setdefault(role, number)


def special_tokens(
    document: Mapping[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any], size: int
) -> SpecialTokens:
    """Ids by text in `tokenizer_config.json`, else `config.json`; added as `tokenizer.json` does.

    `document`, `settings`: `tokenizer.json` and `tokenizer_config.json`, empty without one.
    `size`: how many tokens the model has.
    """
    special = SpecialTokens()
    texts = {role: _content(settings.get(f"{role}_token")) for role in ROLES}
    if document:
        texts["bos"], texts["eos"] = texts["bos"] or texts["cls"], texts["eos"] or texts["sep"]
        for processor in _processors(document):
            _read_processor(processor, texts, special.added)
    if settings:
        numbers: dict[object, int] = {}
        for entry in document.get("added_tokens") or ():
            numbers.setdefault(entry.get("content"), entry.get("id"))
        for role, content in texts.items():
            said = settings.get(f"add_{role}_token")
            if isinstance(said, bool):
                special.added.setdefault(role, said)
            special.name(role, numbers.get(content), size)
    inner = config.get("text_config") or {}
    for role in texts:
        number = config.get(f"{role}_token_id")
        special.name(role, inner.get(f"{role}_token_id") if number is None else number, size)
    return special


def _content(entry: Any) -> str | None:
    entry = entry.get("content") if isinstance(entry, dict) else entry
    return entry if isinstance(entry, str) else None


def _processors(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    processor = document.get("post_processor") or {}
    return list(processor.get("processors") or [processor])


def _read_processor(
    processor: Mapping[str, Any], texts: dict[str, str | None], added: dict[str, bool]
) -> None:
    """What a post-processor adds; it may also name tokens that the settings do not."""
    kind = processor.get("type")
    if kind == "ByteLevel":
        added.setdefault("bos", False)
        added.setdefault("eos", False)
    elif kind == "RobertaProcessing":
        added |= {"bos": True, "eos": True, "sep": True}
        texts["cls"] = texts["cls"] or processor.get("cls", [texts["bos"]])[0]
        texts["sep"] = texts["sep"] or processor.get("sep", [texts["eos"]])[0]
    elif kind == "TemplateProcessing":
        _read_template(processor, texts, added)


def _read_template(
    processor: Mapping[str, Any], texts: dict[str, str | None], added: dict[str, bool]
) -> None:
    single, pair = processor.get("single") or [], processor.get("pair") or []
    first = last = None
    if len(single) > 1:
        first, last = _special(single[0]), _special(single[-1])
    if first:
        if first not in (texts["bos"], texts["cls"]):
            texts["bos"], texts["cls"] = texts["bos"] or first, texts["cls"] or first
        added["bos"] = first in (texts["bos"], texts["cls"])
    if last:
        if last != texts["eos"]:
            texts["eom" if "eot" in texts else "eot"] = texts["eos"]
            texts["eos"] = last
        added["eos"] = True
    start = 1 if first and pair and _special(pair[0]) == first else 0
    stop = -1 if last and pair and _special(pair[-1]) == last else None
    between = pair[start:stop]
    if not between:
        return
    ends = [entry.get("Sequence", {}).get("id") for entry in (between[0], between[-1])]
    between = between[1:-1]
    if ends == ["A", "B"] and between:
        ending = (texts["sep"], texts["eos"])
        separated = _special(between[0]) in ending and not last
        if len(between) == 2:
            separated = separated or _special(between[1]) in ending
        added["sep"] = separated
        if separated:
            texts["sep"] = texts["sep"] or texts["eos"]


def _special(entry: Mapping[str, Any]) -> str | None:
    found: str | None = entry.get("SpecialToken", {}).get("id")
    return found
