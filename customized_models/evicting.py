"""Complete models without their bytes: dropped, and made again from adapter and base.

What is dropped can be merged again to the same digest, so that it takes space only while it is
used. Manifest and card stay, under a key of their own. They are published before the row says so,
and the bytes are removed after: what a killed process leaves between is litter, for `Shelf.gc`.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve

from .errors import BaseModelMismatch, IntegrityError, InUseError, NotFoundError
from .files.manifest import MANIFEST, README
from .files.reading import MAX_JSON
from .files.writing import disk_errors, write_file
from .jobs.job import Job
from .jobs.queue import JobQueue
from .models import BaseModel, CompleteModel, CustomizedModel
from .shelf import Shelf

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from .catalog.catalog import Catalog
    from .catalog.leases import Lease


def parents_of(
    catalog: Catalog, connection: Connection, complete: CompleteModel
) -> tuple[BaseModel, CustomizedModel]:
    """The very models that it was made of.

    Raises:
        NotFoundError: One of them has been deleted, or is another one now.
        BaseModelMismatch: The base model is another one now.
    """
    try:
        base = catalog.levels.in_transaction(connection, BaseModel, complete.base)
        customized = catalog.levels.in_transaction(connection, CustomizedModel, complete.customized)
    except NotFoundError as error:
        raise NotFoundError(
            f"{complete.name} cannot be merged again: {error}. Once that has been added again "
            f"under its name, with the same bytes, it can"
        ) from error
    if customized.digest != complete.customized_digest:
        raise NotFoundError(
            f"{complete.name} was made of {complete.customized_digest}, but {customized.name} "
            f"is {customized.digest} now"
        )
    if base.digest != complete.base_digest:
        raise BaseModelMismatch(
            f"{complete.name} was made on {complete.base_digest}, but base model {base.name} "
            f"is {base.digest} now"
        )
    return base, customized


def evict(catalog: Catalog, shelf: Shelf, complete: CompleteModel) -> CompleteModel:
    """See `ModelRegistry.evict`."""
    catalog.leases.wait_for_other_hosts([complete.key, complete.recipe_key])
    with (
        catalog.lease() as lease,
        shelf.storage.staging(f"evict-{uuid.uuid4().hex}") as staging,
    ):
        with catalog.database.write() as connection:
            known = catalog.levels.in_transaction(connection, CompleteModel, complete.name)
            if known.evicted:
                return known
            base, customized = parents_of(catalog, connection, known)
            _refuse_while_used(catalog, connection, known)
            catalog.leases.refuse_if_held(connection, known.recipe_key)
            keys = [known.recipe_key, customized.key, base.key]
            lease.take(connection, keys, f"the eviction of {known.name}")
        _refuse_unless_here(shelf, base, customized)
        _copy_record(shelf, known.key, staging)
        shelf.put(staging, known.recipe_key, lease)
        evicted = evolve(known, evicted=True)
        with catalog.database.write() as connection:
            lease.check(connection)
            _refuse_while_used(catalog, connection, known)
            if catalog.levels.in_transaction(connection, CompleteModel, known.name) != known:
                raise InUseError(f"the card of {known.name} was changed meanwhile; evict it again")
            catalog.levels.put(connection, evicted, action="evicted", evicted=1)
        shelf.remove(known.key)
    return evicted


def _refuse_while_used(catalog: Catalog, connection: Connection, complete: CompleteModel) -> None:
    catalog.levels.refuse_while_served_from(connection, complete)
    catalog.leases.refuse_if_held(connection, complete.key)


def _refuse_unless_here(shelf: Shelf, base: BaseModel, customized: CustomizedModel) -> None:
    """What it would be merged of must lie here before its own bytes, maybe the last, are gone."""
    with shelf.opened(base):
        pass
    stored = shelf.manifest(customized.key).digest
    if stored != customized.digest:
        raise IntegrityError(f"{customized.name} is stored as {stored}, not as recorded")


def put_back(
    catalog: Catalog,
    shelf: Shelf,
    complete: CompleteModel,
    staging: Path,
    lease: Lease,
) -> None:
    """Publish the bytes of an evicted model, which `staging` has but for manifest and card.

    Args:
        catalog: Its rows.
        shelf: Its bytes.
        complete: The evicted model, whose digest the bytes have been compared with.
        staging: A directory of the shelf's storage.
        lease: Holds the model and its recipe.
    """
    _copy_record(shelf, complete.recipe_key, staging)
    shelf.put(staging, complete.key, lease)
    with catalog.database.write() as connection:
        lease.check(connection)
        here = evolve(complete, evicted=False)
        catalog.levels.put(connection, here, action="rebuilt", evicted=0)
    shelf.remove(complete.recipe_key)


def rebuild(catalog: Catalog, queue: JobQueue, complete: CompleteModel) -> Job[CompleteModel]:
    """See `ModelRegistry.rebuild`."""
    with catalog.database.read() as connection:
        base, customized = parents_of(catalog, connection, complete)
    arguments: dict[str, Any] = {"rebuilds": complete.name}
    return queue.submit(
        "rebuild",
        lambda id: f"{complete.name}_r_{id.hex[:4]}",
        arguments,
        (customized.key, base.key, complete.key),
    )


def _copy_record(shelf: Shelf, key: str, directory: Path) -> None:
    with disk_errors(f"the record of {key} cannot be copied"):
        for name in (MANIFEST, README):
            with shelf.storage.open(key, name) as file:
                write_file(directory / name, file.read(MAX_JSON))
