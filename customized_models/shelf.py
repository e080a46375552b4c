"""`Shelf`: the bytes of a registry, published, opened, checked and removed.

A model's row comes before its bytes and outlives them: it is "pending" while they are written,
"visible" once they are whole, "deleting" while they are removed. The steps between are made
without any lock on the database, however long they take, under a lease that tells others whether
someone is still about it. What a killed process left half-way is finished or undone by `recover`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import evolve, frozen

from .base_models import verified_path
from .cards.readme import render, storable_card
from .errors import (
    AlreadyExistsError,
    CustomizedModelsError,
    DatabaseError,
    IntegrityError,
    InUseError,
    JobLost,
    MalformedError,
    NotFoundError,
    StorageError,
    listed,
    shown,
)
from .files.checking import FileCheck
from .files.documents import from_document, to_document
from .files.manifest import MANIFEST, README, Manifest
from .files.reading import MAX_JSON, python_json
from .files.writing import disk_errors
from .models import BaseModel, CompleteModel, CustomizedModel, ModelCard, Progress
from .storage import Storage
from .values import Value, checked

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from .catalog.catalog import Catalog
    from .catalog.leases import Lease
    from .catalog.levels import Unfinished

Stored: TypeAlias = "CustomizedModel | CompleteModel"
Finish: TypeAlias = Callable[[Progress], None]
"""Waits until all that was read is hashed; raises if a byte is not what was recorded."""

CACHE_BYTES = 20 * 10**9  # a model of 8 billion parameters in all four modes has about 34
GRACE_SECONDS = 7 * 24 * 3600.0  # as long as an abandoned staging directory is kept


@frozen(field_transformer=checked)
class Litter(Value):
    """Stored bytes that belong to no model.

    Attributes:
        key: Where they are stored.
        removed: Whether `gc` removed them; else their time of grace has not passed.
    """

    key: str
    removed: bool


class Shelf:
    """The bytes that `storage` keeps for the models in `catalog`."""

    def __init__(self, storage: Storage, catalog: Catalog) -> None:
        self.storage = storage
        self._catalog = catalog

    def __repr__(self) -> str:
        return f"Shelf({self.storage!r})"

    # Publishing

    def publish(
        self,
        model: Stored,
        staging: Path,
        lease: Lease,
        *,
        with_it: Callable[[Connection], None] | None = None,
    ) -> None:
        """Publish a staged directory as `model`, whose row `announce` has made.

        Args:
            model: What it is from now on.
            staging: A directory of this shelf's storage, with its manifest.
            lease: What the model was announced under; it is released.
            with_it: Further changes of the transaction that makes the model visible.

        Raises:
            StorageError: The storage failed; nothing is published.
            DatabaseError: The database failed; if `outcome_unknown`, it may be published.
            JobLost: The lease has ended, and someone else has taken over.
        """
        try:
            size = Manifest.read(staging).size
            self.put(staging, model.key, lease)
        except BaseException:
            self._undo(model, lease)
            raise
        try:
            with self._catalog.database.write() as connection:
                lease.check(connection)
                self._catalog.levels.make_visible(connection, model, lease.owner, size=size)
                if with_it is not None:
                    with_it(connection)
                lease.end(connection)
        except DatabaseError:
            if not self._is_visible(model):
                self._undo(model, lease)
                raise

    def announce(self, connection: Connection, model: Stored, lease: Lease) -> None:
        """Say, before its bytes are published, that they will be; its name is taken from now on.

        Raises:
            AlreadyExistsError: The name is taken.
        """
        self._catalog.levels.insert_pending(connection, model, lease.owner)
        purpose = f"the publication of {model.name} in process {os.getpid()}"
        lease.take(connection, [model.key], purpose)

    def put(self, staging: Path, key: str, lease: Lease) -> None:
        """Publish a staged directory under a key that a row says is the caller's.

        Whoever has the row owns the key: bytes under it are what a killed process left.

        Raises:
            JobLost: There are bytes, and the lease has ended: they may be a successor's.
        """
        with disk_errors(f"{shown(key)} cannot be published"):
            try:
                self.storage.publish(staging, key)
            except AlreadyExistsError:
                with self._catalog.database.read() as connection:
                    lease.check(connection)
                self.storage.delete(key)
                self.storage.publish(staging, key)

    def _undo(self, model: Stored, lease: Lease) -> None:
        """Take back what was announced; where that fails, `recover` does it later.

        So it does where the lease has ended: the bytes may be a successor's.
        """
        with suppress(StorageError, DatabaseError, JobLost):
            with self._catalog.database.read() as connection:
                lease.check(connection)
            self.remove(model.key)
            with self._catalog.database.write() as connection:
                self._catalog.levels.drop(connection, model, lease.owner)
                lease.end(connection)

    def _is_visible(self, model: Stored) -> bool:
        """Whether a commit of which nothing was heard was made after all."""
        try:
            return self._catalog.levels.is_visible(model)
        except DatabaseError as error:
            raise DatabaseError(
                f"the database failed while {model.name} was published; whether it was is not "
                f"known: list the models, or do the same again",
                outcome_unknown=True,
            ) from error

    # Opening

    @contextmanager
    def checkout(self, model: BaseModel | Stored) -> Iterator[Path]:
        """The model's directory, read-only; nobody deletes it while the block lasts.

        Raises:
            NotFoundError: It has been deleted.
            BaseModelMissingError, BaseModelMismatch: A base model is gone or changed.
            LeaseLostError: At the end of the block, if it may have been deleted meanwhile.
        """
        purpose = f"a checkout in process {os.getpid()}"
        with self._catalog.hold(model, purpose), self.opened(model) as directory:
            yield directory

    @contextmanager
    def opened(self, model: BaseModel | Stored) -> Iterator[Path]:
        """As `checkout`, for those who hold the model already, such as a job."""
        if isinstance(model, BaseModel):
            with self._catalog.database.read() as connection:
                location = self._catalog.bases.location(connection, model.name)
            yield verified_path(location)
        else:
            with ExitStack() as stack:
                with disk_errors(f"{model.name} cannot be opened"):
                    directory = stack.enter_context(self.storage.checkout(model.key))
                yield directory

    @contextmanager
    def proven(self, model: BaseModel | Stored) -> Iterator[tuple[Path, Finish]]:
        """As `opened`, while every content file is hashed beside the block's own reading.

        Yields:
            The directory, and what the block calls once it has read all: it raises
            `BaseModelMismatch` or `IntegrityError` if any byte is not what was recorded.
        """
        with self.checked(model) as (directory, check), check.beside() as finish:
            yield directory, finish

    @contextmanager
    def checked(self, model: BaseModel | Stored) -> Iterator[tuple[Path, FileCheck]]:
        """As `opened`, with what compares every content file with what was recorded.

        The block reads large files through it, and lets it read the rest in the end.
        """
        with self.opened(model) as directory:
            if isinstance(model, BaseModel):
                with self._catalog.database.read() as connection:
                    location = self._catalog.bases.location(connection, model.name)
                yield directory, FileCheck(directory, location.digests, location.refuse_changed)
            else:
                content = _manifest_of(model, directory).content
                yield directory, FileCheck(directory, content, _damaged(model))

    def document(self, model: BaseModel | Stored, file: str) -> dict[str, Any]:
        """The JSON object in one small file of a model, which is not downloaded as a whole.

        Raises:
            NotFoundError: It has no such file.
            MalformedError: It is no JSON object.
        """
        if isinstance(model, BaseModel):
            with self.opened(model) as directory, (directory / file).open("rb") as opened:
                data = opened.read(MAX_JSON)
        else:
            with self.storage.open(model.key, file) as opened:
                data = opened.read(MAX_JSON)
        document = python_json(data, file)
        if not isinstance(document, dict):
            raise MalformedError(f"{shown(file)} holds no JSON object")
        return document

    def verify(self, model: Stored) -> None:
        """Read every byte of the model and compare it with what was recorded.

        Raises:
            IntegrityError: Naming the files that differ.
        """
        with self.checkout(model) as directory:
            _manifest_of(model, directory).verify(directory)

    def change_card(
        self, model: Stored, change: Callable[[ModelCard], ModelCard]
    ) -> CustomizedModel | CompleteModel:
        """Put another card in place of a model's: in its row, its manifest's record, its README.

        Raises:
            NotFoundError: It has been deleted.
            MalformedError: The card has what JSON does not have, or too much.
        """
        catalog, kind = self._catalog, type(model)
        with catalog.hold(model, f"a change of its card in process {os.getpid()}"):
            with catalog.database.write() as connection:
                known = catalog.levels.in_transaction(connection, kind, model.name)
                changed = evolve(known, card=storable_card(change(known.card)))
                catalog.levels.put(connection, changed)
            while True:
                self._write_card(changed)
                written, changed = changed, catalog.levels.get(kind, model.name)
                if changed == written:  # or else another process has changed it meanwhile
                    return changed

    def _write_card(self, model: Stored) -> None:
        """Let the files that tell of a model tell what its row does. The manifest counts."""
        for name, data in card_files(self.manifest(model.key), model).items():
            self.storage.rewrite(model.key, name, data)

    # Deleting

    def delete(self, model: Stored) -> None:
        """Remove a model's bytes and its row.

        Raises:
            NotFoundError: It is not there.
            InUseError: Naming what still needs it.
            StorageError: Its bytes could not be removed; deleting again, or `recover`, does it.
        """
        catalog = self._catalog
        catalog.leases.wait_for_other_hosts([model.key])
        with catalog.lease() as lease:
            with catalog.database.write() as connection:
                catalog.levels.mark_deleting(connection, model, lease.owner)
                purpose = f"the deletion of {model.name} in process {os.getpid()}"
                lease.take(connection, [model.key], purpose)
            self._finish_deletion(model, lease)

    def remove(self, key: str) -> None:
        """Remove the bytes under a key that a row says is the caller's."""
        with disk_errors(f"{shown(key)} cannot be deleted"):
            self.storage.delete(key)

    def _finish_deletion(self, model: Stored, lease: Lease) -> None:
        self.remove(model.key)
        if isinstance(model, CompleteModel):
            self.remove(model.recipe_key)
        with self._catalog.database.write() as connection:
            self._catalog.levels.drop(connection, model, lease.owner)
            lease.end(connection)

    # What killed processes left

    def recover(self) -> list[str]:
        """Finish or undo what processes left half-way that are gone; says what was done.

        A publication whose bytes are whole is finished, any other is undone. A deletion is
        finished.

        Raises:
            StorageError, DatabaseError: It cannot be done now; the rest was.
        """
        done, failed = [], list[CustomizedModelsError]()
        for change in self._catalog.levels.unfinished():
            if isinstance(change.value, CustomizedModel | CompleteModel):
                try:
                    done += self._recover(change)
                except (StorageError, DatabaseError) as error:
                    failed.append(error)
        if failed:
            raise failed[0]
        return done

    def _recover(self, change: Unfinished) -> list[str]:
        model, catalog = change.value, self._catalog
        with catalog.lease() as lease:
            with catalog.database.write() as connection:
                if not catalog.levels.claim(connection, change, lease.owner):
                    return []
                purpose = f"the recovery of {model.name} in process {os.getpid()}"
                lease.take(connection, [model.key], purpose)
            if change.stage == "deleting":
                self._finish_deletion(model, lease)
                return [f"finished deleting {model.name}"]
            size = self._size_if_whole(model)
            if size is None:
                self._finish_deletion(model, lease)
                return [f"undid the publication of {model.name}"]
            with catalog.database.write() as connection:
                catalog.levels.make_visible(connection, model, lease.owner, size=size)
                catalog.jobs.finish_for(connection, model.name, "succeeded")
                lease.end(connection)
            return [f"finished publishing {model.name}"]

    def _size_if_whole(self, model: Stored) -> int | None:
        """The size of `model` if it is published, which a storage does as a whole or not."""
        try:
            manifest = self.manifest(model.key)
        except (NotFoundError, MalformedError, IntegrityError):
            return None
        return manifest.size if manifest.digest == model.digest else None

    def manifest(self, key: str) -> Manifest:
        """What is stored under a key, by its manifest; nothing else is read.

        Raises:
            NotFoundError: Nothing is.
            MalformedError, IntegrityError: The manifest is damaged.
        """
        with self.storage.open(key, MANIFEST) as file:
            return Manifest.parse(file.read(MAX_JSON))

    def reindex(self) -> list[str]:
        """See `ModelRegistry.reindex`."""
        made, damaged = list[str](), dict[str, CustomizedModelsError]()
        for place, kind in _PLACES.items():
            for key in self.storage.keys(f"{place}/"):
                try:
                    made += self._reindex(kind, key)
                except (MalformedError, IntegrityError, NotFoundError) as error:
                    damaged[key] = error
        if damaged:
            raise IntegrityError(
                f"manifests of stored models are damaged: {listed(damaged)}; "
                f"{next(iter(damaged.values()))}"
            )
        return made

    def _reindex(self, kind: type[Stored], key: str) -> list[str]:
        manifest = self.manifest(key)
        model = from_document(kind, manifest.record["model"])
        base = from_document(BaseModel, manifest.record["base"])
        columns: dict[str, Any] = {"size": manifest.size}
        is_place = key == model.key
        if isinstance(model, CompleteModel) and key == model.recipe_key:
            model, is_place = evolve(model, evicted=True), True
        if not is_place or (model.digest, base.name) != (manifest.digest, model.base):
            raise IntegrityError(f"the record in {MANIFEST} of {shown(key)} is of another model")
        levels, made = self._catalog.levels, []
        with self._catalog.database.write() as connection:
            if levels.restore(connection, base, path=None, files="{}"):
                made.append(base.name)
            if levels.restore(connection, model, **columns):
                made.append(model.name)
        return made

    def gc(self, *, grace_seconds: float = GRACE_SECONDS, dry_run: bool = False) -> list[Litter]:
        """Remove stored bytes that belong to no model and that nobody is about.

        They are removed `grace_seconds` after `gc` has first seen them. Bytes of models that the
        database has lost are such bytes as well: `ModelRegistry.reindex` makes their rows again.

        Returns:
            All that was found.
        """
        found = []
        with self._catalog.database.write() as connection:
            self._catalog.leases.forget_ended(connection)
            self._catalog.leases.refuse_during_copy(connection)  # which has bytes without rows
            known = self._catalog.litter.known_keys(connection)
        for key in self.storage.keys():  # noqa: SIM118 -- a method, not a mapping
            if key not in known:
                due = self._catalog.litter.age(key) >= grace_seconds and not dry_run
                found.append(Litter(key, due and self._remove_unused(key)))
        self._catalog.litter.forget_all_but({litter.key for litter in found if not litter.removed})
        with self.storage.staging(f"gc-{uuid.uuid4().hex}"):
            pass  # a storage sweeps abandoned directories when it makes one
        return found

    def trim(self, prefix: str, keep: int = CACHE_BYTES) -> None:
        """Keep those stored keys with that prefix that were used last, as many as fit; no others.

        What a row names or somebody holds stays, and does not count.

        Args:
            prefix: Of files that can be made again, such as `gguf/`.
            keep: Bytes of unused ones that may stay.
        """
        with self._catalog.database.read() as connection:
            known = self._catalog.litter.known_keys(connection)
        unused = [key for key in self.storage.keys(prefix) if key not in known]
        for _, key in sorted((self._catalog.litter.age(key), key) for key in unused):
            size = self._size(key)
            if size is None or size > keep:
                self._remove_unused(key)
            else:
                keep -= size

    def bytes_of(self, prefix: str) -> int:
        """Bytes of the stored keys with that prefix, but for those that are damaged."""
        return sum(self._size(key) or 0 for key in self.storage.keys(prefix))

    def _size(self, key: str) -> int | None:
        """Bytes of the content of a key; None if its manifest is damaged, or just removed."""
        try:
            return self.manifest(key).size
        except (NotFoundError, MalformedError, IntegrityError):
            return None

    def _remove_unused(self, key: str) -> bool:
        """Remove a key that no row names and nobody holds; False if it is needed after all."""
        with self._catalog.lease() as lease, suppress(InUseError):
            with self._catalog.database.write() as connection:
                self._catalog.leases.refuse_if_held(connection, key)
                if key in self._catalog.litter.known_keys(connection):
                    return False
                lease.take(connection, [key], "the removal of what nobody needs")
            self.remove(key)
            return True
        return False


_PLACES: Mapping[str, type[Stored]] = {
    "customized": CustomizedModel,
    "complete": CompleteModel,
    "evicted": CompleteModel,  # after those that are whole: bytes count more than their recipe
}
"""Where the manifests of which models are."""


def card_files(manifest: Manifest, model: Stored) -> dict[str, bytes]:
    """The files that tell of a model, with the card that it has now, by their names.

    Args:
        manifest: Of its bytes, whatever card that tells of.
        model: The model.
    """
    base = from_document(BaseModel, manifest.record["base"])
    record = {**manifest.record, "model": to_document(model)}
    manifest = evolve(manifest, record=record)
    return {MANIFEST: manifest.to_bytes(), README: render(model, base).encode()}


def _manifest_of(model: Stored, directory: Path) -> Manifest:
    manifest = Manifest.read(directory)
    if manifest.digest != model.digest:
        raise IntegrityError(f"{model.name} is stored as {manifest.digest}, not as recorded")
    return manifest


def _damaged(model: Stored) -> Callable[..., CustomizedModelsError]:
    return lambda names: IntegrityError(
        f"{model.name} is damaged: {listed(names)} differ from what was recorded"
    )
