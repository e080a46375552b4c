"""A model's tensors as one GGUF file, written in a single pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from ..errors import MalformedError, UnsupportedArchitectureError, shown
from ..files.reading import json_object
from ..files.safetensors import ModelSource
from ..models import Progress, Quantization, checked_quantization
from .families.llama import ARCHITECTURES
from .format import Tensor, f32, i32, padded, preamble, text, u32

_QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION

_SAMPLING = {
    "top_k": ("top_k",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "temp": ("temperature",),
    "penalty_repeat": ("penalty_repeat", "repetition_penalty"),
}
"""Keys under `general.sampling`, and what `generation_config.json` calls them."""


@frozen
class GGUFFile:
    """A finished file: `digest` is `sha256:` of its `size` bytes.

    A context manager, like everything that a `backends.Artifact` gives.
    """

    path: Path
    size: int
    digest: str

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        """The artifact that gave it lets go of it."""


@frozen
class GGUFPlan:
    """A file that can be written: everything about it is known but the tensors' values.

    Law: `plan.write(path, progress).size == plan.size`.
    """

    _source: ModelSource = field(repr=False)
    _preamble: bytes = field(repr=False)
    _tensors: tuple[Tensor, ...] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self._preamble) + sum(padded(tensor.size) for tensor in self._tensors)

    @property
    def types(self) -> Mapping[str, str]:
        """The type's name by tensor, as in the file: `{"blk.0.attn_q.weight": "Q4_K", ...}`."""
        return {tensor.name: tensor.type.name for tensor in self._tensors}

    def write(self, path: Path, progress: Progress) -> GGUFFile:
        """Read each tensor once and write the file, flushed to the disk; replaces what is there.

        Calls `progress("quantizing", bytes done, bytes in all)` after each block. What is raised
        there or elsewhere leaves no file behind.

        Raises:
            NonFiniteError: a tensor holds NaN or infinity, or a value its type cannot hold.
            IntegrityError: a tensor is not what the plan was made for.
            OSError: the disk refused it.
        """
        from .writing import write

        size, digest = write(path, self._preamble, self._tensors, self._source, progress)
        return GGUFFile(path, size, digest)


def check_architecture(config: Mapping[str, Any]) -> None:
    """Whether a model with this `config.json` can become a GGUF file, by its class alone.

    Raises:
        UnsupportedArchitectureError: it cannot; the message names the classes that can.
    """
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"no GGUF mapping for the architecture {shown(named)}; "
            f"there is one for {', '.join(ARCHITECTURES)}"
        )


def plan(
    source: ModelSource, quantization: Quantization, *, name: str, chat_template: bool
) -> GGUFPlan:
    """Plan the file from configuration, tokenizer and tensor headers; no tensor is read.

    `name`: `general.name` in the file. `chat_template`: whether `tokenizer.chat_template` goes in.

    Raises:
        MalformedError: a file is missing or does not parse, or tensors do not fit `config.json`.
        UnsupportedError: the architecture, a setting, the tokenizer or the mode cannot be
            converted exactly; or the wheel that quantizes is missing or not fit.
    """
    from .families import llama as _llama
    from .kernel import Kernel
    from .quantization import file_type, in_file_order, mixed
    from .tokenizer import tokenizer_metadata

    checked_quantization(quantization)
    if "config.json" not in source.files:
        raise MalformedError("the model directory has no config.json")
    config = json_object(source.files["config.json"])
    check_architecture(config)
    model = _llama.read_config(config)
    stored = in_file_order(_llama.tensors(model, source.tensors.infos))
    tensors = mixed(
        stored, quantization, layers=model.layers, grouped=model.heads != model.kv_heads
    )
    if quantization != "no_quantization":
        Kernel()
    metadata = {"general.architecture": text("llama"), "general.type": text("model")}
    metadata |= _sampling(source.files)
    metadata["general.name"] = text(name)
    metadata |= _llama.metadata(model)
    metadata |= tokenizer_metadata(
        source.files, config, model.vocabulary, chat_template=chat_template
    )
    metadata["general.quantization_version"] = u32(_QUANTIZATION_VERSION)
    metadata["general.file_type"] = u32(file_type(tensors, quantization))
    return GGUFPlan(source, preamble(metadata, tensors), tuple(tensors))


def _sampling(files: Mapping[str, Path]) -> dict[str, bytes]:
    """The recommended sampler in `generation_config.json`, by the keys llama.cpp reads."""
    if "generation_config.json" not in files:
        return {}
    generation = json_object(files["generation_config.json"])
    result = {}
    for key, names in _SAMPLING.items():
        value = next((generation[n] for n in names if generation.get(n) is not None), None)
        if value is None:
            continue
        if type(value) not in (int, float) or not abs(value) < 1 << 31:
            raise MalformedError(f"generation_config.json: {names[-1]} is {shown(value)}")
        result[f"general.sampling.{key}"] = i32(int(value)) if key == "top_k" else f32(value)
    return result
