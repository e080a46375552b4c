"""Quantized bases that become 16-bit models on the way, by transformers' own dequantization.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from ..errors import UnsupportedBaseError, listed
from ..files.reading import json_object
from ..files.safetensors import Checkpoint
from .base_formats import CODES, HINT, dequantized_from
from .conversion import Loading, Unit

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


def treatment_of(base: Checkpoint) -> str:
    """What a recipe says of the base."""
    method = dequantized_from(json_object(base.directory / "config.json"))
    return f"dequantized from {method}" if method else "as stored"


def dequantized_units(base: Checkpoint, loading: Loading) -> tuple[Unit, ...]:
    """All that is dequantized.

    Raises:
        UnsupportedBaseError: transformers would leave codes or scales as they are.
    """
    every = (*loading.units.values(), *loading.ignored)
    units = tuple(dict.fromkeys(unit for unit in every if unit.quantized))
    used = {name for unit in units for name in unit.tensors if not unit.flaw}
    if left := {name for name, info in base.infos.items() if info.dtype in CODES} - used:
        raise UnsupportedBaseError(
            f"the base is quantized, and transformers does not dequantize {listed(left)}; {HINT}"
        )
    return units
