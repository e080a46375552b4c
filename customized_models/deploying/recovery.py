"""Deployments that were killed: finished if they have taken their name, else undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import evolve

from ..backends import Promoting, Tools, open_backend
from ..errors import CustomizedModelsError, NotFoundError
from ..files.manifest import MANIFEST, Manifest
from ..files.reading import MAX_JSON
from ..models import DeploymentEnvironment, LiveModel, Served, Status
from ..shelf import Shelf
from .artifacts import GGUF_NAME

if TYPE_CHECKING:
    from ..catalog.catalog import Catalog
    from ..catalog.leases import Lease
    from ..catalog.levels import Unfinished


def recover_deployments(
    catalog: Catalog,
    shelf: Shelf,
    tools: Tools | None = None,
    *,
    environment: str | None = None,
    forget: str | None = None,
) -> list[str]:
    """Finish or undo what killed deployments have left at deployment tools; says what was done.

    Args:
        catalog: The registry's rows.
        shelf: Its bytes.
        tools: Those that the caller can reach.
        environment: Only what was on its way there, if not None.
        forget: The environment whose server is not asked, because it is gone for good.

    Raises:
        CustomizedModelsError: One cannot be finished or undone now; the rest was done.
    """
    done, failed = [], list[CustomizedModelsError]()
    for change in catalog.levels.unfinished():
        live = change.value
        if isinstance(live, LiveModel) and environment in (None, live.environment):
            try:
                done += _recover(catalog, shelf, live, change, tools, forget)
            except CustomizedModelsError as error:
                failed.append(error)
    if done:
        shelf.trim("gguf/")
    if failed:
        raise failed[0]
    return done


def _recover(
    catalog: Catalog,
    shelf: Shelf,
    live: LiveModel,
    change: Unfinished,
    tools: Tools | None,
    forget: str | None,
) -> list[str]:
    with catalog.lease() as lease:
        with catalog.database.write() as connection:
            if not catalog.levels.claim(connection, change, lease.owner):
                return []
            lease.take(connection, [f"live/{live.name}"], f"the recovery of {live.name}")
        try:
            environment = catalog.levels.get(DeploymentEnvironment, live.environment)
        except NotFoundError:
            environment = None
        if environment is None:
            what = f"{live.name} was on its way to an environment that is no more"
        elif environment.name == forget:
            what = (
                f"gave up the deployment of {live.name} at {live.environment}, which is forgotten"
            )
        else:
            backend = open_backend(environment, tools)
            if isinstance(backend, Promoting) and _has_its_name(backend.status(live.served)):
                # Once more, for what a process that was killed in doing so has left beside it.
                backend.promote(live.served, live.served.name, [backend.identity(live.served)])
                _finish(catalog, live, change, lease)
                return [f"finished the deployment of {live.name} at {live.environment}"]
            backend.undeploy(_as_far_as_it_came(shelf, live.served, change.artifact))
            what = f"undid the deployment of {live.name} at {live.environment}"
        with catalog.database.write() as connection:
            catalog.levels.drop(connection, live, lease.owner)
            lease.end(connection)
        return [what]


def _has_its_name(status: Status) -> bool:
    """It takes the name only once it is proven."""
    return status in (Status.LIVE, Status.LOADED)


def _finish(catalog: Catalog, live: LiveModel, change: Unfinished, lease: Lease) -> None:
    with catalog.database.write() as connection:
        if live.replaces is not None:
            catalog.levels.supersede(connection, live.replaces)
        catalog.levels.make_visible(connection, live, lease.owner, artifact=change.artifact)
        catalog.jobs.finish_for(connection, live.name, "succeeded")
        lease.end(connection)


def _as_far_as_it_came(shelf: Shelf, served: Served, artifact: str | None) -> Served:
    """What may be at the tool: with the digest of the file, if one was made for it."""
    if served.digest or artifact is None or artifact not in shelf.storage.keys(artifact):
        return served
    with shelf.storage.open(artifact, MANIFEST) as file:
        content = Manifest.parse(file.read(MAX_JSON)).content
    return evolve(served, digest=content[GGUF_NAME].digest)
