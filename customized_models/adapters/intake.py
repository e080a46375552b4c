"""Copies an untrusted adapter directory, checks the copy, and reads its facts.

Nothing of Hugging Face's runs here. Whatever would make PEFT run code, open other files or match a
pattern for a very long time is refused before PEFT reads the adapter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from ..errors import MalformedError, UnsafeFileError, UnsupportedAdapterError, listed, shown
from ..files.copying import copy_untrusted
from ..files.digests import FileDigest, hash_file
from ..files.links import linked_file
from ..files.model_directory import CARRIED, Role, checked_size, files_of, row_of
from ..files.paths import strip_paths
from ..files.reading import json_object, opened
from ..files.safetensors import Header, TensorInfo, header_bytes, is_zero, read_header
from ..files.streams import FileWriter, copy_range
from ..files.writing import disk_errors
from .patterns import check_patterns
from .peft_types import adapter_type
from .settings import CONFIG, canonical, check_settings
from .tensor_names import is_factor, module_of, plain_names

WEIGHTS = "adapter_model.safetensors"

PICKLED = ("adapter_model.bin", "adapter_model.pt")
"""What the weights are called where they are pickled, as older versions of PEFT saved them."""

_TAKEN = {Role.ADAPTER} | CARRIED

_MAX_HEADER = 32 << 20  # bytes: one adapted expert by expert has about 100,000 tensors
_MAX_FILES = 1000  # an adapter has a dozen
_MAX_BESIDE = 1 << 30  # bytes beside the weights: a tokenizer has some megabytes

_DTYPES = ("F16", "BF16", "F32", "F64")
_INDEX_DTYPES = ("I64", "I32", "I16", "U8", "BOOL")


@frozen
class Intake:
    """A checked copy of an adapter.

    Attributes:
        adapter: The copy.
        content: Size and digest of each of its files, by name.
        stated_base: `base_model_name_or_path` of the original, which the copy has only if it is a
            Hub id.
        notes: What was changed in the copy, and what was found that its owner may want to know.
    """

    adapter: Adapter
    content: Mapping[str, FileDigest]
    stated_base: object
    notes: tuple[str, ...]


def take_in(source: Path, destination: Path) -> Intake:
    """Copy an adapter's files into the empty directory `destination`, and check them.

    Each file of `source` is read once. Weights in other formats and files that only the training
    needs are left out. The configuration is rewritten so that equal adapters have equal bytes; see
    `canonical`. No configuration keeps a path. Tensors get the names that PEFT gives them; see
    `plain_names`.

    Args:
        source: The directory that a training saved.
        destination: An empty directory.

    Raises:
        MalformedError: A required file is missing, the configuration or the weights' header does
            not parse, or a file changed while it was copied.
        UnsafeFileError: A file is a link out of a Hub cache, a pipe or a device, or is too large.
        UnsupportedAdapterError: The weights are pickled, or the configuration could run code or has
            a pattern that takes long to match.
        StorageError: The disk failed.
    """
    _refuse_pickled(source)
    with disk_errors(f"the adapter in {shown(source)} cannot be copied"):
        files = _checked_files(source.resolve())
        content = {name: copy_untrusted(file, destination, name) for name, file in files.items()}
        config = json_object(destination / CONFIG, limit=row_of(CONFIG).limit)
        (destination / CONFIG).write_bytes(canonical(config))
        content[CONFIG] = hash_file(destination / CONFIG)
        content |= strip_paths(destination, content)
        header = read_header(destination / WEIGHTS, limit=_MAX_HEADER)
        renamed, notes = _with_plain_names(destination, config, header)
        content |= renamed
    adapter = Adapter.open(destination, None if renamed else header)
    check_patterns(adapter.config, adapter.modules)
    notes += _untrained(adapter)
    return Intake(adapter, content, config.get("base_model_name_or_path"), tuple(notes))


def _refuse_pickled(source: Path) -> None:
    pickled = [name for name in PICKLED if os.path.lexists(source / name)]
    if pickled and not os.path.lexists(source / WEIGHTS):
        raise UnsupportedAdapterError(
            f"{pickled[0]} is a pickle, which can run code when it is read. "
            f"customized_models.importing.convert_pickle writes a copy of the directory with "
            f"{WEIGHTS}, and reads nothing but tensors out of it; "
            f"PeftModel.save_pretrained(..., safe_serialization=True) saves it so at once"
        )


def _checked_files(source: Path) -> dict[str, Path]:
    """What is taken, by its path in the directory, with links followed; nothing is read of it."""
    names = [*dict.fromkeys((CONFIG, WEIGHTS, *files_of(source, *_TAKEN)))]
    if len(names) > _MAX_FILES:
        raise MalformedError(
            f"{shown(source)} has {len(names)} files, and is no adapter's; copy those that PEFT "
            f"and the tokenizer saved to a directory of their own"
        )
    files, beside = {name: linked_file(source, name) for name in names}, 0
    for name, file in files.items():
        with opened(file, os.O_NOFOLLOW) as fd:
            size = checked_size(name, os.fstat(fd).st_size)
        beside += size if name != WEIGHTS else 0
    if beside > _MAX_BESIDE:
        raise UnsafeFileError(
            f"{shown(source)} has {beside} bytes beside the adapter's weights, more than "
            f"{_MAX_BESIDE}; move what does not belong to the adapter elsewhere"
        )
    read_header(files[WEIGHTS], limit=_MAX_HEADER)  # a sparse file would take long to copy
    return files


def _with_plain_names(
    directory: Path, config: Mapping[str, Any], header: Header
) -> tuple[dict[str, FileDigest], list[str]]:
    """Give the tensors of the copy their plain names; returns what was written, and notes."""
    path = directory / WEIGHTS
    prefixed = not adapter_type(config).unmergeable
    names, notes = plain_names(header.tensors.keys(), prefixed=prefixed)
    if not notes:
        return {}, []
    old = path.rename(directory / f".{WEIGHTS}")
    infos = [evolve(info, name=names[name]) for name, info in header.tensors.items()]
    with opened(old) as fd, FileWriter(path) as writer:
        writer.write(header_bytes(infos, header.metadata))
        count = os.fstat(fd).st_size - header.data_start
        copy_range(fd, header.data_start, count, writer, WEIGHTS)
        digest = writer.finish()
    old.unlink()
    return {WEIGHTS: digest}, notes


@frozen
class Adapter:
    """A PEFT adapter that was checked, in a private directory.

    Attributes:
        directory: Where it is.
        config: Its `adapter_config.json`.
        tensors: The tensors of its weights, by PEFT's names.
    """

    directory: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, directory: Path, header: Header | None = None) -> Adapter:
        """Read and check the configuration and the header of the weights.

        Args:
            directory: Where they are.
            header: That of the weights, if it was read already.

        Raises:
            MalformedError: A value has the wrong type or is out of range, or there are no weights.
            UnsupportedAdapterError: The configuration could run code or open other files, or a
                tensor has an unusual dtype.
        """
        config = json_object(directory / CONFIG, limit=row_of(CONFIG).limit)
        check_settings(config)
        tensors = (header or read_header(directory / WEIGHTS, limit=_MAX_HEADER)).tensors
        if not tensors:
            raise MalformedError(f"{WEIGHTS} has no tensors; save the adapter again")
        if empty := {name for name, info in tensors.items() if not info.size}:
            raise MalformedError(
                f"{WEIGHTS} has tensors without elements: {listed(empty)}. DeepSpeed ZeRO-3 saves "
                f"weights that it has not gathered like this: save the adapter through the Trainer "
                f"or accelerate with stage3_gather_16bit_weights_on_model_save, or gather the "
                f"checkpoint with its zero_to_fp32.py"
            )
        dtypes = _DTYPES + (_INDEX_DTYPES if adapter_type(config).saves_indices else ())
        if odd := {name for name, info in tensors.items() if info.dtype not in dtypes}:
            raise UnsupportedAdapterError(
                f"{WEIGHTS} has tensors with a dtype other than {', '.join(dtypes)}: "
                f"{listed(odd)}; cast the adapter with model.float() before it is saved"
            )
        return cls(directory.resolve(), config, tensors)

    @property
    def modules(self) -> set[str]:
        """The modules that its tensors are for, by the names in them."""
        return {module_of(name) for name in self.tensors}

    def zero_modules(self) -> set[str]:
        """Those of `modules` that a LoRA leaves as they are, because a factor of theirs is zero.

        Every factor is read, up to its first value that is not zero.
        """
        factors = [name for name in self.tensors if is_factor(name)]
        return {module_of(name) for name in factors if self.is_zero(name)}

    def is_zero(self, name: str) -> bool:
        """Whether all values of a tensor are zero."""
        info = self.tensors[name]
        return is_zero(self.directory / info.file, info)


def _untrained(adapter: Adapter) -> list[str]:
    """A note on modules that the training left at zero, such as those its data never reached."""
    zero, every = adapter.zero_modules(), adapter.modules
    what = f"{len(zero)} of {len(every)} modules are untrained, their LoRA is zero: {listed(zero)}."
    return [what] if zero else []
