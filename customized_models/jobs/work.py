"""A job as its worker sees it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from ..errors import CustomizedModelsError
from ..models import Progress
from ..shelf import Shelf

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ..catalog.catalog import Catalog
    from ..catalog.leases import Lease


@frozen
class Work:
    """What is to be done, and what it is done with.

    Attributes:
        id: The job's.
        name: Of the model that it makes.
        arguments: What it was submitted with.
        catalog: The registry's rows.
        shelf: The registry's bytes.
        lease: Its worker's, which holds what the work reads.
        progress: Called often; raises when it is time to stop.
        before: Its workers before this one, which are gone, by the owners of their leases.
    """

    id: uuid.UUID
    name: str
    arguments: Mapping[str, Any]
    catalog: Catalog
    shelf: Shelf
    lease: Lease
    progress: Progress
    before: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        row: Mapping[str, Any],
        catalog: Catalog,
        shelf: Shelf,
        lease: Lease,
        progress: Progress,
    ) -> Work:
        """The job of a row."""
        arguments = json.loads(row["arguments"])
        id = uuid.UUID(row["id"])
        before = [owner for owner in catalog.jobs.workers_of(row) if owner != lease.owner]
        return cls(id, row["name"], arguments, catalog, shelf, lease, progress, before)

    def end(
        self, connection: Connection, state: str, error: CustomizedModelsError | None = None
    ) -> None:
        """End the job in the transaction that counts: once it is visible, nothing is left to do."""
        self.catalog.jobs.end(connection, str(self.id), state, error)
        self.lease.end(connection)
