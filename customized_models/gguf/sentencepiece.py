"""A SentencePiece model file, read without its library: pieces with scores, and a few settings.

The file is one protocol buffer message, `ModelProto` of `sentencepiece_model.proto`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import MalformedError, UnsupportedError, shown
from .vocabulary import Kind, Token, Vocabulary, padding

_BPE = 2  # TrainerSpec.ModelType
_KINDS = {1: Kind.NORMAL, 2: Kind.UNKNOWN, 3: Kind.CONTROL, 4: Kind.NORMAL, 5: Kind.UNUSED,
          6: Kind.BYTE}  # fmt: skip
"""ModelProto.SentencePiece.Type; upstream's converter also writes user-defined ones as normal."""


def read_sentencepiece(
    data: bytes,
    size: int,
    additions: Mapping[int, Token],
    listed: Mapping[str, int],
) -> Vocabulary:
    """The vocabulary in `tokenizer.model`, padded to `size`.

    `additions`: tokens added since, by id. `listed`: ids by token as `tokenizer.json` has them, if
    there is one.

    Raises:
        MalformedError: it does not parse, or disagrees with `listed` or `size`.
        UnsupportedError: it is no BPE, or normalizes text in ways that llama.cpp does not.
    """
    pieces, space_prefix = _parse(data)
    tokens = dict(enumerate(pieces))
    for number, piece in tokens.items():
        text = piece.text.decode(errors="replace")
        if listed and number not in additions and listed.get(text) != number:
            raise MalformedError(
                f"tokenizer.model has {shown(text)} as token {number}, tokenizer.json has not"
            )
    since = {n: token for n, token in additions.items() if not (token.unlisted and n in tokens)}
    tokens |= since
    if tokens and max(tokens) >= size:
        raise MalformedError(f"the tokenizer has the token id {max(tokens)}; the model has {size}")
    every = tuple(tokens.get(number) or padding(number) for number in range(size))
    return Vocabulary("llama", "default", every, space_prefix)


def _parse(data: bytes) -> tuple[list[Token], bool]:
    """The pieces, and whether a space is put before a text."""
    try:
        pieces, trainer, normalizer = [], b"", b""
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(dict(_fields(value))))
            elif number == 2:
                trainer = value
            elif number == 3:
                normalizer = value
        settings, rules = dict(_fields(trainer)), dict(_fields(normalizer))
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise MalformedError(
            f"tokenizer.model is no SentencePiece model: {shown(error)}"
        ) from error
    if settings.get(3, 1) != _BPE:
        raise UnsupportedError("tokenizer.model is no BPE; llama.cpp needs one here")
    if rules.get(2) or rules.get(4, 1):
        raise UnsupportedError(
            "tokenizer.model normalizes text or removes extra spaces; llama.cpp does neither"
        )
    return pieces, bool(rules.get(3, 1))


def _piece(fields: Mapping[int, Any]) -> Token:
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Token(bytes(fields[1]), _KINDS[fields.get(3, 1)], score)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field number and value: an int for varints, bytes for all else."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag & 7 == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            length, position = _varint(data, position)
        else:
            length = {1: 8, 5: 4}[tag & 7]
        if position + length > len(data):
            raise ValueError(f"it ends inside field {tag >> 3}")
        yield tag >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")
