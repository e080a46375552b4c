"""A registered model in the forms that a backend asks for, each proven before it is given."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..backends import AdapterBesideBase
from ..errors import (
    AlreadyExistsError,
    IntegrityError,
    MalformedError,
    NotFoundError,
    UnsupportedArchitectureError,
    UnsupportedError,
    UnsupportedQuantizationError,
    shown,
)
from ..files.digests import FileDigest, digest_of
from ..files.manifest import Manifest
from ..gguf import GGUFFile, check_architecture
from ..gguf import plan as plan_gguf
from ..models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentTemplate,
    Progress,
    Quantization,
)
from ..shelf import Shelf
from ..sources import model_source

if TYPE_CHECKING:
    from ..catalog.catalog import Catalog

GGUF_NAME = "model.gguf"

Stored: TypeAlias = "CustomizedModel | CompleteModel"
Holding: TypeAlias = "Callable[[str], None]"


class RegistryArtifact:
    """A model of a registry; see `backends.Artifact`.

    A context manager: what its forms have given is there until the block ends.

    Args:
        catalog: The registry's rows.
        shelf: Its bytes.
        model: The model, which the caller holds while files are made of it.
        name: The live model's.
        quantization: The mode of a file.
        holding: Called with the key of a file before it is made or used, to keep it from being
            removed.
    """

    def __init__(
        self,
        catalog: Catalog,
        shelf: Shelf,
        model: Stored,
        name: str,
        quantization: Quantization,
        holding: Holding,
    ) -> None:
        self.name = name
        self.quantization = quantization
        self.key: str | None = None
        self._shelf = shelf
        self._model = model
        self._holding = holding
        self._base = catalog.levels.get(BaseModel, model.base)
        self.template: DeploymentTemplate | None = self._base.deployment_template
        told_by = self._base if isinstance(model, CustomizedModel) else model
        self._config = shelf.document(told_by, "config.json")
        self._given = ExitStack()

    def __enter__(self) -> RegistryArtifact:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._given.close()

    @property
    def architecture(self) -> str:
        """See `backends.Artifact.architecture`."""
        named = self._config.get("architectures")
        if not isinstance(named, list) or not named:
            raise UnsupportedArchitectureError(f"config.json of {self._model.name} names no class")
        return str(named[0])

    def check_gguf(self) -> None:
        """See `backends.Artifact.check_gguf`."""
        check_architecture(self._config)

    def gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        """See `backends.Artifact.gguf`."""
        self.check_gguf()
        recipe = {
            "source": self._model.digest,
            "quantization": self.quantization,
            "chat_template": chat_template,
            "name": self._model.name,
        }
        key = f"gguf/{digest_of(recipe).partition(':')[2]}"
        self._holding(key)
        file = self._cached(key, recipe)
        if file is None:
            self._make(key, recipe, progress)
            file = self._cached(key, recipe)
            if file is None:
                raise IntegrityError(
                    f"the file that was just written under {shown(key)} is damaged"
                )
        self.key = key
        return file

    def _cached(self, key: str, recipe: Mapping[str, Any]) -> GGUFFile | None:
        """The file under a key, if it is there and every byte is what its recipe gave."""
        storage = self._shelf.storage
        try:
            directory = self._given.enter_context(storage.checkout(key))
            manifest = Manifest.read(directory)
            if manifest.recipe != recipe:
                raise IntegrityError(f"{shown(key)} was made by another recipe")
            manifest.verify(directory)
        except NotFoundError:
            return None
        except (IntegrityError, MalformedError):
            storage.delete(key)
            return None
        file = manifest.content[GGUF_NAME]
        return GGUFFile(directory / GGUF_NAME, file.size, file.digest)

    def _make(self, key: str, recipe: Mapping[str, Any], progress: Progress) -> None:
        storage = self._shelf.storage
        with (
            storage.staging(f"gguf-{uuid.uuid4().hex}") as staging,
            model_source(self._shelf, self._base, self._model) as (source, finish),
        ):
            plan = plan_gguf(
                source,
                self.quantization,
                name=self._model.name,
                chat_template=recipe["chat_template"],
            )
            file = plan.write(staging / GGUF_NAME, progress)
            finish(progress)
            content = {GGUF_NAME: FileDigest(file.size, file.digest)}
            Manifest("gguf", content, {"source": self._model.digest}, recipe, {}).write(staging)
            try:
                storage.publish(staging, key)
            except AlreadyExistsError:
                return  # another deployment has just made the same file

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """See `backends.Artifact.directory`."""
        self._refuse_quantization("a model directory")
        if not isinstance(self._model, CompleteModel):
            raise UnsupportedError(
                f"{self._model.name} is an adapter; save it with Merger(registry).save first"
            )
        with self._shelf.proven(self._model) as (directory, finish):
            finish(_silent)
            yield directory

    @contextmanager
    def adapter(self) -> Iterator[AdapterBesideBase]:
        """See `backends.Artifact.adapter`."""
        self._refuse_quantization("an adapter")
        if not isinstance(self._model, CustomizedModel):
            raise UnsupportedError(f"{self._model.name} is a complete model, and has no adapter")
        with (
            self._shelf.proven(self._base) as (base, finish_base),
            self._shelf.proven(self._model) as (adapter, finish),
        ):
            finish(_silent)
            finish_base(_silent)
            yield AdapterBesideBase(adapter, base)

    def _refuse_quantization(self, what: str) -> None:
        if self.quantization != "no_quantization":
            raise UnsupportedQuantizationError(
                f"{what} is not quantized here (asked for {self.quantization}); the tool may "
                f"have a setting of its own"
            )


def _silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
