"""A storage by its URL: a directory, an object store, or what an installed plug-in brings."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from urllib.parse import unquote

from ..errors import InvalidOptionError, shown
from .local import LocalStorage
from .object_store import FsspecStorage
from .protocol import Storage
from .stores import STORES

ENTRY_POINTS = "customized_models.storages"
"""The entry point group of further storages: a URL's scheme to a callable that takes the URL."""


def open_storage(url: str) -> Storage:
    """The storage at a path, at a URL such as `file:///srv/models`, or one that a plug-in brings.

    Raises:
        InvalidOptionError: No storage is installed for its scheme, or it is no URL as it stands.
        MissingDependencyError: It is of an object store, whose package is not installed.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url):
            raise InvalidOptionError(
                f"storage takes a path, or a URL such as file:///srv/models, not {shown(url)}"
            )
        return LocalStorage(url)
    if scheme == "file":
        if not rest.startswith("/") or {"?", "#"} & set(rest):
            raise InvalidOptionError(
                "storage takes file:/// and an absolute path of this host, such as "
                "file:///srv/models"
            )
        return LocalStorage(unquote(rest))
    if scheme in STORES:
        return FsspecStorage(url)
    further = entry_points(group=ENTRY_POINTS)
    for point in further.select(name=scheme):
        storage: Storage = point.load()(url)
        return storage
    known = ", ".join(sorted({"file", *STORES, *further.names}))
    raise InvalidOptionError(
        f"no storage is installed for {shown(scheme)}:// URLs; known are {known}, and what "
        f"installed packages add to {ENTRY_POINTS}"
    )
