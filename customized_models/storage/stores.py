"""What is known of object stores, one row each: packages, settings, what differs between them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from ..errors import InvalidOptionError, MissingDependencyError
from .multipart import abort, upload

AT_ONCE = 4
"""Files that are uploaded at once, parts of each, or ranges: one connection fills no network."""


def _put_file(filesystem: Any, file: Path, path: str, at_once: int) -> None:
    filesystem.put_file(str(file), path)


@frozen
class Store:
    """One kind of object store.

    Attributes:
        module: The package that fsspec talks to it by.
        package: What to install.
        settings: What its filesystem is made with; see `made_with`.
        attributes: What is set of the filesystem.
        version: What its `info` calls an object's version, where a put may be told to replace that
            version and no other.
        upload: Puts a file at a path, several requests at once. What is there of it already, after
            an attempt that was cut short, is not sent again if the store can tell.
        abort: Removes the parts of uploads below a path that were never completed. No list of
            objects shows them, and they are paid for.
    """

    module: str
    package: str
    settings: Mapping[str, Any] = field(factory=dict)
    attributes: Mapping[str, Any] = field(factory=dict)
    version: str | None = None
    upload: Callable[[Any, Path, str, int], None] = _put_file
    abort: Callable[[Any, str], None] | None = None

    def made_with(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, but where the caller's options say otherwise, also within mappings."""
        inner = {
            name: {**value, **options[name]}
            for name, value in self.settings.items()
            if isinstance(value, Mapping) and name in options
        }
        return {**self.settings, **options, **inner}


STORES: Mapping[str, Store] = {
    "s3": Store(
        "s3fs",
        "customized-models[s3]",
        settings={
            "config_kwargs": {
                # Of each request: the others that are under way with it need not end for it.
                "retries": {"mode": "standard", "total_max_attempts": 3},
                # Every byte that is read is compared with a digest of ours, which tells damage
                # from a fault of the network.
                "response_checksum_validation": "when_required",
            },
        },
        attributes={"retries": 1},  # or attempts would multiply: botocore's, s3fs's and ours
        version="ETag",
        upload=upload,
        abort=abort,
    ),
    "gs": Store("gcsfs", "gcsfs"),
    "az": Store("adlfs", "adlfs"),
    "hf": Store("huggingface_hub", "huggingface_hub"),
    "memory": Store("fsspec", "fsspec"),
}
"""By the scheme of their URLs.

A put that must replace nothing is decided by the store: `If-None-Match: *` of S3 and Azure,
`ifGenerationMatch=0` of Google. The Hub and the memory of a process look first and put then.

Source: `_pipe_file` of s3fs, gcsfs and adlfs; `pipe_file` of fsspec.
"""


def store_of(url: str) -> tuple[str, str]:
    """The scheme of an object store's URL, and the path in it: a bucket, and what follows.

    Raises:
        InvalidOptionError: It is no such URL.
        MissingDependencyError: The store's package is not installed.
    """
    scheme, _, place = url.partition("://")
    path = place.strip("/")
    if scheme not in STORES or not path or {"?", "#", "@", "*", "["} & set(path):
        raise InvalidOptionError(
            "storage takes the URL of an object store with a bucket, such as s3://bucket/prefix; "
            "endpoints and keys are options, or come from the environment"
        )
    store = STORES[scheme]
    if importlib.util.find_spec(store.module) is None:
        raise MissingDependencyError(
            f"{scheme}:// needs {store.module}: pip install '{store.package}'"
        )
    return scheme, path
