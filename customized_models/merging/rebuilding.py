"""The worker's part of `ModelRegistry.rebuild`: evicted bytes are merged again and put back."""

from __future__ import annotations

import time

from ..errors import InUseError
from ..evicting import parents_of, put_back
from ..jobs.work import Work
from ..models import CompleteModel
from .merger import merged_again

_WAIT_SECONDS = 0.5  # until another process that rebuilds the same is looked at again


def run_rebuild(work: Work) -> None:
    """Rebuild the model, unless another job has done so meanwhile."""
    complete = _evicted(work)
    if complete is None:
        return
    with work.catalog.database.read() as connection:
        base, customized = parents_of(work.catalog, connection, complete)
    with merged_again(work, base, customized, complete) as staging:
        put_back(work.catalog, work.shelf, complete, staging, work.lease)
    with work.catalog.database.write() as connection:
        work.lease.check(connection)
        work.end(connection, "succeeded")


def _evicted(work: Work) -> CompleteModel | None:
    """The model, which no other job rebuilds from now on; None if it is there again."""
    catalog, name = work.catalog, work.arguments["rebuilds"]
    while True:
        try:
            with catalog.database.write() as connection:
                complete = catalog.levels.in_transaction(connection, CompleteModel, name)
                if not complete.evicted:
                    work.end(connection, "succeeded")
                    return None
                catalog.leases.refuse_if_held(connection, complete.recipe_key)
                work.lease.take(connection, [complete.recipe_key], f"the rebuilding of {name}")
                return complete
        except InUseError:
            work.progress("waiting for another rebuild", 0, 0)
            time.sleep(_WAIT_SECONDS)
