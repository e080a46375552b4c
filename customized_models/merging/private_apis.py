"""Private APIs of other packages that this library depends on, checked before they are used."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from ..errors import UnsupportedVersionError

_TESTED = {"transformers": "5.24.0", "peft": "0.21.2", "torch": "2.15.0"}


def private(module: str, name: str) -> Any:
    """The attribute `name` of `module`, which its package does not document.

    Raises:
        UnsupportedVersionError: The installed version does not have it.
    """
    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedVersionError(
            f"{package} {importlib.metadata.version(package)} has no {module}.{name}; "
            f"this library was tested with {package} {_TESTED[package]}"
        ) from error


def installed() -> dict[str, str]:
    """The installed versions of the packages that the merged bits depend on."""
    return {package: importlib.metadata.version(package) for package in sorted(_TESTED)}
