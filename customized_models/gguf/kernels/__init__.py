"""The quantizers: float32 rows in, quantized rows out, bit for bit as `llama-quantize` has them.

There are two: our own, which Numba compiles, and ggml's, in the library that the wheel `xllamacpp`
brings. They give the same bytes; ours are several times faster. Both release the interpreter lock,
and rows do not depend on each other, so that blocks of rows may be quantized side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ...kernels import has_numba
from ..format import TensorType
from .ggml import Ggml

if TYPE_CHECKING:
    import torch


class Quantizer(Protocol):
    """Either of the two."""

    def __call__(self, rows: torch.Tensor, type_: TensorType) -> bytearray | memoryview:
        """`rows`: finite, contiguous float32 of shape `(rows, columns)`, whole blocks a row."""


def quantizer() -> Quantizer:
    """Our own where Numba is installed, else ggml's.

    Raises:
        MissingDependencyError: neither Numba nor xllamacpp is installed.
        UnsupportedVersionError: the installed xllamacpp lacks a function or disagrees on a type.
    """
    if not has_numba():
        return Ggml()
    from .compiled import Compiled

    return Compiled()


def check_quantizer() -> None:
    """Whether there is a quantizer; nothing is compiled.

    Raises: as `quantizer`.
    """
    if not has_numba():
        Ggml()
