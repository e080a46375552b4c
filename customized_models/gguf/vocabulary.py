"""A vocabulary as the file holds it, whatever kind of tokenizer it was read from."""

from __future__ import annotations

import enum

from attrs import frozen


class Kind(enum.IntEnum):
    """`tokenizer.ggml.token_type`: `enum llama_token_type` in llama.cpp's `include/llama.h`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@frozen
class Token:
    """`text`: UTF-8. `score`: higher merges first; only SentencePiece vocabularies use it."""

    text: bytes
    kind: Kind
    score: float = 0.0


@frozen
class Vocabulary:
    """Tokens by id, and what llama.cpp needs to split text into them.

    `model`: "gpt2" for byte-level BPE, "llama" for SentencePiece. `pre`: the pre-tokenizer's name
    there. `merges`: "left right", first merged first; empty for SentencePiece. `space_prefix`:
    whether a space is put before the text; None where that does not matter.
    """

    model: str
    pre: str
    tokens: tuple[Token, ...]
    merges: tuple[str, ...] = ()
    space_prefix: bool | None = None


def padding(number: int) -> Token:
    """What stands for an id that the model has but the tokenizer has not."""
    return Token(f"[PAD{number}]".encode(), Kind.UNUSED, -10000.0)


def added(text: str, *, special: bool) -> Token:
    """A token that was added to a vocabulary, classed as upstream's converter does.

    Source: `does_token_look_special` and its callers in `conversion/base.py` of llama.cpp b11434.
    """
    if special or _looks_special(text):
        return Token(text.encode(), Kind.CONTROL, -1000.0)
    return Token(text.replace("\u2581", " ").encode(), Kind.USER_DEFINED, -1000.0)


def _looks_special(text: str) -> bool:
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )
