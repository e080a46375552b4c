"""Which stored keys belong to a row, and since when those that do not have been known."""

from __future__ import annotations

import time
from collections.abc import Collection

from sqlalchemy import Connection, delete, insert, select

from .database import Database
from .schema import complete_models, customized_models, leases, litter, live_models


class LitterRows:
    """What `Shelf.gc` has seen."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def known_keys(self, connection: Connection) -> set[str]:
        """The keys that a row of any stage names, or that a lease holds."""
        customized = connection.execute(select(customized_models.c.name)).scalars()
        complete = connection.execute(select(complete_models.c.name, complete_models.c.evicted))
        served = connection.execute(
            select(live_models.c.artifact).where(live_models.c.state != "undeployed")
        ).scalars()
        held = connection.execute(select(leases.c.key)).scalars()
        return {
            *(f"customized/{name}" for name in customized),
            *(f"{'evicted' if evicted else 'complete'}/{name}" for name, evicted in complete),
            *filter(None, served),
            *held,
        }

    def age(self, key: str) -> float:
        """For how many seconds `key` has been known as litter; noted now if it was not known."""
        now = time.time()
        with self._database.write() as connection:
            seen = connection.execute(select(litter.c.seen).where(litter.c.key == key)).scalar()
            if seen is None:
                connection.execute(insert(litter).values(key=key, seen=now))
        return 0.0 if seen is None else now - float(seen)

    def forget(self, connection: Connection, key: str) -> None:
        """Forget a key that is used again."""
        connection.execute(delete(litter).where(litter.c.key == key))

    def forget_all_but(self, keys: Collection[str]) -> None:
        """Forget the keys that are litter no more."""
        with self._database.write() as connection:
            connection.execute(delete(litter).where(litter.c.key.not_in(list(keys))))
