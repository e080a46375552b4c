"""Converts models whose weights are pickled: tensors are read out of the pickle, nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from . import arguments
from .adapters.intake import PICKLED, WEIGHTS
from .errors import AlreadyExistsError, MalformedError, UnsupportedAdapterError, shown
from .files.copying import copy_untrusted
from .files.links import linked_file
from .files.model_directory import CARRIED, Role, checked_size, files_of
from .files.reading import existing_directory, json_object, opened
from .files.safetensors import INDEX, SINGLE, read_header
from .files.writing import disk_errors, fsync, rename_without_replacing, write_file
from .jobs.isolated import run_isolated

FULL_PICKLED, FULL_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHARD = re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin", re.ASCII)

_COPIED = CARRIED | {Role.ADAPTER, Role.CARD, Role.RECORD}


def convert_pickle(directory: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Path:
    """Write a copy of a model with pickled weights, with safetensors weights.

    That is an adapter with `adapter_model.bin`, or a full model with `pytorch_model.bin` or its
    shards.

    A pickle can run code when it is read, so torch reads this one in a process of its own, and
    with `weights_only`: whatever is not a tensor, or a container of tensors, is refused.

    Args:
        directory: The model's. It stays as it is.
        destination: The copy, which must not exist. Optimizer states, other checkpoints and
            other weights are left out. The weights keep their date.

    Returns:
        `destination`, as a path.

    Raises:
        InvalidArgumentError: An argument is no path.
        AlreadyExistsError: Something is at `destination`.
        MalformedError: There is no such directory, no pickled weights, or they do not parse.
        UnsupportedAdapterError: There are safetensors weights already, or the pickle has more than
            tensors.
        UnsafeFileError: A file is a link out of a Hub cache, a pipe or too large.
        StorageError: The disk failed.
    """
    source = existing_directory(arguments.path("directory", directory)).resolve()
    target = arguments.path("destination", destination).absolute()
    pickles = _pickles_in(source)
    if os.path.lexists(target):
        raise AlreadyExistsError(f"{shown(target)} exists; name a directory that does not")
    with disk_errors(f"{shown(source)} cannot be converted"):
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}-", dir=target.parent))
        try:
            _copy_others(source, made)
            for name, (pickle, file) in pickles.items():
                run_isolated(convert_weights, str(file), str(made / name), pickle)
                times = file.stat()
                os.utime(made / name, ns=(times.st_atime_ns, times.st_mtime_ns))
                fsync(made / name)
            if len(pickles) > 1:
                write_file(made / INDEX, _index(made, [*pickles]))
            made.chmod(0o755)
            rename_without_replacing(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return target


def _pickles_in(source: Path) -> dict[str, tuple[str, Path]]:
    """For each file of tensors to write: the pickle's name, and its file with links followed."""
    _refuse_converted(source, WEIGHTS)
    for pickle in PICKLED:
        if os.path.lexists(source / pickle):
            return {WEIGHTS: (pickle, _checked(source, pickle, WEIGHTS))}
    _refuse_converted(source, SINGLE, INDEX)
    if os.path.lexists(source / FULL_PICKLED):
        return {SINGLE: (FULL_PICKLED, _checked(source, FULL_PICKLED, SINGLE))}
    if not os.path.lexists(source / FULL_INDEX):
        raise MalformedError(
            f"{shown(source)} has none of {', '.join((*PICKLED, FULL_PICKLED, FULL_INDEX))}"
        )
    stated = json_object(linked_file(source, FULL_INDEX)).get("weight_map")
    shards = sorted(set(map(str, stated.values()))) if isinstance(stated, dict) else []
    if not shards:
        raise MalformedError(f"{FULL_INDEX} names no shards")
    if odd := [shard for shard in shards if not _SHARD.fullmatch(shard)]:
        raise MalformedError(f"{FULL_INDEX} names {shown(odd[0])}, which is no shard")
    targets = [
        shard.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
        for shard in shards
    ]
    return {
        target: (shard, _checked(source, shard, SINGLE))
        for target, shard in zip(targets, shards, strict=True)
    }


def _refuse_converted(source: Path, *names: str) -> None:
    if there := [name for name in names if os.path.lexists(source / name)]:
        raise UnsupportedAdapterError(
            f"{shown(source)} has {there[0]} already, and can be registered as it is"
        )


def _checked(source: Path, pickle: str, target: str) -> Path:
    file = linked_file(source, pickle)
    with opened(file, os.O_NOFOLLOW) as fd:
        if target == WEIGHTS:
            checked_size(WEIGHTS, os.fstat(fd).st_size)
    return file


def _index(directory: Path, files: list[str]) -> bytes:
    weight_map = {name: file for file in files for name in read_header(directory / file).tensors}
    document = {"metadata": {}, "weight_map": weight_map}
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def _copy_others(source: Path, made: Path) -> None:
    for name in files_of(source, *_COPIED):
        copy_untrusted(linked_file(source, name), made, name)


def convert_weights(pickle: str, weights: str, name: str) -> None:
    """Read the tensors in the file `pickle`, and write them to the file `weights`.

    Messages call the pickle `name`, as its directory does.

    Raises:
        MalformedError: It is no mapping of tensors by name.
        UnsupportedAdapterError: torch refuses to read it.
    """
    import torch
    from safetensors.torch import save_file

    try:
        found = torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, from a file that may be anything
        raise UnsupportedAdapterError(
            f"{name} has more than tensors, or is damaged: {shown(error)}"
        ) from None
    if not isinstance(found, dict) or not found:
        raise MalformedError(f"{name} is no mapping of tensors by name")
    for key, tensor in found.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        if not isinstance(key, str) or not plain or tensor.is_quantized or tensor.is_meta:
            raise MalformedError(f"{name}: {shown(key)} is not a plain tensor with a name")
    own = {key: tensor.detach().clone().contiguous() for key, tensor in found.items()}
    save_file(own, weights, {"format": "pt"})
