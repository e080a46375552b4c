"""The modes, and which tensor gets which type in each: llama.cpp's rules, so a mode's name means
the same here.

Source: `prepare_tensors` in `conversion/base.py`, and `tensor_allows_quantization`,
`llama_tensor_get_type_impl` and `tensor_type_fallback` in `src/llama-quant.cpp`, of llama.cpp
b11434.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from attrs import evolve, frozen

from ..models import Quantization
from .format import BF16, F16, F32, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, Tensor, TensorType


@frozen
class Mode:
    """One mode. `number`: `general.file_type`, of `enum llama_ftype` in `include/llama.h`.

    `default`: what a matrix becomes; `output`: what the output layer does, which may be the
    embedding. `more`: the type of values and down projections in the layers that get more bits.
    """

    number: int
    default: TensorType
    output: TensorType
    more: TensorType


MODES: Mapping[Quantization, Mode | None] = {
    "no_quantization": None,
    "q8_0": Mode(7, Q8_0, Q8_0, Q8_0),
    "q4_K_M": Mode(15, Q4_K, Q6_K, Q6_K),
    "q4_K_S": Mode(14, Q4_K, Q6_K, Q5_K),
}
"""Every mode by its public name."""

_PLAIN_NUMBERS = {F32: 0, F16: 1, BF16: 32}
_SMALLER = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}
"""What rows that are no whole blocks of 256 fall back to: blocks of 32."""

_FLOAT32 = re.compile(
    r"blk\.\d+\.ffn_gate_inp(_shexp)?\.weight|position_embd\.weight|token_types\.weight"
    r"|blk\.\d+\.ssm_conv1d\.weight|blk\.\d+\.shortconv\.conv\.weight"
)
"""Matrices that the converter leaves in float32."""

_AS_CONVERTED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel"
    r"|per_layer_model_proj|^position_embd\.weight|^token_types\.weight|ssm_conv1d"
    r"|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|time_mix_first\.weight"
    r"|time_mix_[wvag][012]\.weight|time_mix_decay_w[12]\.weight|time_mix_lerp_fused\.weight"
    r"|attn_rel_b\.weight|\.position_embd|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos"
    r"|\.patch_embd|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)
"""Matrices that `llama-quantize` leaves as they are."""

_LARGE = {"llama": 80, "qwen2": 80, "olmo": 80, "deci": 80, "jais2": 68}
"""Layers of what is `LLM_TYPE_70B` in `src/models`, by architecture."""

_BLOCK_NUMBER = re.compile(r"blk\.(\d+)\.")
_OUTPUT = "output.weight"
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_VALUES = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")


@frozen
class Network:
    """What the rules ask about a model.

    `architecture`: llama.cpp's name. `layers`, `experts`: how many, 0 for none. `grouped`: whether
    fewer key-value heads than query heads share the work.
    """

    architecture: str
    layers: int
    experts: int = 0
    grouped: bool = False

    @property
    def is_large(self) -> bool:
        """Whether it is what upstream calls the 70B model, which gets more bits for values."""
        shared = self.grouped or self.architecture != "llama"
        return shared and _LARGE.get(self.architecture) == self.layers


def converted(tensors: Sequence[Tensor], kind: TensorType) -> list[Tensor]:
    """`tensors` with the types that a file without quantization has; `kind`: of its matrices."""

    def plain(tensor: Tensor) -> TensorType:
        vector = len(tensor.shape) < 2 or tensor.name.endswith("_norm.weight")
        if vector or not tensor.name.endswith(".weight") or _FLOAT32.fullmatch(tensor.name):
            return F32
        return kind

    return [evolve(t, through=plain(t), type=plain(t)) for t in tensors]


def in_file_order(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The order in which `llama-quantize` writes: those of no block, then block by block."""

    def key(tensor: Tensor) -> tuple[int, str]:
        match = _BLOCK_NUMBER.match(tensor.name)
        return (int(match[1]) if match else -1, tensor.name)

    return sorted(tensors, key=key)


def assign_types(tensors: Sequence[Tensor], mode: Mode, network: Network) -> list[Tensor]:
    """Converted `tensors`, in the file's order, with the types that the mode gives them."""
    tied = all(tensor.name != _OUTPUT for tensor in tensors)
    values = sum(tensor.name.endswith(_VALUES) for tensor in tensors)
    met: Counter[str] = Counter()

    def final(tensor: Tensor) -> TensorType:
        name, columns = tensor.name, tensor.shape[-1]
        vector = len(dimensions(tensor.shape)) < 2
        if vector or not name.endswith("weight") or _AS_CONVERTED.search(name):
            return tensor.type
        if name == _OUTPUT or (tied and name in _EMBEDDINGS):
            falcon = network.architecture == "falcon"
            whole = columns % mode.default.block == 0 and not falcon
            return _fitting(mode.output if whole else Q8_0, columns)
        wanted = mode.default
        if name.endswith(_VALUES):
            wanted = _value_type(mode, network, met["values"], values)
            met["values"] += 1
        elif name.endswith("attn_k.weight"):
            wanted = Q8_0 if network.experts == 8 else wanted
        elif "ffn_down" in name:
            layer = _layer(name) if network.experts > 1 else met["down"]
            wanted = _down_type(mode, network, layer)
            met["down"] += 1
        elif name.endswith("attn_output.weight") and network.experts == 8 and mode.default == Q4_K:
            wanted = wanted if network.architecture == "falcon" else Q5_K
        return _fitting(wanted, columns)

    return [
        evolve(tensor, type=final(tensor), shape=dimensions(tensor.shape)) for tensor in tensors
    ]


def file_type(mode: Mode | None, kind: TensorType) -> int:
    """`general.file_type`: the mode's number, or without one that of the type of matrices."""
    return mode.number if mode else _PLAIN_NUMBERS[kind]


def _value_type(mode: Mode, network: Network, met: int, values: int) -> TensorType:
    """The rule for the `met`-th value projection of `values`."""
    wanted = mode.default
    if _gets_more(mode, met, values, 4):
        wanted = mode.more
    if network.is_large and wanted == Q4_K:
        wanted = Q5_K
    return Q8_0 if network.experts == 8 else wanted


def _down_type(mode: Mode, network: Network, layer: int) -> TensorType:
    layers = network.layers
    if network.architecture != "falcon":
        return mode.more if _gets_more(mode, layer, layers, layers // 8) else mode.default
    if mode.more == Q6_K:
        many = _more_bits(layer, layers)
        return Q6_K if layer < layers // 16 else Q5_K if many else mode.default
    return mode.default


def _gets_more(mode: Mode, number: int, count: int, first: int) -> bool:
    """In `_M` the first and last eighths and every third between; in `_S` the `first` ones."""
    return _more_bits(number, count) if mode.more == Q6_K else number < first


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def dimensions(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` as ggml has it, which counts no outer dimensions of size 1."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _layer(name: str) -> int:
    match = _BLOCK_NUMBER.match(name)
    return int(match[1]) if match else 0


def _fitting(wanted: TensorType, columns: int) -> TensorType:
    """`wanted`, or what upstream falls back to where rows are not whole blocks of it."""
    if columns % wanted.block == 0:
        return wanted
    smaller = _SMALLER.get(wanted, wanted)
    return F16 if columns % smaller.block else smaller
