"""A file's key-values and tensors, from a model's small files and headers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import (
    MalformedError,
    UnsupportedArchitectureError,
    UnsupportedQuantizationError,
    shown,
)
from ..files.reading import json_object
from ..files.safetensors import ModelSource, TensorInfo
from .family import Family, Values, checked, family_of, registered_family
from .format import F32, PLAIN, Tensor, TensorType, f32, i32, text, u32
from .kernels import check_quantizer
from .layout import converted_order, file_tensors
from .quantization import Mode, assign_types, converted, file_type, in_file_order
from .settings import Settings
from .tokenizer import TokenizerFiles
from .upstream import Converted, converted_upstream

_QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION

_SAMPLING: Mapping[str, tuple[str, Callable[[Any], bytes]]] = {
    "sequence": ("sequence", text),
    "top_k": ("top_k", i32),
    "top_p": ("top_p", f32),
    "min_p": ("min_p", f32),
    "xtc_probability": ("xtc_probability", f32),
    "xtc_threshold": ("xtc_threshold", f32),
    "temp": ("temperature", f32),
    "penalty_last_n": ("penalty_last_n", i32),
    "penalty_repeat": ("penalty_repeat", f32),
    "mirostat": ("mirostat", i32),
    "mirostat_tau": ("mirostat_tau", f32),
    "mirostat_eta": ("mirostat_eta", f32),
}
"""Keys under `general.sampling`: what `generation_config.json` calls them, and their type.

Source: `Metadata.load` in `gguf-py/gguf/metadata.py` of llama.cpp b11434.
"""


def planned(
    source: ModelSource,
    mode: Mode | None,
    *,
    name: str,
    chat_template: bool,
    llama_cpp: Path | None = None,
) -> tuple[Values, list[Tensor]]:
    """Key-values and tensors of the file; see `gguf.plan`.

    What upstream takes from a model card, or from the name of a directory, is left out.
    """
    document = _configuration(source)
    kind = matrix_type(source.tensors.infos)
    if llama_cpp is not None and registered_family(document) is None:
        model = converted_upstream(llama_cpp, source, kind, name=name, projector=False)
    else:
        family = family_of(document)(Settings(document))
        model = _converted(family, source, kind, name)
    metadata, tensors = model.metadata, model.tensors
    if mode is not None:
        check_quantizer()
        tensors = assign_types(in_file_order(tensors), mode, model.network)
        # `llama-quantize` sets both again, which puts them last.
        for key in ("general.quantization_version", "general.file_type"):
            metadata.pop(key, None)
        metadata["general.quantization_version"] = u32(_QUANTIZATION_VERSION)
        metadata["general.file_type"] = u32(file_type(mode, kind))
    if not chat_template:
        hidden = "tokenizer.chat_template"
        metadata = {key: metadata[key] for key in metadata if not key.startswith(hidden)}
    return metadata, tensors


def planned_projector(
    source: ModelSource, *, name: str, llama_cpp: Path | None
) -> tuple[Values, list[Tensor]]:
    """Key-values and tensors of the file for what a model sees with; see `gguf.plan_projector`."""
    _configuration(source)
    if llama_cpp is None:
        raise UnsupportedArchitectureError(
            "the file for what a model sees or hears with (mmproj) is made by llama.cpp's own "
            "converter: name a checkout of it (llama_cpp=...)"
        )
    kind = matrix_type(source.tensors.infos)
    model = converted_upstream(llama_cpp, source, kind, name=name, projector=True)
    return model.metadata, model.tensors


def _configuration(source: ModelSource) -> dict[str, Any]:
    if "config.json" not in source.files:
        raise MalformedError("the model directory has no config.json")
    return json_object(source.files["config.json"])


def _converted(family: Family, source: ModelSource, kind: TensorType, name: str) -> Converted:
    """What the family makes of the model: the file without quantization."""
    tensors = checked_layout(family, source.tensors.infos)
    metadata = {"general.architecture": text(family.architecture)}
    metadata |= _below(family, checked(family.architecture, family.leading_metadata))
    metadata |= {"general.type": text("model")} | _sampling(source.files)
    metadata |= {"general.name": text(name), "general.size_label": text(_size_label(tensors))}
    metadata |= _below(family, checked(family.architecture, family.metadata))
    if "general.file_type" in metadata:
        metadata["general.file_type"] = u32(file_type(None, kind))
    metadata["general.quantization_version"] = u32(_QUANTIZATION_VERSION)
    tokens = family.tokenizer(TokenizerFiles(source.files, _configuration(source)))
    metadata |= {f"tokenizer.{key}": value for key, value in tokens.items()}
    return Converted(metadata, converted(tensors, kind), family.network)


def matrix_type(infos: Mapping[str, TensorInfo]) -> TensorType:
    """The type of matrices in a file without quantization: that of the first 16-bit one, if any.

    Source: `ModelBase.__init__` in `conversion/base.py` of llama.cpp b11434, except that a
    checkpoint in float32 stays what it is.
    """
    for name in converted_order(infos):
        if len(infos[name].shape) > 1 and infos[name].dtype in ("BF16", "F16"):
            return PLAIN[infos[name].dtype]
    return F32


def checked_layout(family: Family, infos: Mapping[str, TensorInfo]) -> list[Tensor]:
    """The family's tensors, all of which come of plain floating-point ones.

    Raises:
        MalformedError, UnsupportedArchitectureError: as `file_tensors`.
        UnsupportedQuantizationError: a dtype that is not a plain 16- or 32-bit float.
    """
    tensors = file_tensors(family, infos)
    for tensor in tensors:
        for source in tensor.sources:
            if infos[source].dtype not in PLAIN:
                raise UnsupportedQuantizationError(
                    f"tensor {shown(source)} is {infos[source].dtype}; only "
                    f"{', '.join(PLAIN)} are converted"
                )
    return tensors


def _below(family: Family, values: Mapping[str, bytes]) -> Values:
    """The keys as the file has them: below the architecture's name, unless they are general."""
    return {
        key if key.startswith(("general.", "tokenizer.")) else f"{family.architecture}.{key}": value
        for key, value in values.items()
    }


def _sampling(files: Mapping[str, Path]) -> Values:
    """The recommended sampler in `generation_config.json`, by the keys llama.cpp reads."""
    if "generation_config.json" not in files:
        return {}
    generation = json_object(files["generation_config.json"])
    repeat: Any = generation.get("repetition_penalty")
    generation = {"penalty_repeat": repeat, **generation}
    result = {}
    for key, (name, encode) in _SAMPLING.items():
        value = generation.get(name)
        if value is None:
            continue
        number = type(value) in (int, float) and abs(value) < 1 << 31
        if not (isinstance(value, str) if encode is text else number):
            raise MalformedError(f"generation_config.json: {name} is {shown(value)}")
        value = int(value) if encode is i32 else value
        result[f"general.sampling.{key}"] = encode(value)
    return result


def _size_label(tensors: Sequence[Tensor]) -> str:
    """The number of parameters as people write it: "8x7B", "1.1B", "135M".

    Source: `get_total_parameter_count` in `gguf_writer.py` and `size_label` in `utility.py` of
    gguf in llama.cpp b11434.
    """
    total = shared = single = count = stacks = 0
    for tensor in tensors:
        size = math.prod(tensor.shape)
        total += size
        if "_exps." in tensor.name and len(tensor.shape) >= 3:
            experts = tensor.shape[-2 if ".bias" in tensor.name else -3]
            single, count, stacks = single + size // experts, count + experts, stacks + 1
        else:
            shared += size
    if not stacks:
        return _rounded(total)
    return f"{count // stacks}x{_rounded(shared + single)}"


def _rounded(count: int) -> str:
    for suffix, exponent in (("T", 12), ("B", 9), ("M", 6), ("K", 3)):
        if count > 10**exponent or suffix == "K":
            scaled = count * 10.0**-exponent
            digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
            return f"{scaled:.{digits}f}{suffix}"
    raise AssertionError("every count has a suffix")
