"""A real S3 server for a while: versitygw, which keeps buckets and objects as plain files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import frozen

from . import build_versitygw
from .process import free_port, serving

BUCKET = "team-models"
KEY, SECRET, REGION = "tester", "no secret", "us-east-1"


@frozen
class S3Server:
    """A running server. `bucket`: the directory with the objects of `BUCKET`."""

    address: str
    port: int
    bucket: Path

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which clients find it."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.address}:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
        }

    def objects(self, prefix: str = "") -> set[str]:
        """The names of all objects below a prefix, by the files that it keeps."""
        root = self.bucket / prefix
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def options(port: int) -> dict[str, Any]:
    """What s3fs takes for the server, or a proxy, at that port of the loopback address."""
    return {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "key": KEY,
        "secret": SECRET,
        "client_kwargs": {"region_name": REGION},
    }


@contextmanager
def s3_server(directory: Path) -> Iterator[S3Server]:
    """The server with one bucket, once it answers."""
    port, buckets = free_port(), directory / "buckets"
    (buckets / BUCKET).mkdir(parents=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "ROOT_ACCESS_KEY": KEY,
        "ROOT_SECRET_KEY": SECRET,
    }
    command = [
        build_versitygw.binary(), "--port", f"127.0.0.1:{port}", "--health", "/health",
        # It looks and then writes: only one at a time makes its conditional puts what S3's are.
        "posix", "--concurrency", "1", buckets,
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}/health"
    with serving(command, url, directory / "log", environment=environment):
        yield S3Server("127.0.0.1", port, buckets / BUCKET)
