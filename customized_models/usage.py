"""What deleting would do, and what a registry's bytes are spent on."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from attrs import frozen

from .errors import InUseError, NotFoundError
from .shelf import Shelf
from .values import Value, checked

if TYPE_CHECKING:
    from .catalog.catalog import Catalog


@frozen(field_transformer=checked)
class DeletionPlan(Value):
    """What `ModelRegistry.delete` would do.

    Attributes:
        kind: The class of what would go.
        name: Its name.
        refused: Why it would be refused, in words; "" if it would not.
        dependents: Names of what was made of it, all of which stays.
        freed: Bytes.
    """

    kind: str
    name: str
    refused: str
    dependents: tuple[str, ...]
    freed: int


@frozen(field_transformer=checked)
class Usage(Value):
    """Bytes of a registry. Base models are not in it: they are referenced where they lie.

    Attributes:
        customized: Of adapters.
        complete: Of complete models.
        cached: Of GGUF files, which live models are served from, or which are kept for the next.
        evicted: What evicted models would take.
        reclaimable: Of complete models that can be evicted, because adapter and base are there.
    """

    customized: int
    complete: int
    cached: int
    evicted: int
    reclaimable: int

    @property
    def total(self) -> int:
        """What is on the disk or in the storage now."""
        return self.customized + self.complete + self.cached


def plan_deletion(catalog: Catalog, value: Any) -> DeletionPlan:
    """See `ModelRegistry.plan_deletion`."""
    from .catalog.usage import made_of, size_of

    with catalog.database.read() as connection:
        refused = ""
        try:
            catalog.levels.refuse_to_delete(connection, value)
        except InUseError as error:
            refused = str(error)
        dependents = tuple(made_of(connection, value))
        freed = size_of(connection, value)
    return DeletionPlan(type(value).__name__, value.name, refused, dependents, freed)


def usage_of(catalog: Catalog, shelf: Shelf) -> Usage:
    """See `ModelRegistry.usage`."""
    from .catalog.usage import sizes

    with catalog.database.read() as connection:
        stored = sizes(connection)
    cached = 0
    for key in shelf.storage.keys("gguf/"):
        with suppress(NotFoundError):  # removed meanwhile
            cached += shelf.manifest(key).size
    return Usage(stored.customized, stored.complete, cached, stored.evicted, stored.reclaimable)
