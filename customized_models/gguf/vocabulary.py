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
    """`text`: UTF-8. `score`: higher merges first; only SentencePiece vocabularies use it.

    `unlisted`: it stands in only where the vocabulary's own file has no token of that id.
    """

    text: bytes
    kind: Kind
    score: float = 0.0
    unlisted: bool = False


@frozen
class Vocabulary:
    """Tokens by id, and what llama.cpp needs to split text into them.

    `model`: "gpt2" for byte-level BPE, "llama" for SentencePiece. `pre`: the pre-tokenizer's name
    there. `space_prefix`: whether a space is put before a text; None where that does not matter.
    """

    model: str
    pre: str
    tokens: tuple[Token, ...]
    space_prefix: bool | None = None


def padding(number: int) -> Token:
    """What stands for an id that the model has but the tokenizer has not."""
    return Token(f"[PAD{number}]".encode(), Kind.UNUSED, -10000.0)


def added(content: str, *, special: bool, as_it_is: bool = False, unlisted: bool = False) -> Token:
    """A token that was added to a vocabulary, classed as upstream's converter does.

    `as_it_is`: it keeps its text, and is a control token only if it says so. `unlisted`: a
    vocabulary that has the token itself knows better.

    Source: `does_token_look_special` and its callers in `conversion/base.py` of llama.cpp b11434.
    """
    if special or (not as_it_is and _looks_special(content)):
        return Token(content.encode(), Kind.CONTROL, -1000.0, unlisted)
    spaced = content if as_it_is else content.replace("\u2581", " ")
    return Token(spaced.encode(), Kind.USER_DEFINED, -1000.0, unlisted)


def _looks_special(text: str) -> bool:
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )
