"""Which shards of a save are complete, so that another save can take them over after a kill.

The journal is a file beside the shards. Its first line says what the shards depend on. Each other
line is added, and synced to the disk, once a shard is complete and on the disk itself. Nothing in
it is believed that the shard's digest does not confirm: a kill may have cut it anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

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
    """

    def __init__(self, directory: Path, key: str) -> None:
        """Begin a journal.

        Args:
            directory: Where the shards are written.
            key: What their bytes depend on; shards are only taken over from a save of this key.
        """
        self.shards: dict[str, FileDigest] = {}
        self._directory = directory
        self._key = key
        self._append({"key": key})

    def add(self, file: str, digest: FileDigest) -> None:
        """Note that the shard `file` is complete and on the disk."""
        self._append({"file": file, "digest": to_document(digest)})
        self.shards[file] = digest

    def take_over(self, abandoned: Path, files: Collection[str], progress: Progress) -> None:
        """Move in the complete shards that a killed save left in its directory.

        If the other process was only suspended, this does no harm: it never writes to a complete
        shard again.

        Args:
            abandoned: The killed save's directory.
            files: The names of the shards that this save will have.
            progress: Told how many bytes have been checked.
        """
        noted = {file: digest for file, digest in _read(abandoned, self._key) if file in files}
        total, done = sum(digest.size for digest in noted.values()), 0
        for file, digest in noted.items():
            progress("checking shards of a killed save", done, total)
            done += digest.size
            if file in self.shards:
                continue
            try:
                (abandoned / file).rename(self._directory / file)
            except FileNotFoundError:  # the other process resumed and removed it, or it was lost
                continue
            if hash_file(self._directory / file) == digest:
                self.add(file, digest)
            else:
                (self._directory / file).unlink()

    def end(self) -> None:
        """Remove the journal, before the directory is published."""
        (self._directory / JOURNAL).unlink()

    def _append(self, entry: Mapping[str, Any]) -> None:
        with (self._directory / JOURNAL).open("ab") as file:
            file.write(canonical_json(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _read(directory: Path, key: str) -> Iterator[tuple[str, FileDigest]]:
    """What the journal in `directory` notes, up to where it was cut, if it is one of that key."""
    path = directory / JOURNAL
    lines = path.read_bytes().splitlines() if path.is_file() else []
    if lines[:1] != [canonical_json({"key": key})]:
        return
    for line in lines[1:]:
        try:
            entry = strict_json(line, JOURNAL)
            yield entry["file"], from_document(FileDigest, entry["digest"])
        except (MalformedError, KeyError, TypeError):
            return
