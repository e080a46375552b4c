"""What bytes are, whatever they are called: digests of values, files and directories."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from attrs import frozen

_PIECE = 16 << 20  # bytes: fewer, larger reads let other threads import meanwhile


@frozen
class FileDigest:
    """`size` in bytes and the SHA-256 of a file, in hexadecimal."""

    size: int
    sha256: str


def canonical_json(value: Any) -> bytes:
    """One byte string per value: keys sorted, no spaces, ASCII, finite numbers only."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def digest_of(document: Any) -> str:
    """`sha256:` over the canonical JSON of `document`."""
    return "sha256:" + hashlib.sha256(canonical_json(document)).hexdigest()


def hash_file(path: Path) -> FileDigest:
    """Size and SHA-256 of a file's bytes.

    Raises:
        MalformedError: It is missing.
        StorageError: It cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileDigest(file.tell(), digest.hexdigest())
