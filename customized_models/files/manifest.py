"""The manifest beside a model's bytes: what the files are, and the record of how they came to be.

Content files, parents and recipe make the digest. The record does not, so that a card may be
corrected, and neither does `README.md`, which is rendered from it; the record has a digest of its
own, so that damage is found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from ..errors import IntegrityError, MalformedError, listed, shown
from .digests import FileDigest, digest_of, hash_file
from .documents import from_document, to_document
from .reading import MAX_JSON, content, strict_json
from .writing import write_file

Kind = Literal["customized", "complete", "gguf"]

MANIFEST = "manifest.json"
README = "README.md"
FORMAT = 1


@frozen
class Manifest:
    """What a stored directory holds.

    Law: `Manifest.read(d)` equals the manifest that was written to `d`, or raises.

    Attributes:
        kind: Of the model.
        content: Size and digest of each content file, by its path within the directory.
        parents: Digests of what it was made from, by role.
        recipe: What its bytes depend on besides the parents.
        record: The model as a document, and its parents' where the database cannot tell.
    """

    kind: Kind
    content: Mapping[str, FileDigest]
    parents: Mapping[str, str]
    recipe: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """`blake3:` over kind, content files, parents' digests and recipe."""
        return digest_of(
            {
                "format": FORMAT,
                "kind": self.kind,
                "content": to_document(self.content),
                "parents": dict(self.parents),
                "recipe": dict(self.recipe),
            }
        )

    @property
    def size(self) -> int:
        """Bytes of all content files."""
        return sum(file.size for file in self.content.values())

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into `directory`, which must not have one."""
        write_file(directory / MANIFEST, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The bytes of its `manifest.json`. Law: `Manifest.parse(m.to_bytes()) == m`."""
        document = to_document(self) | {
            "format": FORMAT,
            "digest": self.digest,
            "record_digest": digest_of(self.record),
        }
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest in `directory`; raises as `parse` does."""
        return cls.parse(content(directory / MANIFEST, MAX_JSON))

    @classmethod
    def parse(cls, data: bytes | bytearray) -> Manifest:
        """The manifest in the bytes of a `manifest.json`.

        Raises:
            MalformedError: Missing, of another format, or not as it was written.
            IntegrityError: A digest is not that of its contents.
        """
        document = strict_json(data, MANIFEST)
        if not isinstance(document, dict):
            raise MalformedError(f"{MANIFEST} holds no JSON object")
        if (version := document.pop("format", None)) != FORMAT:
            raise MalformedError(f"{MANIFEST} has format {shown(version)}, not {FORMAT}")
        stated, of_record = document.pop("digest", None), document.pop("record_digest", None)
        manifest = from_document(cls, document)
        if manifest.digest != stated:
            raise IntegrityError(f"{MANIFEST} states {shown(stated)} but has {manifest.digest}")
        if digest_of(manifest.record) != of_record:
            raise IntegrityError(f"the record in {MANIFEST} is damaged: its digest differs")
        return manifest

    def verify(self, directory: Path) -> None:
        """Read every content file under `directory` and compare.

        Raises:
            IntegrityError: Naming the files that are missing, additional or different.
        """
        found = {path.relative_to(directory).as_posix() for path in files_under(directory)}
        wrong = found - {MANIFEST, README} ^ set(self.content)
        for name, expected in self.content.items():
            if name not in wrong and hash_file(directory / name, expected.algorithm) != expected:
                wrong.add(name)
        if wrong:
            raise IntegrityError(f"files differ from the manifest: {listed(wrong)}")


def files_under(directory: Path) -> Iterable[Path]:
    """Everything below `directory` that is not itself a directory."""
    return (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
