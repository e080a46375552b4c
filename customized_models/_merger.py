"""`Merger`: a customized model becomes a complete one, in the background."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve

from ._checkpoints import FileDigest, write_checkpoint
from ._errors import UnsupportedQuantizationError, shown
from ._jobs import Job, start_job
from ._manifest import README, Manifest, hash_file, to_document, write_file
from ._models import BaseModel, CompleteModel, CustomizedModel, Progress, complete_name
from ._readme import render_complete
from ._sources import MergedSource, merged_source

if TYPE_CHECKING:
    from ._database import Lease
    from ._registry import ModelRegistry


class Merger:
    """Merges customized models of a registry into their bases.

    >>> complete = Merger(registry).save(customized).result()       # doctest: +SKIP
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    def __repr__(self) -> str:
        return f"Merger({self._registry!r})"

    def save(
        self, customized: CustomizedModel, *, quantization: str | None = None
    ) -> Job[CompleteModel]:
        """Merge the adapter into its base and publish the result; returns at once.

        Every tensor the adapter changes has the bits that PEFT's `merge_and_unload` gives it;
        every other one has the base's bytes.

        Raises:
            UnsupportedQuantizationError: `quantization` was given. It belongs to deployment.
            NotFoundError: the customized model has been deleted.
        """
        if quantization is not None:
            raise UnsupportedQuantizationError(
                f"a complete model is not quantized (asked for {shown(quantization)}): there is no "
                f"standard format for quantized complete models. Quantization belongs to "
                f"deployment: Deployer(registry).deploy(complete, quantization=...)"
            )
        customized = self._registry.get(CustomizedModel, customized.name)
        return start_job(
            self._registry,
            "save",
            lambda id: complete_name(customized.name, id),
            {"customized": customized.name},
            holds=(f"customized/{customized.name}", f"base/{customized.base}"),
        )


def run_save(
    registry: ModelRegistry,
    id: str,
    arguments: Mapping[str, Any],
    progress: Progress,
    lease: Lease,
) -> None:
    """The worker's part of `Merger.save`."""
    customized = registry.get(CustomizedModel, arguments["customized"])
    with (
        registry._storage.staging(f"save-{id}") as staging,
        merged_source(registry, customized) as merged,
    ):
        content = _write(merged, staging, progress)
        base = registry.get(BaseModel, customized.base)
        parents = {"base": base.digest, "customized": customized.digest}
        manifest = Manifest("complete", content, parents, merged.merge.recipe, {})
        complete = CompleteModel(
            name=complete_name(customized.name, uuid.UUID(id)),
            customized=customized.name,
            base=base.name,
            train_name=customized.train_name,
            saving_id=uuid.UUID(id),
            created=datetime.now(UTC),
            digest=manifest.digest,
            customized_digest=customized.digest,
            base_digest=base.digest,
            recipe=merged.merge.recipe,
            card=customized.card,
        )
        evolve(manifest, record=to_document(complete)).write(staging)
        write_file(staging / README, render_complete(complete, base).encode())
        registry._publish_complete(complete, staging, lease)


def _write(merged: MergedSource, staging: Path, progress: Progress) -> dict[str, FileDigest]:
    """Weights and small files into `staging`; their digests."""
    content = dict(
        write_checkpoint(merged.merge, merged.layout, staging, progress, merged.merge.changed)
    )
    merged.merge.finish()
    for name, path in merged.source.files.items():
        shutil.copyfile(path, staging / name)
        content[name] = hash_file(staging / name)
    return content
