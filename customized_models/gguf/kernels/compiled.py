"""The formulas, compiled by Numba and kept between processes.

Numba's own cache looks at the file that a function is in and not at those that it calls, and fails
where its directory cannot be written. So the directory here has a name of its own for every state
of all the sources, belongs to the user alone, since what lies there is executed, and is done
without where it cannot be had.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import torch
from attrs import frozen
from numba.core import config

from ..format import Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, TensorType
from .ggml import Ggml

_SOURCES = ("lanes.py", "formulas.py")

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
        with _cache_directory():
            self._formulas = importlib.import_module(".formulas", __package__)

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
            with _no_cache_directory():
                self._formulas = importlib.reload(self._formulas)
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


@contextmanager
def _cache_directory() -> Iterator[None]:
    """Let Numba keep what is defined within in a directory of ours, or nowhere."""
    digest = hashlib.sha256(numba.__version__.encode())
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    directory = caches / "customized-models" / f"kernels-{digest.hexdigest()[:16]}"
    with _no_cache_directory():
        if _is_private(directory):
            config.CACHE_DIR = str(directory)
        yield


@contextmanager
def _no_cache_directory() -> Iterator[None]:
    before, config.CACHE_DIR = config.CACHE_DIR, ""
    try:
        yield
    finally:
        config.CACHE_DIR = before


def _is_private(directory: Path) -> bool:
    """Whether it is there, or could be made, and this user alone writes to it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError:
        return False
    own = status.st_uid == os.getuid() and not status.st_mode & 0o077
    return own and os.access(directory, os.W_OK)
