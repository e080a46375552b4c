"""Finds NaN and infinity in tensors, which a training that diverged leaves there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from .reading import opened, read_at
from .safetensors import BLOCK, ITEM_SIZE, TensorInfo

_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0 << 48}
"""The bits of the exponent, by dtype. All are set in NaN and infinity, and in no other number."""


def non_finite(path: Path, infos: Iterable[TensorInfo]) -> Iterator[str]:
    """The names of those tensors of a file that have NaN or infinity; their bytes are read once."""
    with opened(path) as fd:
        for info in infos:
            if info.dtype in _EXPONENTS and _has_non_finite(fd, info):
                yield info.name


def _has_non_finite(fd: int, info: TensorInfo) -> bool:
    import numpy as np

    bits = _EXPONENTS[info.dtype]
    for start in range(info.start, info.end, BLOCK):  # a multiple of every width
        data = read_at(fd, start, min(BLOCK, info.end - start), info.file)
        numbers = np.frombuffer(data, f"<u{ITEM_SIZE[info.dtype]}")
        if ((numbers & bits) == bits).any():
            return True
    return False
