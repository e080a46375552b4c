"""The GGUF container, version 3: tensor types, encoded values, and the bytes before the data.

Layout: magic, version, counts, key-values, tensor infos, padding; then each tensor, padded.
Everything is little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    import torch

VERSION = 3
ALIGNMENT = 32  # bytes; the format's default, to which each tensor is padded


@frozen
class TensorType:
    """How a tensor's rows are stored: `size` bytes for every `block` weights of a row.

    `scales`: where in a block its float16 numbers lie, by which all others are multiplied.
    """

    name: str
    number: int
    block: int
    size: int
    scales: tuple[int, ...] = ()


# ggml/include/ggml.h `enum ggml_type` and ggml/src/ggml-common.h `block_*` of llama.cpp b11434.
F32 = TensorType("F32", 0, 1, 4)
F16 = TensorType("F16", 1, 1, 2)
Q5_0 = TensorType("Q5_0", 6, 32, 22, (0,))
Q5_1 = TensorType("Q5_1", 7, 32, 24, (0, 2))
Q8_0 = TensorType("Q8_0", 8, 32, 34, (0,))
Q4_K = TensorType("Q4_K", 12, 256, 144, (0, 2))
Q5_K = TensorType("Q5_K", 13, 256, 176, (0, 2))
Q6_K = TensorType("Q6_K", 14, 256, 210, (208,))
BF16 = TensorType("BF16", 30, 1, 2)

PLAIN = {"F32": F32, "F16": F16, "BF16": BF16}
"""The types that hold a checkpoint's own dtype, by that dtype's safetensors name."""


@frozen
class Change:
    """What the values of a checkpoint tensor go through before they are stored.

    `apply`: values of any floating-point dtype to others. `rows`: how many rows it needs at once
    (the rows of an attention head, say), counted from a multiple of that; 0 for all of them. A
    vector is always given whole, and so is what `apply` needs whole, in its own shape; anything
    else as a matrix of rows.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    rows: int = 1


@frozen
class Tensor:
    """A tensor of the file, and where its values come from.

    `shape`: outermost first, `(out, in)` for a matrix. `sources`: the checkpoint's tensors,
    stacked or one below the other in this order; without any, `load` gives the values, or `values`
    are them. `through`: the type that values are rounded to first.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    change: Change | None = None
    values: tuple[float, ...] = ()
    load: Callable[[], torch.Tensor] | None = None
    through: TensorType = F32
    type: TensorType = F32

    @property
    def size(self) -> int:
        """Bytes in the file, without padding."""
        return math.prod(self.shape) // self.type.block * self.type.size


def padded(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
"""How `struct` packs the numbers of each type: `enum gguf_type` in `ggml/include/gguf.h`."""


def encoded(value: Any, kind: int, inner: int | None = None) -> bytes:
    """A value of the type of that number; of an array with elements of type `inner`."""
    return struct.pack("<I", kind) + _bare(value, kind, inner)


def _bare(value: Any, kind: int, inner: int | None = None) -> bytes:
    if kind == _STRING:
        return _string(value.encode() if isinstance(value, str) else bytes(value))
    if kind == _ARRAY and inner is not None:
        items = b"".join(_bare(item, inner) for item in value)
        return struct.pack("<IQ", inner, len(value)) + items
    return struct.pack(f"<{_NUMBERS[kind]}", value)


def u32(value: int) -> bytes:
    """An unsigned 32-bit value."""
    return struct.pack("<II", 4, value)


def i32(value: int) -> bytes:
    """A signed 32-bit value."""
    return struct.pack("<Ii", 5, value)


def f32(value: float) -> bytes:
    """A 32-bit floating-point value."""
    return struct.pack("<If", 6, value)


def flag(value: bool) -> bytes:
    """A truth value."""
    return struct.pack("<I?", 7, value)


def text(value: str) -> bytes:
    """A UTF-8 string."""
    return struct.pack("<I", 8) + _string(value.encode())


def texts(values: Sequence[bytes]) -> bytes:
    """An array of strings, given as UTF-8."""
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(_string, values))


def i32s(values: Sequence[int]) -> bytes:
    """An array of signed 32-bit values."""
    return struct.pack(f"<IIQ{len(values)}i", 9, 5, len(values), *values)


def flags(values: Sequence[bool]) -> bytes:
    """An array of truth values."""
    return struct.pack(f"<IIQ{len(values)}?", 9, 7, len(values), *values)


def f32s(values: Sequence[float]) -> bytes:
    """An array of 32-bit floating-point values."""
    return struct.pack(f"<IIQ{len(values)}f", 9, 6, len(values), *values)


def _string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def preamble(metadata: Mapping[str, bytes], tensors: Sequence[Tensor]) -> bytes:
    """All bytes before the first tensor's data, padded.

    `metadata`: encoded values by key. The tensors' data must follow in the order given.
    """
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += (_string(key.encode()), value)
    offset = 0
    for tensor in tensors:
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        parts += (_string(tensor.name.encode()), dimensions)
        parts.append(struct.pack("<IQ", tensor.type.number, offset))
        offset += padded(tensor.size)
    joined = b"".join(parts)
    return joined.ljust(padded(len(joined)), b"\0")
