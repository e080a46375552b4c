"""Deployments that were killed on their way, taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import evolve

from ..backends import BackendFactory, open_backend
from ..errors import CustomizedModelsError, DeploymentError, NotFoundError
from ..files.manifest import MANIFEST, Manifest
from ..files.reading import MAX_JSON
from ..models import DeploymentEnvironment, LiveModel, Served
from ..shelf import Shelf
from .artifacts import GGUF_NAME

if TYPE_CHECKING:
    from ..catalog.catalog import Catalog
    from ..catalog.levels import Unfinished


def recover_deployments(
    catalog: Catalog,
    shelf: Shelf,
    backends: Mapping[str, BackendFactory] | None = None,
    *,
    environment: str | None = None,
) -> list[str]:
    """Remove from deployment tools what killed deployments have left there; says what was done.

    Args:
        catalog: The registry's rows.
        shelf: Its bytes.
        backends: Further ones of the caller's, by name.
        environment: Only what was on its way there, if not None.

    Raises:
        DeploymentError: A tool cannot be asked; the rest was done.
    """
    done, failed = [], list[CustomizedModelsError]()
    for change in catalog.levels.unfinished():
        live = change.value
        if isinstance(live, LiveModel) and environment in (None, live.environment):
            try:
                done += _take_back(catalog, shelf, live, change, backends)
            except DeploymentError as error:
                failed.append(error)
    if done:
        shelf.drop_unused("gguf/")
    if failed:
        raise failed[0]
    return done


def _take_back(
    catalog: Catalog,
    shelf: Shelf,
    live: LiveModel,
    change: Unfinished,
    backends: Mapping[str, BackendFactory] | None,
) -> list[str]:
    with catalog.lease() as lease:
        with catalog.database.write() as connection:
            if not catalog.levels.claim(connection, change, lease.owner):
                return []
            lease.take(connection, [f"live/{live.name}"], f"the recovery of {live.name}")
        try:
            environment = catalog.levels.get(DeploymentEnvironment, live.environment)
        except NotFoundError:
            where = f"{live.name} was on its way to an environment that is no more"
        else:
            served = _as_far_as_it_came(shelf, live.served, change.artifact)
            open_backend(environment, backends).undeploy(served)
            where = f"undid the deployment of {live.name} at {live.environment}"
        with catalog.database.write() as connection:
            catalog.levels.drop(connection, live, lease.owner)
            lease.end(connection)
        return [where]


def _as_far_as_it_came(shelf: Shelf, served: Served, artifact: str | None) -> Served:
    """What may be at the tool: with the digest of the file, if one was made for it."""
    if artifact is None or artifact not in shelf.storage.keys(artifact):
        return served
    with shelf.storage.open(artifact, MANIFEST) as file:
        content = Manifest.parse(file.read(MAX_JSON)).content
    return evolve(served, digest=content[GGUF_NAME].digest)
