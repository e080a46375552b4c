"""Which shards of a save are complete, so that another worker or save can take them over.

The journal is a file beside the shards. Its first line says what the shards depend on. Each other
line is added, and synced to the disk, once a shard is complete and on the disk itself. Nothing in
it is believed that the shard's digest does not confirm, if its writer is gone: a kill may have cut
it anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from ..errors import MalformedError
from ..files.digests import FileDigest, canonical_json, hash_file
from ..files.documents import from_document, to_document
from ..files.reading import strict_json
from ..models import Progress

JOURNAL = "shards.jsonl"


class Journal:
    """The journal of one save.

    Attributes:
        shards: Digests of the complete shards, by file name.
        taken_over: The names of those that another worker has made.
        saw_change: Whether one that has made one of these had seen a tensor change.
    """

    def __init__(self, directory: Path, key: str) -> None:
        """Begin a journal.

        Args:
            directory: Where the shards are written.
            key: What their bytes depend on; shards are only taken over from a save of this key.
        """
        self.shards: dict[str, FileDigest] = {}
        self.taken_over: set[str] = set()
        self.saw_change = False
        self._directory = directory
        self._key = key
        self._append({"key": key})

    def add(self, file: str, digest: FileDigest, *, saw_change: bool = True) -> None:
        """Note that the shard `file` is complete and on the disk.

        Args:
            file: Its name.
            digest: What it holds.
            saw_change: Whether its merge has seen a tensor change so far; True if not known.
        """
        self._append({"file": file, "digest": to_document(digest), "saw_change": saw_change})
        self.shards[file] = digest

    def is_shared_by(self, directory: Path) -> bool:
        """Whether another worker's journal, in its directory, is of the same bytes."""
        return _lines(directory, self._key) is not None

    def take_over(
        self, other: Path, files: Collection[str], progress: Progress, *, is_gone: bool = True
    ) -> None:
        """Move in the complete shards that another worker has left in its directory.

        If that was only suspended, this does no harm: it never writes to a complete shard again.

        Args:
            other: The other worker's directory.
            files: The names of the shards that this save will have.
            progress: Told how many bytes have been checked.
            is_gone: Whether it has gone without a word, so that what it has left is checked.
        """
        wanted = {*files} - self.shards.keys()
        noted = {entry.file: entry for entry in _read(other, self._key) if entry.file in wanted}
        total, done = sum(entry.digest.size for entry in noted.values()), 0
        for file, entry in noted.items():
            if is_gone:
                progress("checking shards of a killed save", done, total)
            done += entry.digest.size
            try:
                (other / file).rename(self._directory / file)
            except FileNotFoundError:  # the other process resumed and removed it, or it was lost
                continue
            if is_gone and hash_file(self._directory / file) != entry.digest:
                (self._directory / file).unlink()
                continue
            self.add(file, entry.digest, saw_change=entry.saw_change)
            self.taken_over.add(file)
            self.saw_change |= entry.saw_change

    def end(self) -> None:
        """Remove the journal, before the directory is published."""
        (self._directory / JOURNAL).unlink()

    def _append(self, entry: Mapping[str, Any]) -> None:
        with (self._directory / JOURNAL).open("ab") as file:
            file.write(canonical_json(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())


@frozen
class _Entry:
    file: str
    digest: FileDigest
    saw_change: bool


def _lines(directory: Path, key: str) -> list[bytes] | None:
    """The lines of the journal in `directory` after its first; None if it is not of that key."""
    path = directory / JOURNAL
    first, *lines = path.read_bytes().splitlines() or [b""] if path.is_file() else [b""]
    return lines if first == canonical_json({"key": key}) else None


def _read(directory: Path, key: str) -> Iterator[_Entry]:
    """What the journal in `directory` notes, up to where it was cut, if it is one of that key."""
    for line in _lines(directory, key) or []:
        try:
            entry = strict_json(line, JOURNAL)
            digest = from_document(FileDigest, entry["digest"])
            yield _Entry(entry["file"], digest, entry.get("saw_change", True))
        except (MalformedError, KeyError, TypeError):
            return
