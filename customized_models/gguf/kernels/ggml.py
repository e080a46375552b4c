"""ggml's own quantizers, called in the library that the wheel `xllamacpp` brings."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MissingDependencyError, UnsupportedVersionError, shown
from ..format import BF16, F16, F32, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, TensorType

if TYPE_CHECKING:
    import torch

_SYMBOLS = (
    "ggml_quantize_chunk", "ggml_type_name", "ggml_row_size",
)  # fmt: skip
_TYPES = (F32, F16, BF16, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K)
INSTALL = "pip install 'customized-models[llama-cpp]'"


class Ggml:
    """Float32 rows in, quantized rows out, bit for bit as `llama-quantize` has them.

    Calls release the interpreter lock, and rows do not depend on each other, so that blocks of
    rows may be quantized side by side.
    """

    def __init__(self) -> None:
        """Load the library and check that it means by each type what this package does.

        Raises:
            MissingDependencyError: the wheel is not installed.
            UnsupportedVersionError: its library lacks a function or disagrees on a type.
        """
        path = _library()
        try:
            self._library: Any = ctypes.CDLL(str(path))
            for symbol in _SYMBOLS:
                getattr(self._library, symbol)
        except (OSError, AttributeError) as error:
            raise UnsupportedVersionError(
                f"the installed xllamacpp has no ggml to quantize with ({shown(error)}); {INSTALL}"
            ) from error
        _declare(self._library)
        for type_ in _TYPES:
            name = self._library.ggml_type_name(type_.number)
            size = self._library.ggml_row_size(type_.number, 256)
            if (
                name or b""
            ).decode().upper() != type_.name or size != 256 // type_.block * type_.size:
                raise UnsupportedVersionError(
                    f"the installed xllamacpp has another {type_.name} than llama.cpp; {INSTALL}"
                )

    def __call__(self, rows: torch.Tensor, type_: TensorType) -> bytearray:
        """`rows`: finite, contiguous float32 of shape `(rows, columns)`, whole blocks a row.

        Raises:
            UnsupportedVersionError: the library did not do what it is there for.
        """
        count, columns = rows.shape
        out = bytearray(count * columns // type_.block * type_.size)
        target = (ctypes.c_char * len(out)).from_buffer(out)
        done = self._library.ggml_quantize_chunk(
            type_.number, rows.data_ptr(), ctypes.addressof(target), 0, count, columns, None
        )
        if done != len(out):
            raise UnsupportedVersionError(
                f"the installed xllamacpp quantized {len(out)} bytes of {type_.name} wrongly"
            )
        return out


def _library() -> Path:
    found = importlib.util.find_spec("xllamacpp")
    directories = list(found.submodule_search_locations or ()) if found else []
    for directory in directories:
        for path in sorted(Path(directory).glob("xllamacpp*.so")):
            return path
    raise MissingDependencyError(
        "quantizing needs Numba, which is faster, or xllamacpp: "
        "pip install 'customized-models[gguf]', or [llama-cpp]"
    )


def _declare(library: Any) -> None:
    """State the C signatures of `ggml/include/ggml.h`; ctypes would take every size for an int."""
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_name.argtypes = [ctypes.c_int]
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
