"""A model as one GGUF file at a path, for tools that are given files, such as LM Studio."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from attrs import frozen

from ..errors import IntegrityError, shown
from ..files.digests import SHA256, new_hash
from ..files.documents import from_document
from ..files.writing import disk_errors, fsync, rename_without_replacing
from ..gguf import GGUFFile
from ..jobs.work import Work
from ..models import Progress, Quantization
from .artifacts import RegistryArtifact
from .request import KINDS

_PIECE = 8 << 20  # bytes that are copied between two reports


@frozen
class ExportRequest:
    """An export, as `Deployer.export_gguf` was called; `path` is absolute."""

    kind: Literal["customized", "complete"]
    model: str
    path: str
    quantization: Quantization


def run_export(work: Work) -> None:
    """The worker's part of `Deployer.export_gguf`."""
    catalog, request = work.catalog, from_document(ExportRequest, dict(work.arguments))

    def hold(key: str) -> None:
        with catalog.database.write() as connection:
            work.lease.take(connection, [key], f"the export of {request.model}")
            catalog.litter.forget(connection, key)

    model = catalog.levels.get(KINDS[request.kind], request.model)
    with RegistryArtifact(
        catalog, work.shelf, model, work.name, request.quantization, hold
    ) as artifact:
        file = artifact.gguf(work.progress, chat_template=True)
        put_file(file, Path(request.path), work.progress)
    with catalog.database.write() as connection:
        work.lease.check(connection)
        work.end(connection, "succeeded")
    work.shelf.trim("gguf/")


def put_file(file: GGUFFile, path: Path, progress: Progress) -> None:
    """Copy a file to a path that must be free; all or nothing.

    Raises:
        AlreadyExistsError: Something is there.
        IntegrityError: The file has other bytes by now.
        StorageError: The disk failed.
    """
    part = path.with_name(f".{path.name[:200]}.{os.urandom(4).hex()}")
    with disk_errors(f"{shown(str(path))} cannot be written"):
        try:
            _copy(file, part, progress)
            rename_without_replacing(part, path)
            fsync(path.parent)
        finally:
            part.unlink(missing_ok=True)


def _copy(file: GGUFFile, target: Path, progress: Progress) -> None:
    hash, done = new_hash(SHA256), 0
    with file.path.open("rb") as source, target.open("xb") as copy:
        while piece := source.read(_PIECE):
            copy.write(piece)
            hash.update(piece)
            done += len(piece)
            progress("copying", done, max(done, file.size))
        copy.flush()
        os.fsync(copy.fileno())
    if f"{SHA256}:{hash.hexdigest()}" != file.digest:
        raise IntegrityError(f"{shown(file.path.name)} changed while it was copied")
