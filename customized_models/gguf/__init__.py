"""A model's tensors as one GGUF file, written in a single pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from ..files.safetensors import ModelSource
from ..models import Progress, Quantization, checked_quantization
from .family import family_of
from .format import Tensor, flag, padded, preamble, u32
from .planning import planned, planned_projector
from .quantization import MODES


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
    family_of(config)


def plan(
    source: ModelSource,
    quantization: Quantization,
    *,
    name: str,
    chat_template: bool,
    keys: Mapping[str, bool | int] | None = None,
    llama_cpp: Path | None = None,
) -> GGUFPlan:
    """Plan the file from configuration, tokenizer and tensor headers; no tensor is read.

    `name`: `general.name` in the file. `chat_template`: whether `tokenizer.chat_template` goes in.
    `keys`: what the file says besides, or instead, such as `tokenizer.ggml.add_bos_token`.
    `llama_cpp`: a checkout of llama.cpp, whose converter is run for architectures that have no
    family here; it is code that is executed.

    Raises:
        MalformedError: a file is missing or does not parse, or tensors do not fit `config.json`.
        MissingDependencyError: nothing that quantizes is installed.
        UnsupportedError: the architecture, a setting, the tokenizer or the mode cannot be
            converted exactly.
    """
    mode = MODES[checked_quantization(quantization)]
    metadata, tensors = planned(
        source, mode, name=name, chat_template=chat_template, llama_cpp=llama_cpp
    )
    said = {
        key: flag(value) if isinstance(value, bool) else u32(value)
        for key, value in (keys or {}).items()
    }
    return GGUFPlan(source, preamble({**metadata, **said}, tensors), tuple(tensors))


def plan_projector(source: ModelSource, *, name: str, llama_cpp: Path | None) -> GGUFPlan:
    """Plan the file for what a model sees or hears with, which llama.cpp calls `mmproj`.

    It is not quantized. `name`, `llama_cpp`: see `plan`.

    Raises:
        UnsupportedArchitectureError: no checkout is named, or its converter cannot do it.
        MalformedError: as `plan`.
    """
    metadata, tensors = planned_projector(source, name=name, llama_cpp=llama_cpp)
    return GGUFPlan(source, preamble(metadata, tensors), tuple(tensors))
