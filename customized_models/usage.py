"""What deleting would do, and what a registry's bytes are spent on."""

from __future__ import annotations

from attrs import frozen

from .values import Value, checked


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
        reclaimable: Of complete models that may be evicted: their adapters are in the registry, and
            it is known where their bases lie. `ModelRegistry.evict` looks whether that is so.
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
