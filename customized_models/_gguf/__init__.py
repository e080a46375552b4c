"""A model's tensors as one GGUF file, written in a single pass."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen


@frozen
class GGUFFile:
    """A finished file: `digest` is `sha256:` of its `size` bytes."""

    path: Path
    size: int
    digest: str
