"""Links in a model's directory: which may be followed, and what the Hub's cache calls a model."""

from __future__ import annotations

from pathlib import Path

from ..errors import UnsafeFileError, shown
from .model_directory import Role, role_of

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
_REPOSITORY = "models--"  # of the directory that the Hub's cache keeps a model in
_WAY_OUT = "copy the directory with its links followed (cp -rL), and name the copy"


def linked_file(directory: Path, name: str, *, trusted: bool = False) -> Path:
    """The file called `name` in a model's directory, or what its link leads to.

    Links of a snapshot in a Hub cache lead to the repository's blobs, or to blobs that all
    repositories share. In a directory that the caller vouches for, a file that the table of a model
    directory knows may also be a link to a file of the same name elsewhere: so people link one
    model into many places. Any other link could pass a private file of this host for the model's.

    Args:
        directory: Without links in its own path.
        name: The file's path in it.
        trusted: Whether the caller vouches for the directory.

    Returns:
        A path that is no link; there may be nothing.

    Raises:
        UnsafeFileError: A link leads elsewhere.
    """
    path = directory / name
    if not path.is_symlink():
        return path
    target = path.resolve()
    repository = directory.parent.parent
    blobs = (repository / _BLOBS, repository.parent / _BLOBS)
    if directory.parent.name == _SNAPSHOTS and any(target.is_relative_to(b) for b in blobs):
        return target
    if trusted and target.name == path.name and role_of(name) is not Role.UNKNOWN:
        return target
    raise UnsafeFileError(
        f"{shown(name)} is a link that leads out of the model's directory, and not into the blobs "
        f"of a Hub cache; {_WAY_OUT}"
    )


def hub_id(directory: Path) -> str | None:
    """What the Hub calls the model whose snapshot in a Hub cache `directory` is; None elsewhere.

    >>> hub_id(Path("/cache/models--org--name/snapshots/6b3f"))
    'org/name'
    """
    repository = directory.parent.parent.name
    if directory.parent.name != _SNAPSHOTS or not repository.startswith(_REPOSITORY):
        return None
    return repository.removeprefix(_REPOSITORY).replace("--", "/", 1)
