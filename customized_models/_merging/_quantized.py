"""Quantized bases that become 16-bit models on the way, by transformers' own dequantization.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from .._checkpoints import FLOATS, Checkpoint, TensorInfo, json_object
from .._errors import UnsupportedAdapterError, listed
from ._loading import Loading, Unit

_KEY = "quantization_config"


def take_quantizer(config: Any) -> Any:
    """What dequantizes a model of that configuration, which is one without it then; else None."""
    quantizer = None
    for holder in (config.get_text_config(), config):
        if stored := getattr(holder, _KEY, None):
            given = {**stored, "dequantize": True}
            quantizer = AutoHfQuantizer.from_config(given, pre_quantized=True)
        if hasattr(holder, _KEY):
            delattr(holder, _KEY)
    return quantizer


def treatment_of(quantizer: Any) -> str:
    """What a recipe says of the base."""
    if quantizer is None:
        return "as stored"
    return f"dequantized from {quantizer.quantization_config.quant_method.value}"


def without_quantization(base: Checkpoint) -> dict[str, Any]:
    """What to change in `config.json` so that it speaks of no quantization."""
    document = json_object(base.directory / "config.json")
    changes: dict[str, Any] = {_KEY: None} if _KEY in document else {}
    inner = document.get("text_config")
    if isinstance(inner, dict) and _KEY in inner:
        changes["text_config"] = {key: value for key, value in inner.items() if key != _KEY}
    return changes


def dequantized_units(base: Checkpoint, loading: Loading, quantizer: Any) -> tuple[Unit, ...]:
    """All that is dequantized.

    Raises:
        UnsupportedAdapterError: transformers would leave codes or scales behind, or apply scales
            to other elements than they are for.
    """
    units = tuple(dict.fromkeys(unit for unit in loading.units.values() if unit.quantized))
    used = {name for unit in units if len(unit.tensors) > 1 for name in unit.tensors}
    loaded = {name for unit in loading.units.values() for name in unit.tensors}
    codes = {name for name, info in base.infos.items() if _is_code(info)}
    scales = {name for name in base.infos.keys() - loaded if "scale" in name.rpartition(".")[2]}
    if left := (codes | scales) - used:
        raise UnsupportedAdapterError(
            f"the base is quantized, and transformers cannot dequantize {listed(left)}; use the "
            f"model it was made from"
        )
    block: Any = getattr(quantizer.quantization_config, "weight_block_size", None)
    if odd := {name for name in codes if block and _is_cut(base.infos[name], block)}:
        raise UnsupportedAdapterError(
            f"the base is quantized in blocks of {block[0]} by {block[1]}, of which transformers "
            f"takes those at the edges of {listed(odd)} for smaller ones; use the model it was "
            f"made from"
        )
    if flawed := {name for unit in units if unit.flaw for name in unit.tensors}:
        raise UnsupportedAdapterError(
            f"the base is quantized, and transformers cannot dequantize {listed(flawed)}; use the "
            f"model it was made from"
        )
    return units


def _is_code(info: TensorInfo) -> bool:
    return info.dtype not in FLOATS and not info.dtype.startswith(("I3", "I6", "BOOL", "U3", "U6"))


def _is_cut(info: TensorInfo, block: list[int]) -> bool:
    """Whether the last blocks of a dimension are not whole."""
    sizes = zip(info.shape[-2:], block, strict=False)
    return any(size > length and size % length for size, length in sizes)
