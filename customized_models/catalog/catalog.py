"""`Catalog`: all rows of a registry, a part for each kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import EvictedError
from ..models import BaseModel, CompleteModel, CustomizedModel
from .bases import Bases
from .database import Database
from .events import Events
from .jobs import Jobs
from .labels import LabelRows
from .leases import Lease, Leases
from .levels import Levels
from .litter import LitterRows
from .reservations import Reservations
from .shares import Shares
from .usage import UsageRows


class Catalog:
    """The rows of the registry whose database is at `url`.

    Keeps no connection open; may be shared between threads, carried over a fork and pickled.
    """

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        self.leases = Leases(self.database)
        self.levels = Levels(self.database, self.leases)
        self.labels = LabelRows(self.database, self.levels)
        self.events = Events(self.database)
        self.bases = Bases(self.database)
        self.reservations = Reservations(self.database)
        self.jobs = Jobs(self.database, self.leases)
        self.shares = Shares(self.database, self.leases)
        self.litter = LitterRows(self.database)
        self.usage = UsageRows(self.database, self.levels)

    def __repr__(self) -> str:
        return f"Catalog({self.database!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Catalog, (self.database.url,)

    def lease(self, owner: str | None = None) -> Lease:
        """A lease of this process, to be entered; its owner is drawn if None."""
        return Lease(self.leases, self.database, owner)

    @contextmanager
    def hold(
        self, model: BaseModel | CustomizedModel | CompleteModel, purpose: str
    ) -> Iterator[None]:
        """Keep a model from being deleted while the block lasts.

        Raises:
            NotFoundError: It is not there.
            EvictedError: Its bytes are not there.
            LeaseLostError: At the end of the block, if the hold was lost meanwhile.
        """
        lease = self.lease()
        with self.database.write() as connection:
            known = self.levels.in_transaction(connection, type(model), model.name)
            if isinstance(known, CompleteModel) and known.evicted:
                raise EvictedError(
                    f"{known.name} is evicted: ModelRegistry.rebuild makes the same bytes again"
                )
            lease.take(connection, [model.key], purpose)
        with lease:
            yield
