"""Converts adapters whose weights are pickled: tensors are read out of the pickle, nothing else."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from . import arguments
from .adapters.intake import PICKLED, WEIGHTS, copy_checked
from .errors import AlreadyExistsError, MalformedError, UnsupportedAdapterError, shown
from .files.links import linked_file
from .files.model_directory import CARRIED, Role, checked_size, files_of
from .files.reading import existing_directory, opened
from .files.writing import disk_errors, fsync, rename_without_replacing
from .jobs.isolated import run_isolated

_COPIED = CARRIED | {Role.ADAPTER, Role.CARD}


def convert_pickle(directory: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Path:
    """Write a copy of an adapter whose weights are `adapter_model.bin`, with safetensors weights.

    A pickle can run code when it is read, so torch reads this one in a process of its own, and
    with `weights_only`: whatever is not a tensor, or a container of tensors, is refused.

    Args:
        directory: The adapter's. It stays as it is.
        destination: The copy, which must not exist. Optimizer states, other checkpoints
            and whole models are left out. The weights keep their date.

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
    name = _pickled_in(source)
    pickle = linked_file(source, name)
    with opened(pickle, os.O_NOFOLLOW) as fd:
        checked_size(WEIGHTS, os.fstat(fd).st_size)
    if os.path.lexists(target):
        raise AlreadyExistsError(f"{shown(target)} exists; name a directory that does not")
    with disk_errors(f"{shown(source)} cannot be converted"):
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}-", dir=target.parent))
        try:
            _copy_others(source, made)
            run_isolated(convert_weights, str(pickle), str(made / WEIGHTS), name)
            times = pickle.stat()
            os.utime(made / WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))
            fsync(made / WEIGHTS)
            made.chmod(0o755)
            rename_without_replacing(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return target


def _pickled_in(source: Path) -> str:
    if os.path.lexists(source / WEIGHTS):
        raise UnsupportedAdapterError(
            f"{shown(source)} has {WEIGHTS} already, and can be registered as it is"
        )
    for name in PICKLED:
        if os.path.lexists(source / name):
            return name
    raise MalformedError(f"{shown(source)} has none of {', '.join(PICKLED)}")


def _copy_others(source: Path, made: Path) -> None:
    for name in files_of(source, *_COPIED):
        copy_checked(linked_file(source, name), made, name)


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
