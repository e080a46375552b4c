"""Quantized bases that become 16-bit models, by transformers' own dequantization.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from ..errors import UnsupportedBaseError, listed
from ..files.reading import json_object
from ..files.safetensors import Checkpoint
from .base_formats import CODES, HINT, dequantized_from
from .conversion import Conversion, Conversions
from .model_choice import text_config

_KEY = "quantization_config"


def take_quantizer(config: Any) -> Any:
    """Remove the quantization from a transformers configuration.

    Returns:
        Transformers' quantizer that dequantizes a model of that configuration; None if it is not
        quantized.
    """
    quantizer = None
    for holder in (text_config(config), config):
        if stored := getattr(holder, _KEY, None):
            given = {**stored, "dequantize": True}
            quantizer = AutoHfQuantizer.from_config(given, pre_quantized=True)
        if hasattr(holder, _KEY):
            delattr(holder, _KEY)
    return quantizer


def describe_base(base: Checkpoint) -> str:
    """What a recipe says about how the base was read."""
    method = dequantized_from(json_object(base.directory / "config.json"))
    return f"dequantized from {method}" if method else "as stored"


def quantized_conversions(base: Checkpoint, conversions: Conversions) -> tuple[Conversion, ...]:
    """The conversions that dequantize.

    Raises:
        UnsupportedBaseError: transformers would leave codes or scales as they are.
    """
    every = (*conversions.by_parameter.values(), *conversions.ignored)
    found = tuple(dict.fromkeys(one for one in every if one.quantized))
    used = {name for one in found for name in one.tensors if not one.unsupported_reason}
    if left := {name for name, info in base.infos.items() if info.dtype in CODES} - used:
        raise UnsupportedBaseError(
            f"the base is quantized, and transformers does not dequantize {listed(left)}; {HINT}"
        )
    return found
