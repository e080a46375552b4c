"""Converts models whose weights are pickled: tensors are read out of the pickle, nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from . import arguments
from .adapters.intake import WEIGHTS
from .errors import AlreadyExistsError, MalformedError, UnsupportedAdapterError, shown
from .files.model_directory import Role, checked_size, files_of, row_of
from .files.reading import content, existing_directory, json_object, opened
from .files.safetensors import INDEX, SINGLE, read_header
from .files.writing import disk_errors, fsync, rename_without_replacing, write_file
from .jobs.isolated import run_isolated

PICKLED = ("adapter_model.bin", "adapter_model.pt")
FULL_PICKLED, FULL_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHARD = re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin", re.ASCII)

_LEFT = {Role.LITTER, Role.OTHER_WEIGHTS}


def convert_pickle(directory: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Path:
    """Write a copy of a model with pickled weights, with safetensors weights.

    That is an adapter with `adapter_model.bin`, or a full model with `pytorch_model.bin` or its
    shards.

    A pickle can run code when it is read, so torch reads this one in a process of its own, and
    with `weights_only`: whatever is not a tensor, or a container of tensors, is refused.

    Args:
        directory: The model's. It stays as it is.
        destination: The copy, which must not exist. Optimizer states and other checkpoints are
            left out. The weights keep their date.

    Returns:
        `destination`, as a path.

    Raises:
        InvalidArgumentError: An argument is no path.
        AlreadyExistsError: Something is at `destination`.
        MalformedError: There is no such directory, no pickled weights, or they do not parse.
        UnsupportedAdapterError: There are safetensors weights already, or the pickle has more than
            tensors.
        UnsafeFileError: A file is a link, a pipe or too large.
        StorageError: The disk failed.
    """
    source = existing_directory(arguments.path("directory", directory))
    target = arguments.path("destination", destination).absolute()
    pickles = _pickles_in(source)
    if os.path.lexists(target):
        raise AlreadyExistsError(f"{shown(target)} exists; name a directory that does not")
    with disk_errors(f"{shown(source)} cannot be converted"):
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}-", dir=target.parent))
        try:
            _copy_others(source, made)
            for name, pickle in pickles.items():
                run_isolated(convert_weights, str(pickle), str(made / name))
                times = pickle.stat()
                os.utime(made / name, ns=(times.st_atime_ns, times.st_mtime_ns))
                fsync(made / name)
            if len(pickles) > 1:
                write_file(made / INDEX, _index(made, [*pickles]))
            made.chmod(0o755)
            rename_without_replacing(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return target


def _pickles_in(source: Path) -> dict[str, Path]:
    """The pickled files, by the names that their tensors' files will have."""
    if there := [name for name in (WEIGHTS, SINGLE, INDEX) if os.path.lexists(source / name)]:
        raise UnsupportedAdapterError(
            f"{shown(source)} has {there[0]} already, and can be registered as it is"
        )
    for name, target in {**dict.fromkeys(PICKLED, WEIGHTS), FULL_PICKLED: SINGLE}.items():
        if os.path.lexists(source / name):
            return {target: _checked(source / name, target)}
    if not os.path.lexists(source / FULL_INDEX):
        raise MalformedError(
            f"{shown(source)} has none of {', '.join((*PICKLED, FULL_PICKLED, FULL_INDEX))}"
        )
    stated = json_object(source / FULL_INDEX).get("weight_map")
    shards = sorted(set(map(str, stated.values()))) if isinstance(stated, dict) else []
    if odd := [shard for shard in shards if not _SHARD.fullmatch(shard)]:
        raise MalformedError(f"{FULL_INDEX} names {shown(odd[0])}, which is no shard")
    return {
        shard.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors": _checked(
            source / shard, SINGLE
        )
        for shard in shards
    }


def _checked(path: Path, kind: str) -> Path:
    with opened(path, os.O_NOFOLLOW) as fd:
        if kind == WEIGHTS:
            checked_size(WEIGHTS, os.fstat(fd).st_size)
    return path.absolute()


def _index(directory: Path, files: list[str]) -> bytes:
    weight_map = {name: file for file in files for name in read_header(directory / file).tensors}
    document = {"metadata": {}, "weight_map": weight_map}
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def _copy_others(source: Path, made: Path) -> None:
    for name in files_of(source, *(set(Role) - _LEFT)):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(made / name, bytes(content(source / name, row_of(name).limit, os.O_NOFOLLOW)))


def convert_weights(pickle: str, weights: str) -> None:
    """Read the tensors in the file `pickle`, and write them to the file `weights`.

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
            f"{shown(Path(pickle).name)} has more than tensors, or is damaged: {shown(error)}"
        ) from None
    if not isinstance(found, dict) or not found:
        raise MalformedError(f"{shown(Path(pickle).name)} is no mapping of tensors by name")
    for name, tensor in found.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        if not isinstance(name, str) or not plain or tensor.is_quantized or tensor.is_meta:
            raise MalformedError(
                f"{shown(Path(pickle).name)}: {shown(name)} is not a plain tensor with a name"
            )
    own = {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}
    save_file(own, weights, {"format": "pt"})
