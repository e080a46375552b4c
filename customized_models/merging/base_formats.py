"""Quantized bases: which ones transformers turns into 16-bit weights, and why others are refused.

One table, one row a quantization method. `QUANTIZATION_METHODS` is compared with transformers'
own list by `tests/test_quantized.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from ..errors import MalformedError, UnsupportedBaseError, shown
from ..files.reading import json_object
from ..files.safetensors import TensorInfo

HINT = (
    "merge onto the 16-bit model it was quantized from: add that as a base model and register the "
    "adapter on it"
)

_PACKED = "its codes are laid out for the kernels that multiply them"
_ROUNDED = "its values before they were rounded are lost, and a merge would be rounded again"
_CODEBOOK = "its weights are looked up in codebooks, which a change of the weights does not fit"
_MANY = "the name stands for many formats of packed codes"
_NO_16_BIT = "transformers does not turn its weights into 16-bit ones"


@frozen
class QuantizationMethod:
    """A `quant_method` of a `config.json`.

    Attributes:
        name: As the configuration has it; `bitsandbytes` has one row for each number of bits.
        label: What people call it.
        refused: Why a base with it is refused; empty if transformers turns its weights into 16-bit
            ones on any machine, with the same bits.
        options: Keys of the `quantization_config` that do not change which weights it stands for.
    """

    name: str
    label: str
    refused: str
    options: tuple[str, ...] = ()


_METHODS = (
    QuantizationMethod("aqlm", "AQLM", _CODEBOOK),
    QuantizationMethod("auto-round", "AutoRound", _PACKED),
    QuantizationMethod("autoround", "AutoRound", _PACKED),
    QuantizationMethod("awq", "AWQ", _PACKED),
    QuantizationMethod("bitnet", "BitNet", "its weights have three values, which a merge leaves"),
    QuantizationMethod("bitsandbytes_4bit", "bitsandbytes in 4 bits", _ROUNDED),
    QuantizationMethod("bitsandbytes_8bit", "bitsandbytes in 8 bits", _ROUNDED),
    QuantizationMethod("compressed-tensors", "compressed-tensors", _MANY),
    QuantizationMethod("eetq", "EETQ", _PACKED),
    QuantizationMethod("fbgemm_fp8", "FBGEMM FP8", "transformers loads its weights on a GPU only"),
    QuantizationMethod("fouroversix", "Four Over Six", _PACKED),
    QuantizationMethod(
        "fp8", "FP8", "",
        ("activation_scheme", "dequantize", "fmt", "ignored_layers", "modules_to_not_convert",
         "quant_method", "scale_fmt", "weight_block_size"),
    ),
    QuantizationMethod(
        "fp_quant", "FP-Quant",
        "its weights are rotated by Hadamard matrices before they are rounded",
    ),
    QuantizationMethod("gemma", "Gemma's quantization", _NO_16_BIT),
    QuantizationMethod("gguf", "GGUF", _PACKED),
    QuantizationMethod("gptq", "GPTQ", f"{_PACKED}, and PEFT refuses to merge into them"),
    QuantizationMethod("higgs", "HIGGS", _CODEBOOK),
    QuantizationMethod("hqq", "HQQ", _ROUNDED),
    QuantizationMethod("metal", "Metal", _PACKED),
    QuantizationMethod("modelopt", "ModelOpt", "transformers does not load its weights"),
    QuantizationMethod("modelopt_fp4", "ModelOpt NVFP4", "transformers does not load its weights"),
    QuantizationMethod(
        "mxfp4", "MXFP4", "", ("dequantize", "modules_to_not_convert", "quant_method")
    ),
    QuantizationMethod("mxfp8", "MXFP8", "this version does not read its scales"),
    QuantizationMethod("nvfp4", "NVFP4", _NO_16_BIT),
    QuantizationMethod("quanto", "Quanto", _ROUNDED),
    QuantizationMethod("quark", "Quark", _MANY),
    QuantizationMethod("sinq", "SINQ", _PACKED),
    QuantizationMethod("spqr", "SpQR", "its weights are codes and a sparse matrix of outliers"),
    QuantizationMethod("torchao", "TorchAO", _MANY),
    QuantizationMethod("vptq", "VPTQ", _CODEBOOK),
)  # fmt: skip

QUANTIZATION_METHODS: dict[str, QuantizationMethod] = {row.name: row for row in _METHODS}
"""The rows by their name."""

CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8")
"""Dtypes whose elements mean nothing without scales."""

_SCALES_OF_FP8 = ("weight_scale_inv", "scale", "qscale_weight")  # the names transformers reads
_DTYPES_OF_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_MXFP4_BYTES = 16  # of a scale's 32 values, of four bits each; OCP MX specification 1.0, section 5

_REFUSED_KEYS = {
    "compression_config": f"the base model is compressed; {HINT}",
    "transformers_weights": "it loads weights from files of other names",
}


def refuse_base(directory: Path) -> None:
    """Refuse a base whose tensors are not, and do not become, what the model computes with.

    Raises:
        UnsupportedBaseError: Naming the key of its `config.json` and the reason.
        MalformedError: Its `config.json` states no model type, or a quantization that is none.
    """
    config = json_object(directory / "config.json")
    for key, reason in _REFUSED_KEYS.items():
        if config.get(key):
            raise UnsupportedBaseError(f"the base's config.json has {key}: {reason}")
    if dequantized_from(config) is None and (directory / "hf_quant_config.json").exists():
        raise UnsupportedBaseError(
            f"the base has a hf_quant_config.json: it is quantized by ModelOpt; {HINT}"
        )
    if not isinstance(config.get("model_type"), str):
        raise MalformedError("the base's config.json has no model_type")


def dequantized_from(config: Mapping[str, Any]) -> str | None:
    """The quantization method that transformers turns into 16-bit weights.

    Args:
        config: The JSON object of the base's `config.json`.

    Returns:
        The `quant_method`; None if the base is not quantized.

    Raises:
        UnsupportedBaseError: Another method, or an option that this version does not know.
        MalformedError: `quantization_config` is not an object.
    """
    if _stated(config.get("text_config") or {}):
        raise UnsupportedBaseError(
            f"the base's config.json has quantization_config in its text_config; {HINT}"
        )
    stated = _stated(config)
    if not stated:
        return None
    method = _method(stated)
    for key, value in stated.items():
        if value and key not in method.options:
            raise UnsupportedBaseError(
                f"the base's quantization_config of {method.name} has {shown(key)} set, and this "
                f"version does not know what it does to the weights; {HINT}"
            )
    scheme = stated.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):  # either way the weights are the same
        raise UnsupportedBaseError(
            f"the base's quantization_config has the unknown activation_scheme {shown(scheme)}"
        )
    if method.name == "fp8":
        _block(stated)
    return method.name


def _stated(config: Any) -> dict[str, Any]:
    stated = config.get("quantization_config") if isinstance(config, Mapping) else None
    if stated and not isinstance(stated, dict):
        raise MalformedError("the base's quantization_config is not a JSON object")
    return stated or {}


def _method(stated: Mapping[str, Any]) -> QuantizationMethod:
    """The row of a `quantization_config`, if its bases can be merged into."""
    name = stated.get("quant_method")
    if stated.get("load_in_4bit") or stated.get("load_in_8bit") or name == "bitsandbytes":
        name = f"bitsandbytes_{8 if stated.get('load_in_8bit') else 4}bit"
    method = QUANTIZATION_METHODS.get(name) if isinstance(name, str) else None
    if name is None:
        why = "it names no method of quantization"
    elif method is None:
        why = f"this version does not know the method {shown(name)}"
    elif method.refused:
        why = f"the base model is quantized by {method.label}: {method.refused}"
    else:
        return method
    fits = " (QLoRA adapters fit it unchanged)" if "bitsandbytes" in str(name) else ""
    raise UnsupportedBaseError(
        f"the base's config.json has quantization_config: {why}; {HINT}{fits}"
    )


def _block(stated: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale; None if all of them do.

    Source: transformers' `FineGrainedFP8Config`, whose default is (128, 128).
    """
    block = stated.get("weight_block_size", (128, 128))
    if block is None:
        return None
    sizes = isinstance(block, list | tuple) and all(type(n) is int and n > 0 for n in block)
    if not sizes or len(block) != 2:
        raise MalformedError(f"the base's weight_block_size {shown(block)} is not two sizes")
    return block[0], block[1]


def refuse_unreadable_codes(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    """Refuse quantized tensors to which transformers would give other values than they stand for.

    Args:
        config: The JSON object of the base's `config.json`.
        infos: All tensors of its checkpoint.

    Raises:
        UnsupportedBaseError: Naming a tensor and what is missing or odd about it; or as
            `dequantized_from`.
    """
    method, stated = dequantized_from(config), _stated(config)
    for name, info in infos.items():
        if method is None or info.dtype not in CODES:
            continue
        odd = _odd_fp8(info, infos, _block(stated)) if method == "fp8" else _odd_mxfp4(info, infos)
        if odd:
            raise UnsupportedBaseError(
                f"{shown(name)} is quantized to {info.dtype} and {odd}; {HINT}"
            )


def _odd_fp8(
    info: TensorInfo, infos: Mapping[str, TensorInfo], block: tuple[int, int] | None
) -> str | None:
    """Why transformers does not multiply it by its scales, or by the wrong ones.

    Source: transformers' `integrations/finegrained_fp8.py`, `Fp8Dequantize.convert`.
    """
    module, _, parameter = info.name.rpartition(".")
    if parameter in _SCALES_OF_FP8 and info.dtype in _DTYPES_OF_SCALES:
        return None
    if not info.dtype.startswith("F8"):
        return "packed, which this version does not know of FP8"
    found = [infos[f"{module}.{s}"] for s in _SCALES_OF_FP8 if f"{module}.{s}" in infos]
    if parameter != "weight" or len(found) != 1:
        return "transformers finds no weight_scale_inv of it"
    scales = found[0]
    if scales.dtype not in _DTYPES_OF_SCALES:
        return f"its scales are {scales.dtype}"
    if scales.shape in ((), (1,), (1, 1)):
        return None
    if len(info.shape) != 2:
        return f"has the shape {info.shape}, which has no blocks"
    if block is None:
        per_row = scales.shape == (info.shape[0], 1)
        return None if per_row else f"has {scales.shape} scales, neither one nor one a row"
    grid = tuple(-(-size // of) for size, of in zip(info.shape, block, strict=True))
    if scales.shape != grid:
        return f"has {scales.shape} scales for {grid} blocks"
    if any(size % of and size > of for size, of in zip(info.shape, block, strict=True)):
        return f"its shape {info.shape} is not whole blocks of {block}: transformers misplaces them"
    return None


def _odd_mxfp4(info: TensorInfo, infos: Mapping[str, TensorInfo]) -> str | None:
    """Why transformers does not turn it into a weight of an expert.

    Source: transformers' `integrations/mxfp4.py`, `Mxfp4Dequantize.convert`.
    """
    name, _, part = info.name.rpartition("_")
    pair = infos.get(f"{name}_blocks"), infos.get(f"{name}_scales")
    if part not in ("blocks", "scales") or not name.endswith((".gate_up_proj", ".down_proj")):
        return "no expert's gate_up_proj or down_proj"
    if None in pair or info.dtype != "U8" or name in infos:
        return "not one of a pair of _blocks and _scales in U8"
    blocks, scales = pair
    whole = (
        blocks and scales and len(scales.shape) == 3
        and (*scales.shape, _MXFP4_BYTES) == blocks.shape
    )  # fmt: skip
    return None if whole else "its pair does not have 32 values for each scale"
