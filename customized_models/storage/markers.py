"""What an object store holds beside files: small documents, each with its own digest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from attrs import frozen

from ..errors import IntegrityError, MalformedError, shown
from ..files.digests import canonical_json, digest_of
from ..files.documents import from_document, to_document
from ..files.reading import strict_json

T = TypeVar("T")


@frozen
class StoredFile:
    """A file of a stored directory: the object below its upload, and what that holds."""

    object: str
    size: int
    digest: str


@frozen
class Marker:
    """What is stored under a key: files of one upload, by their paths."""

    upload: str
    files: Mapping[str, StoredFile]


@frozen
class Pending:
    """Says of an upload that its marker may not be there.

    Attributes:
        key: What it is for.
        since: Seconds since 1970, by the clock of who uploads or deletes it.
    """

    key: str
    since: float


def to_bytes(value: Any) -> bytes:
    """One of these as an object. Law: `parsed(type(v), to_bytes(v)) == v`."""
    document = to_document(value)
    return canonical_json({"digest": digest_of(document), "value": document})


def parsed(cls: type[T], data: bytes) -> T:
    """What `to_bytes` was given.

    Raises:
        IntegrityError: The bytes are others.
    """
    try:
        document = strict_json(data, f"a {cls.__name__}")
        if document["digest"] != digest_of(document["value"]):
            raise MalformedError("it does not have the digest that it states")
        return from_document(cls, document["value"])
    except (MalformedError, KeyError, TypeError) as error:
        raise IntegrityError(f"damaged in the store: {shown(error)}") from error
