"""Where a registry keeps its bytes: immutable directories under keys, published all or nothing."""

from .local import LocalStorage
from .opening import open_storage
from .protocol import Storage, checked_key

__all__ = ["LocalStorage", "Storage", "checked_key", "open_storage"]
