"""Uploads in parts to S3, which keeps the parts of an upload that was cut short until it is told.

A part's ETag is the MD5 of its bytes, unless the bucket encrypts by keys of its own: then no part
is recognized, and all are sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

PART = 16 << 20  # bytes: of smaller ones answers take the time, larger ones are lost as a whole
_MOST_PARTS = 10_000  # of an object of S3


def upload(filesystem: Any, file: Path, path: str, at_once: int) -> None:
    """Put a file; if it is larger than a part, all parts that the store does not have of it yet.

    Args:
        filesystem: Of s3fs.
        file: It does not change.
        path: The bucket, a slash and the object's name. If there is such an object, as large as
            the file and larger than a part, nothing is sent: the caller compares its bytes.
        at_once: Parts that are sent at once.
    """
    size = file.stat().st_size
    if size <= PART:
        filesystem.put_file(str(file), path)
        return
    bucket, _, key = path.partition("/")
    call = partial(filesystem.call_s3, Bucket=bucket, Key=key)
    begun = _begun(call, key)
    if not begun and _size(call) == size:
        return  # it was completed, and the answer was lost
    id = begun[-1] if begun else call("create_multipart_upload")["UploadId"]
    stored = _parts(call, id) if begun else {}
    length = max(PART, -(-size // _MOST_PARTS))

    def put(number: int) -> dict[str, Any]:
        with file.open("rb") as opened:
            opened.seek((number - 1) * length)
            data = opened.read(length)
        etag = stored.get((number, len(data)))
        if etag is None or etag != hashlib.md5(data, usedforsecurity=False).hexdigest():
            etag = call("upload_part", UploadId=id, PartNumber=number, Body=data)["ETag"]
        return {"PartNumber": number, "ETag": etag}

    with ThreadPoolExecutor(at_once, "upload parts") as pool:
        parts = list(pool.map(put, range(1, -(-size // length) + 1)))
    call("complete_multipart_upload", UploadId=id, MultipartUpload={"Parts": parts})
    for other in _begun(call, key):  # begun twice, when an answer was lost
        call("abort_multipart_upload", UploadId=other)


def abort(filesystem: Any, path: str) -> None:
    """Remove the parts of all uploads below a path that were not completed."""
    bucket, _, prefix = path.partition("/")
    while True:
        found = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
        for upload in found.get("Uploads", ()):
            of = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            filesystem.call_s3("abort_multipart_upload", Bucket=bucket, **of)
        if not found.get("IsTruncated"):  # the next list begins with what this one left out
            return


def _begun(call: Callable[..., Any], key: str) -> list[str]:
    """The ids of uploads of an object that were not completed, in the order of their beginning.

    They are all in the first list of many: no name that begins with the object's comes before it.
    """
    found = call("list_multipart_uploads", Prefix=key).get("Uploads", ())
    return [upload["UploadId"] for upload in found if upload["Key"] == key]


def _parts(call: Callable[..., Any], id: str) -> Mapping[tuple[int, int], str]:
    """The ETags of an upload's parts, without quotes, by number and size in bytes."""
    parts, after = dict[tuple[int, int], str](), 0
    while True:
        found = call("list_parts", UploadId=id, PartNumberMarker=after)
        for part in found.get("Parts", ()):
            parts[part["PartNumber"], part["Size"]] = part["ETag"].strip('"')
        if not found.get("IsTruncated"):
            return parts
        after = found["NextPartNumberMarker"]


def _size(call: Callable[..., Any]) -> int | None:
    """Of the object, in bytes, if there is one."""
    try:
        return int(call("head_object")["ContentLength"])
    except FileNotFoundError:
        return None
