"""What tests of object stores keep there, and how they look at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from customized_models import FsspecStorage
from customized_models.storage import Storage, uploads
from tests.servers.s3_server import BUCKET, options

KEY = "customized/a"
FILES = {"weights": b"0123456789" * 1000, "card": b"{}"}


def storage_at(port: int, prefix: str, local: Path) -> FsspecStorage:
    """A storage on the server, or a proxy, at that port; its client makes each request once."""
    once = {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}}}
    return FsspecStorage(f"s3://{BUCKET}/{prefix}", options=options(port) | once, local=local)


def files_of(storage: Storage, key: str) -> dict[str, bytes]:
    """All files of a key, by a checkout."""
    with storage.checkout(key) as directory:
        return {path.name: path.read_bytes() for path in directory.iterdir()}


def a_week_later(storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something is staged, when all that was left has been there for long."""
    with monkeypatch.context() as context:
        context.setattr(uploads, "STAGING_GRACE", -1)
        with storage.staging("later"):
            pass
