"""Which shards of a save are complete, so that another save can take them over after a kill.

The journal lies beside the shards. A line is added, and pushed to the disk, once a shard is
whole and on the disk itself; nothing is believed that its SHA-256 does not confirm.
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
    """The journal of the save that writes into `directory`.

    `key`: what the bytes of its shards depend on; shards are taken over from a save of the same
    key alone. `shards`: the complete ones by file name.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self.shards: dict[str, FileDigest] = {}
        self._directory = directory
        self._key = key
        self._append({"key": key})

    def add(self, file: str, digest: FileDigest) -> None:
        """Note that `file` is complete and on the disk."""
        self._append({"file": file, "digest": to_document(digest)})
        self.shards[file] = digest

    def take_over(self, abandoned: Path, files: Collection[str], progress: Progress) -> None:
        """Move in the complete shards that a killed save left in its directory.

        Only those named in `files` are taken. Should its process only have been asleep, no harm is
        done: it never writes to a complete shard again.
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
            except FileNotFoundError:  # its process woke up and cleared it, or the disk lost it
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
    """What the journal in `directory` notes, if it is one of that key."""
    path = directory / JOURNAL
    first, *lines = path.read_bytes().splitlines() if path.is_file() else [b""]
    if first != canonical_json({"key": key}):
        return
    for line in lines:
        try:
            entry = strict_json(line, JOURNAL)
            yield entry["file"], from_document(FileDigest, entry["digest"])
        except (MalformedError, KeyError, TypeError):  # the kill cut it short
            return
