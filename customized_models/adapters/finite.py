"""Finds NaN and infinity in an adapter's tensors, which a training that diverged leaves there."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import NonFiniteError, listed
from ..files.reading import opened, read_at
from ..files.safetensors import BLOCK, ITEM_SIZE, TensorInfo
from .intake import WEIGHTS, Adapter

_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0 << 48}
"""The bits of the exponent, by dtype. All are set in NaN and infinity, and in no other number."""


def refuse_non_finite(adapter: Adapter) -> None:
    """Raise `NonFiniteError` if a tensor has NaN or infinity. Reads the weights once."""
    if wrong := set(_non_finite(adapter)):
        raise NonFiniteError(
            f"the adapter has NaN or infinity in {listed(wrong)}: its training has diverged; "
            f"register an earlier checkpoint, or train again with a smaller learning rate"
        )


def _non_finite(adapter: Adapter) -> Iterator[str]:
    with opened(adapter.directory / WEIGHTS) as fd:
        for name, info in adapter.tensors.items():
            if info.dtype in _EXPONENTS and _has_non_finite(fd, info):
                yield name


def _has_non_finite(fd: int, info: TensorInfo) -> bool:
    import numpy as np

    bits = _EXPONENTS[info.dtype]
    for start in range(info.start, info.end, BLOCK):  # a multiple of every width
        data = read_at(fd, start, min(BLOCK, info.end - start), info.file)
        numbers = np.frombuffer(data, f"<u{ITEM_SIZE[info.dtype]}")
        if ((numbers & bits) == bits).any():
            return True
    return False
