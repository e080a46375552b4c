"""The formulas, compiled by Numba and kept between processes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from attrs import frozen

from ...kernels.cache import import_kept, reload_unkept
from ..format import Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, TensorType
from .ggml import Ggml

Quantize = Callable[[torch.Tensor], bytearray | memoryview]


@frozen
class _Formula:
    """One row a type.

    `name`: in `formulas`. `shape`: sub-blocks of a block, and weights of one. `tile`: how many
    blocks fill the lanes. `probe`: what ggml makes of `_probe()`, as SHA-256 cut to 16 digits.
    """

    name: str
    shape: tuple[int, ...]
    tile: int
    probe: str


_FORMULAS = {
    Q4_K: _Formula("q4_k", (8, 32), 2, "bc29e99c43359ac8"),
    Q5_K: _Formula("q5_k", (8, 32), 2, "461ed34fff69b476"),
    Q6_K: _Formula("q6_k", (16, 16), 1, "e151af768e9509e3"),
    Q8_0: _Formula("q8_0", (32,), 1, "26061ebf7072b6f3"),
    Q5_0: _Formula("q5_0", (32,), 1, "c0b0e155abc04446"),
    Q5_1: _Formula("q5_1", (32,), 1, "f0b2b6868b2449e2"),
}


class Compiled:
    """Our quantizers; see `kernels.Quantizer`.

    A type is compiled when it is first asked for, and then checked: where a processor or a version
    of Numba makes other numbers, ggml does that type.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready: dict[TensorType, Quantize] = {}
        self._formulas = import_kept("formulas", __package__ or "")

    def __call__(self, rows: torch.Tensor, type_: TensorType) -> bytearray | memoryview:
        """See `kernels.Quantizer`.

        Raises:
            MissingDependencyError: ggml would have to do it, and is not there.
        """
        with self._lock:
            if type_ not in self._ready:
                self._ready[type_] = self._prepared(type_)
        return self._ready[type_](rows)

    def _prepared(self, type_: TensorType) -> Quantize:
        try:
            matches = self._matches(type_)
        except OSError:  # the cache's disk is full, say
            self._formulas = reload_unkept(self._formulas)
            matches = self._matches(type_)
        if not matches:
            ggml = Ggml()
            return lambda rows: ggml(rows, type_)
        return lambda rows: _quantized(self._formulas, rows, type_)

    def _matches(self, type_: TensorType) -> bool:
        found = hashlib.sha256(_quantized(self._formulas, _probe(), type_)).hexdigest()
        return found.startswith(_FORMULAS[type_].probe)


def _quantized(formulas: ModuleType, rows: torch.Tensor, type_: TensorType) -> memoryview:
    formula = _FORMULAS[type_]
    run: Callable[[Any, Any], None] = getattr(formulas, formula.name)
    blocks = rows.numpy().reshape(-1, *formula.shape)
    out = np.empty((len(blocks), type_.size), np.uint8)
    whole = len(blocks) // formula.tile * formula.tile
    run(blocks[:whole], out[:whole])
    if whole < len(blocks):  # the last tile is filled up with zeros
        rest = np.zeros((formula.tile, *formula.shape), np.float32)
        rest[: len(blocks) - whole] = blocks[whole:]
        theirs = np.empty((formula.tile, type_.size), np.uint8)
        run(rest, theirs)
        out[whole:] = theirs[: len(blocks) - whole]
    return out.reshape(-1).data


def _probe() -> torch.Tensor:
    """Rows of 256: numbers of many sizes, all exact in float32, and one row of zeros."""
    numbers = torch.arange(7 * 256, dtype=torch.int64)
    mixed = (numbers * 2654435761 % (1 << 24) - (1 << 23)).to(torch.float32)
    sizes = torch.tensor([2.0**-exponent for exponent in (20, 24, 26, 28, 30, 36, 44)])
    return torch.cat([mixed.view(7, 256) * sizes[:, None], torch.zeros(1, 256)])
