"""An object store, as it is and through a proxy that disturbs it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from customized_models import FsspecStorage
from customized_models.storage import objects
from tests.servers.faulty_proxy import FaultyProxy, faulty_proxy
from tests.servers.s3_server import BUCKET, S3Server, options

from .stored import storage_at


@pytest.fixture
def prefix() -> str:
    """Of a test's objects in the bucket that all share."""
    return uuid.uuid4().hex


@pytest.fixture
def on_s3(s3: S3Server, prefix: str, tmp_path: Path) -> FsspecStorage:
    """A storage on the real server."""
    return FsspecStorage(
        f"s3://{BUCKET}/{prefix}", options=options(s3.port), local=tmp_path / "local"
    )


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    """A proxy in front of the real server."""
    with faulty_proxy(s3.port) as running:
        yield running


@pytest.fixture
def disturbed(proxy: FaultyProxy, prefix: str, tmp_path: Path) -> FsspecStorage:
    """The same objects as those of `on_s3`, through the proxy, read into a cache of its own."""
    return storage_at(proxy.port, prefix, tmp_path / "proxied")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are made again without waiting."""
    monkeypatch.setattr(objects, "WAITS", (0, 0, 0))
