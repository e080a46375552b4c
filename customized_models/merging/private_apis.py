"""What we call of other packages without their promise, looked up before it is needed."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from ..errors import UnsupportedVersionError

_TESTED = {"transformers": "5.23.0", "peft": "0.21.2", "torch": "2.15.0"}


def private(module: str, name: str) -> Any:
    """The attribute `name` of `module`, whose package does not document it.

    Raises:
        UnsupportedVersionError: the installed version has no such thing.
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
    """The versions of the packages that the merged bits depend on."""
    return {package: importlib.metadata.version(package) for package in sorted(_TESTED)}
