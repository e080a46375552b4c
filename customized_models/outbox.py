"""What was trained and could not be registered: kept in the registry's root, and taken up later.

Each training has a directory of its own there, with what it saved and a record of how it was to be
registered. A training that has taken days must not be lost to a full disk or a moved base model.
"""

from __future__ import annotations

import errno
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from .errors import shown
from .files.documents import from_document, to_document
from .files.locks import lock
from .files.reading import json_object
from .files.writing import disk_errors, write_file
from .registering import Training, register

if TYPE_CHECKING:
    from .catalog.catalog import Catalog
    from .shelf import Shelf

_DIRECTORY = ".unregistered"
_RECORD, _SAVED = "registration.json", "saved"


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
            try:
                document = json.dumps(to_document(training), indent=1, sort_keys=True)
                write_file(kept / _RECORD, document.encode() + b"\n")
                _move(saved, kept / _SAVED)  # last: now it is whole
            except OSError:
                shutil.rmtree(kept, ignore_errors=True)
                raise
        return kept / _SAVED

    def recover(self, catalog: Catalog, shelf: Shelf) -> list[str]:
        """Register what was kept; says what was done, and why where it could not be."""
        return [done for kept in self.kept() for done in _register(catalog, shelf, kept)]

    def kept(self) -> list[Path]:
        """The directories of what can be registered; others are half-way, or were left there."""
        records = sorted(self.directory.glob(f"*/{_RECORD}"))
        return [record.parent for record in records if (record.parent / _SAVED).is_dir()]


def _move(saved: Path, target: Path) -> None:
    """Move a directory, at once or not at all; a full disk does not hinder it within one."""
    try:
        saved.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copying = target.with_name("copying")
        shutil.copytree(saved, copying)
        copying.rename(target)
        shutil.rmtree(saved, ignore_errors=True)


def _register(catalog: Catalog, shelf: Shelf, kept: Path) -> Iterator[str]:
    with lock(kept, wait=False) as alone:
        if not alone:  # another process takes it up, or has done so
            return
        try:
            training = from_document(Training, json_object(kept / _RECORD))
            model = register(catalog, shelf, kept / _SAVED, training)
        except Exception as error:  # what one has left does not keep the others back
            yield f"could not register {shown(kept / _SAVED)} ({error}); it is kept"
            return
        (kept / _RECORD).unlink(missing_ok=True)
        shutil.rmtree(kept, ignore_errors=True)
        yield f"registered {model.name}, which its training had left"
