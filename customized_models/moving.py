"""A registry copied into another: bytes first, under keys that no row names, then all rows at once.

So nothing is seen of a copy before all of it is there, and one that was interrupted leaves whole
models, which the next one finds. What was added or changed meanwhile is copied before the rows.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve

from .errors import AlreadyExistsError, IntegrityError, MalformedError, NotFoundError, listed, shown
from .files.digests import FileDigest
from .files.documents import from_document
from .files.manifest import MANIFEST, README, Manifest, files_under
from .files.reading import MAX_JSON, opened
from .files.streams import FileWriter, copy_range
from .files.writing import disk_errors, write_file
from .models import CompleteModel, Progress
from .shelf import Shelf, card_files
from .storage import Storage

if TYPE_CHECKING:
    from .catalog.catalog import Catalog
    from .catalog.leases import Lease
    from .catalog.moving import Parcel


def copy_registry(
    source: tuple[Catalog, Shelf], target: tuple[Catalog, Shelf], progress: Progress
) -> None:
    """See `ModelRegistry.copy_to`."""
    from .catalog.moving import begin_copy, copy_rows

    (rows, shelf), (new_rows, new_shelf) = source, target
    with new_rows.lease() as lease, rows.lease() as hold:
        if not begin_copy(rows, new_rows, lease):
            return
        _refuse_others(shelf.storage, new_shelf.storage)
        here: dict[str, Parcel] = {}
        while missing := copy_rows(rows, new_rows, lease, here):
            done, total = 0, sum(_size(shelf, parcel) for parcel in missing)
            for parcel in missing:
                _hold(rows, hold, parcel)
                for count in _bring(parcel, shelf, new_shelf):
                    done += count
                    progress("copying", done, total)
                here[parcel.key] = parcel


def _refuse_others(source: Storage, target: Storage) -> None:
    others = set(target.keys())
    if others:
        others -= set(source.keys())
    if others:
        raise AlreadyExistsError(
            f"the storage to copy to has {listed(others)} already, which are not of this registry; "
            f"copy to an empty one. If they belong to nothing, gc(grace_seconds=0) of the registry "
            f"to copy to removes them"
        )


def _hold(catalog: Catalog, lease: Lease, parcel: Parcel) -> None:
    """Keep what is copied from being deleted, in place of what was copied before."""
    with catalog.database.write() as connection:
        lease.end(connection)
        lease.take(connection, [parcel.key], f"a copy of the registry in process {os.getpid()}")


def _size(shelf: Shelf, parcel: Parcel) -> int:
    return parcel.size if parcel.model else _manifest(shelf, parcel).size


def _manifest(shelf: Shelf, parcel: Parcel) -> Manifest:
    try:
        manifest = shelf.manifest(parcel.key)
    except (NotFoundError, MalformedError, IntegrityError) as error:
        raise _damaged(parcel, str(error)) from error
    if parcel.model is not None and manifest.digest != parcel.model.digest:
        raise _damaged(parcel, f"it is stored as {manifest.digest}, not as recorded")
    return manifest


def _damaged(parcel: Parcel, why: str) -> IntegrityError:
    return IntegrityError(
        f"{parcel.name} is damaged, so the registry was not copied: {why}; delete it, or put back "
        f"what a backup has of {shown(parcel.key)}"
    )


def _bring(parcel: Parcel, source: Shelf, target: Shelf) -> Iterator[int]:
    """Copy what is stored under a key, unless it is there; yields how many bytes are done.

    Its card is the one that its row has.
    """
    manifest, there = _manifest(source, parcel), _there(target, parcel)
    small = _small_files(source, parcel, manifest)
    if there is None:
        yield from _publish(parcel, source, target, manifest, small)
        return
    if there.digest != manifest.digest:
        raise _taken(parcel)
    if there.to_bytes() != small[MANIFEST]:
        for name, data in small.items():
            target.storage.rewrite(parcel.key, name, data)
    yield parcel.size


def _small_files(source: Shelf, parcel: Parcel, manifest: Manifest) -> dict[str, bytes]:
    """The manifest and, of a model, its card, by their names in the directory."""
    model = parcel.model
    if model is None:
        return {MANIFEST: manifest.to_bytes()}
    if from_document(type(model), manifest.record["model"]) == model:
        with suppress(NotFoundError), source.storage.open(parcel.key, README) as file:
            return {MANIFEST: manifest.to_bytes(), README: file.read(MAX_JSON)}
    if isinstance(model, CompleteModel):
        model = evolve(model, evicted=False)  # a recipe is that of the whole model
    return card_files(manifest, model)


def _there(target: Shelf, parcel: Parcel) -> Manifest | None:
    """The manifest of what an interrupted copy has brought, which is whole; None if it has not."""
    try:
        return target.manifest(parcel.key)
    except NotFoundError:
        return None
    except (MalformedError, IntegrityError) as error:
        raise _taken(parcel) from error


def _taken(parcel: Parcel) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"the storage to copy to has something else under {shown(parcel.key)}; copy to an empty one"
    )


def _publish(
    parcel: Parcel, source: Shelf, target: Shelf, manifest: Manifest, small: Mapping[str, bytes]
) -> Iterator[int]:
    with target.storage.staging(f"copy-{uuid.uuid4().hex}") as staging:
        if not parcel.is_recipe:
            with source.storage.checkout(parcel.key) as directory:
                yield from _copy_content(parcel, directory, staging, manifest.content)
        with disk_errors(f"{parcel.name} cannot be written"):
            for name, data in small.items():
                write_file(staging / name, data)
        target.storage.publish(staging, parcel.key)


def _copy_content(
    parcel: Parcel, directory: Path, staging: Path, content: Mapping[str, FileDigest]
) -> Iterator[int]:
    found = {path.relative_to(directory).as_posix() for path in files_under(directory)}
    if wrong := found - {MANIFEST, README} ^ content.keys():
        raise _damaged(parcel, f"it lacks, or should not have, {listed(wrong)}")
    for name, expected in content.items():
        try:
            copied = _copied(directory / name, staging / name, expected)
        except MalformedError as error:
            raise _damaged(parcel, str(error)) from error
        if copied != expected:
            raise _damaged(parcel, f"{shown(name)} differs from what was recorded")
        yield expected.size


def _copied(file: Path, target: Path, expected: FileDigest) -> FileDigest:
    """Copy a file of that size; the digest of what was copied, which is on the disk."""
    with disk_errors(f"{shown(file.name)} cannot be copied"):
        target.parent.mkdir(parents=True, exist_ok=True)
    with opened(file) as fd, FileWriter(target, expected.algorithm) as writer:
        copy_range(fd, 0, os.fstat(fd).st_size, writer, shown(file.name))
        return writer.finish()
