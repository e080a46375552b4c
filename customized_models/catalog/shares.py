"""Which worker makes which part of a save that several share.

A shard is its maker's while that holds `job/<id>/<shard>`; if it is killed, its lease ends and
another may take it. The worker that does the job also holds a key for each helper that it has seen
to make the same bytes, in a directory that it sees: only such a helper takes shards.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection

from ..errors import InUseError
from .database import Database
from .leases import Lease, Leases


class Shares:
    """The shards that workers of a registry's jobs hold."""

    def __init__(self, database: Database, leases: Leases) -> None:
        self._database = database
        self._leases = leases

    def claim(self, id: str, files: Iterable[str], most: int, lease: Lease) -> list[str]:
        """Hold the first of `files` that nobody else holds, at most so many; returns which.

        Raises:
            JobLost: The lease has ended.
        """
        mine: list[str] = []
        with self._database.write() as connection:
            lease.check(connection)
            for file in files:
                shard = _shard(id, file)
                if len(mine) < most and not self._is_held(connection, shard, but=lease.owner):
                    mine.append(file)
            lease.take(connection, [_shard(id, file) for file in mine], "the merge of a shard")
        return mine

    def welcome(self, id: str, helper: str, lease: Lease) -> None:
        """Let a helper take shards while this lease lasts, which is that of the job's worker."""
        with self._database.write() as connection:
            lease.check(connection)
            lease.take(connection, [_welcome(id, helper)], "the help of another worker")

    def is_welcome(self, id: str, helper: str) -> bool:
        """Whether the worker that does the job lets that helper take shards."""
        with self._database.write() as connection:
            return self._is_held(connection, _welcome(id, helper))

    def keep(self, id: str, files: Iterable[str], lease: Lease) -> None:
        """Hold shards that another worker has made and that are now taken over.

        Raises:
            JobLost: The lease has ended.
        """
        with self._database.write() as connection:
            lease.check(connection)
            lease.take(connection, [_shard(id, file) for file in files], "a shard")

    def _is_held(self, connection: Connection, key: str, *, but: str = "") -> bool:
        try:
            self._leases.refuse_if_held(connection, key, but=but)
        except InUseError:
            return True
        return False


def _shard(id: str, file: str) -> str:
    return f"job/{id}/{file}"


def _welcome(id: str, helper: str) -> str:
    return f"job/{id}/helper/{helper}"
