"""What was trained and could not be registered: kept in the registry's root, and taken up later.

Each training has a directory of its own there, with what it saved and a record of how it was to be
registered. A training that has taken days must not be lost to a full disk or a moved base model.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from .errors import CustomizedModelsError, shown
from .files.documents import from_document, to_document
from .files.reading import json_object
from .files.writing import disk_errors, write_file
from .registering import Training, register

if TYPE_CHECKING:
    from .catalog.catalog import Catalog
    from .shelf import Shelf

_DIRECTORY = ".unregistered"
_RECORD = "registration.json"


@frozen
class Outbox:
    """The trainings that are kept in the root of a registry."""

    root: Path

    @property
    def directory(self) -> Path:
        """Where they are; also for what is about to be registered."""
        return self.root / _DIRECTORY

    def keep(self, name: str, saved: Path, training: Training) -> Path:
        """Move what a training has saved in, to be registered by `recover`.

        Args:
            name: The reserved name of the customized model.
            saved: The directory, which is gone afterwards.
            training: How it is to be registered.

        Returns:
            Where it is now.

        Raises:
            StorageError: It could not be moved; it is still in `saved`.
        """
        kept = self.directory / f"{name}-{uuid.uuid4().hex[:8]}"
        with disk_errors(f"{name} cannot be kept in {shown(kept.parent)}"):
            kept.mkdir(parents=True)
            shutil.copytree(saved, kept / "saved")
            document = json.dumps(to_document(training), indent=1, sort_keys=True)
            write_file(kept / _RECORD, document.encode() + b"\n")  # last: now it is whole
            shutil.rmtree(saved)
        return kept / "saved"

    def recover(self, catalog: Catalog, shelf: Shelf) -> list[str]:
        """Register what was kept; says what was done, and why where it could not be."""
        return [done for kept in self._kept() for done in _register(catalog, shelf, kept)]

    def _kept(self) -> list[Path]:
        return sorted(record.parent for record in self.directory.glob(f"*/{_RECORD}"))


def _register(catalog: Catalog, shelf: Shelf, kept: Path) -> Iterator[str]:
    with _alone(kept) as alone:
        if not alone:
            return
        try:
            training = from_document(Training, json_object(kept / _RECORD))
            model = register(catalog, shelf, kept / "saved", training)
        except CustomizedModelsError as error:
            yield f"could not register {shown(kept / 'saved')} ({error}); it is kept"
            return
        shutil.rmtree(kept)
        yield f"registered {model.name}, which its training had left"


@contextmanager
def _alone(kept: Path) -> Iterator[bool]:
    """Whether no other process takes up this one; none does while the block lasts."""
    import fcntl  # Windows, where the package can be imported, has none

    try:
        record = (kept / _RECORD).open("rb")
    except FileNotFoundError:  # another has taken it up
        yield False
        return
    with record:
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield (kept / _RECORD).exists()
