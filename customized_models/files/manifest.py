"""The manifest beside a model's bytes: what the files are, and the record of how they came to be.

Content files, parents and recipe make the digest; the record does not, and neither does
`README.md`, which is rendered from it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from attrs import frozen

from ..errors import IntegrityError, MalformedError, listed, shown
from .safetensors import FileDigest, json_object

if TYPE_CHECKING:
    from cattrs import Converter

T = TypeVar("T")
Kind = Literal["customized", "complete", "gguf"]

MANIFEST = "manifest.json"
README = "README.md"
FORMAT = 1


def canonical_json(value: Any) -> bytes:
    """One byte string per value: keys sorted, no spaces, ASCII, finite numbers only."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


@functools.cache
def _converter() -> Converter:
    from cattrs.preconf.json import make_converter

    converter = make_converter()
    converter.register_unstructure_hook(uuid.UUID, str)
    converter.register_structure_hook(uuid.UUID, lambda text, _: uuid.UUID(text))
    return converter


def to_document(value: Any) -> Any:
    """An attrs value of this library as JSON-able data; `from_document` reads it back equal."""
    return _converter().unstructure(value)


def from_document(cls: type[T], document: Any) -> T:
    """The value of class `cls` that `to_document` made `document` from.

    Raises:
        MalformedError: the document does not fit the class.
    """
    from cattrs.errors import ClassValidationError

    try:
        return _converter().structure(document, cls)
    except (ClassValidationError, ValueError, TypeError, KeyError) as error:
        raise MalformedError(f"a stored record is no {cls.__name__}: {shown(error)}") from error


def digest_of(document: Any) -> str:
    """`sha256:` over the canonical JSON of `document`."""
    return "sha256:" + hashlib.sha256(canonical_json(document)).hexdigest()


def hash_file(path: Path) -> FileDigest:
    """Size and SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileDigest(file.tell(), digest.hexdigest())


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and push it to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@frozen
class Manifest:
    """What a stored directory holds.

    Law: `Manifest.read(d)` equals the manifest that was written to `d`, or raises.
    """

    kind: Kind
    content: Mapping[str, FileDigest]
    parents: Mapping[str, str]
    recipe: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """`sha256:` over kind, content files, parents' digests and recipe."""
        return digest_of(
            {
                "format": FORMAT,
                "kind": self.kind,
                "content": to_document(self.content),
                "parents": dict(self.parents),
                "recipe": dict(self.recipe),
            }
        )

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into `directory`, which must not have one."""
        document = to_document(self) | {"format": FORMAT, "digest": self.digest}
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False)
        write_file(directory / MANIFEST, text.encode() + b"\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest in `directory`.

        Raises:
            MalformedError: missing, of another format, or not as it was written.
            IntegrityError: its digest is not that of its contents.
        """
        document = json_object(directory / MANIFEST)
        if (version := document.pop("format", None)) != FORMAT:
            raise MalformedError(f"{MANIFEST} has format {shown(version)}, not {FORMAT}")
        stated = document.pop("digest", None)
        manifest = from_document(cls, document)
        if manifest.digest != stated:
            raise IntegrityError(f"{MANIFEST} states {shown(stated)} but has {manifest.digest}")
        return manifest

    def verify(self, directory: Path) -> None:
        """Read every content file under `directory` and compare.

        Raises:
            IntegrityError: naming the files that are missing, additional or different.
        """
        found = {path.relative_to(directory).as_posix() for path in files_under(directory)}
        wrong = found - {MANIFEST, README} ^ set(self.content)
        for name, expected in self.content.items():
            if name not in wrong and hash_file(directory / name) != expected:
                wrong.add(name)
        if wrong:
            raise IntegrityError(f"files differ from the manifest: {listed(wrong)}")


def files_under(directory: Path) -> Iterable[Path]:
    """Everything below `directory` that is not itself a directory."""
    return (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
