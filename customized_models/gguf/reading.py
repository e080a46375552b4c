"""The beginning of a GGUF file that somebody else made, read strictly and with bounds."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from ..errors import MalformedError, shown
from ..files.reading import opened, read_at
from .format import VERSION, padded

MAX_PREAMBLE = 256 << 20  # bytes: the largest vocabularies with their merges take about 20 MB
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the values of each type that has a fixed size: `enum gguf_type` in `gguf.h`."""
_STRING, _ARRAY = 8, 9


@frozen
class Preamble:
    """What stands before the data.

    `metadata`: encoded values by key, as `format` encodes them. `shapes`: by tensor, outermost
    first. `end`: bytes of the file up to the first tensor's data. `last`: up to the last's.
    """

    metadata: Mapping[str, bytes]
    shapes: Mapping[str, tuple[int, ...]]
    end: int
    last: int


def read_preamble(path: Path) -> Preamble:
    """Read a file's key-values and tensor infos.

    Raises:
        MalformedError: it is no GGUF file of version 3, ends early or is out of bounds.
    """
    with opened(path) as fd:
        size = min(os.fstat(fd).st_size, MAX_PREAMBLE)
        cursor = _Cursor(memoryview(read_at(fd, 0, size, path.name)))
    try:
        if bytes(cursor.take(4)) != b"GGUF" or cursor.number("<I") != VERSION:
            raise ValueError(f"no GGUF file of version {VERSION}")
        tensors, keys = cursor.number("<Q"), cursor.number("<Q")
        metadata = dict(_entry(cursor) for _ in range(keys))
        infos = [_tensor(cursor) for _ in range(tensors)]
        shapes = {name: shape for name, shape, _ in infos}
        if len(metadata) != keys or len(shapes) != tensors:
            raise ValueError("a name stands twice")
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise MalformedError(f"{shown(path.name)} does not parse: {shown(error)}") from error
    end = padded(cursor.position)
    return Preamble(metadata, shapes, end, end + max((at for _, _, at in infos), default=0))


class _Cursor:
    """A place in some bytes."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count > len(self.data) - self.position:
            raise ValueError(f"it ends after byte {self.position}")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, kind: str) -> int:
        """The next number of a `struct` format."""
        (value,) = struct.unpack(kind, self.take(struct.calcsize(kind)))
        return int(value)

    def text(self) -> str:
        """The next string."""
        return bytes(self.take(self.number("<Q"))).decode()

    def skip(self, kind: int) -> None:
        """Pass over a value of that type."""
        if kind == _STRING:
            self.take(self.number("<Q"))
        elif kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _SIZES:
                self.take(_SIZES[inner] * count)
            elif inner == _STRING:
                for _ in range(count):
                    self.skip(_STRING)
            else:
                raise ValueError(f"an array of type {inner}")
        elif kind in _SIZES:
            self.take(_SIZES[kind])
        else:
            raise ValueError(f"a value of type {kind}")


def _entry(cursor: _Cursor) -> tuple[str, bytes]:
    key, start = cursor.text(), cursor.position
    cursor.skip(cursor.number("<I"))
    return key, bytes(cursor.data[start : cursor.position])


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int]:
    """Name, shape, and where its data begins, from the first's."""
    name, dimensions = cursor.text(), cursor.number("<I")
    if dimensions > 4:
        raise ValueError(f"a tensor of {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))
    cursor.number("<I")
    offset = cursor.number("<Q")
    if math.prod(shape) >= 1 << 63:
        raise ValueError("a tensor of impossible size")
    return name, shape[::-1], offset
