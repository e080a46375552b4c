"""Which tensor gets which type: llama.cpp's own rules, so that a mode's name means the same here.

Source: `src/llama-quant.cpp` of llama.cpp b11434, `llama_tensor_get_type_impl` and
`tensor_type_fallback`, as far as they concern the Llama architecture without experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from attrs import evolve

from ..models import Quantization
from .format import BF16, F16, F32, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, Tensor, TensorType

FILE_TYPES: dict[str, int] = {"q8_0": 7, "q4_K_S": 14, "q4_K_M": 15}
"""`general.file_type` by mode: `enum llama_ftype` in `include/llama.h`."""

_PLAIN_FILE_TYPES = {F32: 0, F16: 1, BF16: 32}
_DEFAULT: dict[str, TensorType] = {"q8_0": Q8_0, "q4_K_S": Q4_K, "q4_K_M": Q4_K}
_FALLBACK = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_BLOCK_NUMBER = re.compile(r"blk\.(\d+)\.")
_OUTPUT = "output.weight"
_EMBEDDING = "token_embd.weight"


def in_file_order(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The order in which `llama-quantize` writes: those of no block, then block by block."""

    def key(tensor: Tensor) -> tuple[int, str]:
        match = _BLOCK_NUMBER.match(tensor.name)
        return (int(match[1]) if match else -1, tensor.name)

    return sorted(tensors, key=key)


def mixed(
    tensors: Sequence[Tensor], quantization: Quantization, *, layers: int, grouped: bool
) -> list[Tensor]:
    """`tensors` with the types that the mode gives them; vectors and norms keep their own.

    `grouped`: whether fewer key-value heads than query heads share the work.
    """
    if quantization == "no_quantization":
        return list(tensors)
    tied = all(tensor.name != _OUTPUT for tensor in tensors)
    # What upstream calls the 70B model is any with 80 layers and grouped attention.
    shared_values = layers == 80 and grouped

    def final(tensor: Tensor) -> TensorType:
        if len(tensor.shape) < 2 or tensor.name.endswith("_norm.weight"):
            return tensor.type
        columns = tensor.shape[-1]
        if tensor.name == _OUTPUT or (tied and tensor.name == _EMBEDDING):
            return _fitting(_output_type(_DEFAULT[quantization], columns), columns)
        wanted = _block_type(tensor.name, quantization, layers)
        if shared_values and wanted == Q4_K and tensor.name.endswith("attn_v.weight"):
            wanted = Q5_K
        return _fitting(wanted, columns)

    return [evolve(tensor, type=final(tensor)) for tensor in tensors]


def file_type(tensors: Sequence[Tensor], quantization: Quantization) -> int:
    """`general.file_type`: the mode, or without one the type of most matrix elements."""
    if quantization != "no_quantization":
        return FILE_TYPES[quantization]
    sizes = dict.fromkeys(_PLAIN_FILE_TYPES, 0)
    for tensor in tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.type] += tensor.size // tensor.type.size
    return _PLAIN_FILE_TYPES[max(sizes, key=lambda type_: sizes[type_])]


def _output_type(default: TensorType, columns: int) -> TensorType:
    return Q8_0 if default == Q8_0 or columns % default.block else Q6_K


def _block_type(name: str, quantization: Quantization, layers: int) -> TensorType:
    """Upstream counts value and down projections as it meets them; here that is the layer."""
    match = _BLOCK.fullmatch(name)
    default = _DEFAULT[quantization]
    if match is None or match[2] not in ("attn_v", "ffn_down"):
        return default
    layer = int(match[1])
    if quantization == "q4_K_M" and _more_bits(layer, layers):
        return Q6_K
    if quantization == "q4_K_S" and layer < (4 if match[2] == "attn_v" else layers // 8):
        return Q5_K
    return default


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(wanted: TensorType, columns: int) -> TensorType:
    """`wanted`, or what upstream falls back to where rows are not whole blocks of it."""
    if columns % wanted.block == 0:
        return wanted
    smaller = _FALLBACK.get(wanted, wanted)
    return F16 if columns % smaller.block else smaller
