"""Compiled functions, kept between processes.

Numba's own cache looks at the file that a function is in and not at those that it calls, and fails
where its directory cannot be written. So the directory here has a name of its own for every state
of all the sources, belongs to the user alone, since what lies there is executed, and is done
without where it cannot be had.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numba
from numba.core import config

_SHARED = (Path(__file__).with_name("lanes.py"),)


def import_kept(name: str, package: str) -> ModuleType:
    """Import a package's module that Numba compiles, so that it finds what was compiled before.

    The module's `njit` are to have `cache=bool(config.CACHE_DIR)`.
    """
    source = Path(importlib.import_module(package).__file__ or "").parent / f"{name}.py"
    with _directory(_digest((*_SHARED, source))):
        return importlib.import_module(f"{package}.{name}")


def reload_unkept(module: ModuleType) -> ModuleType:
    """The module again, its functions compiled for this process alone."""
    with _no_directory():
        return importlib.reload(module)


def _digest(sources: tuple[Path, ...]) -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


@contextmanager
def _directory(digest: str) -> Iterator[None]:
    """Let Numba keep what is defined within in a directory of ours, or nowhere."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    directory = caches / "customized-models" / f"kernels-{digest[:16]}"
    with _no_directory():
        if _is_private(directory):
            config.CACHE_DIR = str(directory)
        yield


@contextmanager
def _no_directory() -> Iterator[None]:
    before, config.CACHE_DIR = config.CACHE_DIR, ""
    try:
        yield
    finally:
        config.CACHE_DIR = before


def _is_private(directory: Path) -> bool:
    """Whether it is there, or could be made, and this user alone writes to it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError:
        return False
    own = status.st_uid == os.getuid() and not status.st_mode & 0o077
    return own and os.access(directory, os.W_OK)
