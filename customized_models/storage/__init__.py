"""Where a registry keeps its bytes: immutable directories under keys, published all or nothing."""

from .local import LocalStorage
from .object_store import FsspecStorage
from .opening import open_storage
from .protocol import Storage, checked_key

__all__ = ["FsspecStorage", "LocalStorage", "Storage", "checked_key", "open_storage"]
