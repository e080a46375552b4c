"""A registered model in the forms that a backend asks for, each proven before it is given."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..adapters.settings import CONFIG
from ..backends import AdapterBesideBase
from ..errors import (
    AlreadyExistsError,
    IntegrityError,
    MalformedError,
    NotFoundError,
    UnsupportedArchitectureError,
    UnsupportedError,
    UnsupportedQuantizationError,
    listed,
    shown,
)
from ..files.digests import FileDigest, digest_of
from ..files.manifest import Manifest
from ..gguf import GGUFFile, check_architecture
from ..gguf import plan as plan_gguf
from ..gguf.finished import check_finished
from ..gguf.reading import read_preamble
from ..models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentTemplate,
    Progress,
    Quantization,
    is_adapter,
    no_progress,
)
from ..shelf import Shelf
from ..sources import model_source, small_files
from .templates.chat_template import ChatTemplate
from .templates.end_tokens import EndTokens

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
        template: In place of the base model's.
        ready: A finished GGUF file of the model, to be given as it is.
        llama_cpp: A checkout of llama.cpp, whose converter makes files of architectures that
            have none here.

    Attributes:
        base: The base model's technical name.
        adapter_config: See `backends.Artifact.adapter_config`.
        key: Under which the file that was given is stored; None before, or if it was ready.
        file: What `gguf` gave; None before.
        types: The type of each tensor in it, by its name.
    """

    def __init__(
        self,
        catalog: Catalog,
        shelf: Shelf,
        model: Stored,
        name: str,
        quantization: Quantization,
        holding: Holding,
        *,
        template: DeploymentTemplate | None = None,
        ready: Path | None = None,
        llama_cpp: str | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.quantization = quantization
        self.key: str | None = None
        self.file: GGUFFile | None = None
        self.types: Mapping[str, str] = {}
        self._shelf = shelf
        self._holding = holding
        self._ready = ready
        self._llama_cpp = None if llama_cpp is None else Path(llama_cpp)
        self._base = catalog.levels.get(BaseModel, model.base)
        self.template = template or self._base.deployment_template
        self._config = shelf.document(self._base if is_adapter(model) else model, "config.json")
        self.base = self._base.name
        self.adapter_config = shelf.document(model, CONFIG) if is_adapter(model) else None
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
            raise UnsupportedArchitectureError(f"config.json of {self.model.name} names no class")
        return str(named[0])

    @property
    def finished(self) -> bool:
        """See `backends.Artifact.finished`."""
        return self._ready is not None

    def _refuse_finished(self) -> None:
        if self.finished:
            raise UnsupportedError(
                f"{shown(str(self._ready))} is a GGUF file, and the tool asks for another form of "
                f"the model: deploy without gguf="
            )

    def check_gguf(self) -> None:
        """See `backends.Artifact.check_gguf`."""
        if self._ready is not None:
            read_preamble(self._ready)
        elif self._llama_cpp is None:
            check_architecture(self._config)

    def gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        """See `backends.Artifact.gguf`."""
        self.check_gguf()
        if self._ready is None:
            self.file = self._made(self.model, progress, chat_template)
        else:
            with model_source(self._shelf, self._base, self.model) as (source, _):
                self.file = check_finished(self._ready, source, progress, llama_cpp=self._llama_cpp)
        return self.file

    def base_gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        """See `backends.Artifact.base_gguf`."""
        self._refuse_finished()
        self.check_gguf()
        return self._made(self._base, progress, chat_template)

    def _made(self, model: BaseModel | Stored, progress: Progress, chat_template: bool) -> GGUFFile:
        """The file of `model`, out of the cache or made now."""
        recipe = self._recipe(model, chat_template)
        key = f"gguf/{digest_of(recipe).partition(':')[2]}"
        self._holding(key)
        file = self._cached(key, recipe)
        if file is None:
            self._make(model, key, recipe, progress)
            file = self._cached(key, recipe)
            if file is None:
                raise IntegrityError(
                    f"the file that was just written under {shown(key)} is damaged"
                )
        self.key = key
        return file

    def _recipe(self, model: BaseModel | Stored, chat_template: bool) -> dict[str, Any]:
        """What the file's bytes depend on; it is stored under the digest of this."""
        with small_files(self._shelf, self._base, model) as (_, files):
            keys = serving_keys(files, chat_template=chat_template)
        return {
            "source": model.digest,
            "quantization": self.quantization,
            "chat_template": chat_template,
            "keys": keys,
            "name": model.name,
            "converter": "llama.cpp" if self._llama_cpp else "own",
        }

    def small_files(self) -> AbstractContextManager[tuple[Path, dict[str, Path]]]:
        """A directory with the model's configuration and tokenizer, and its files by name."""
        return small_files(self._shelf, self._base, self.model)

    def _cached(self, key: str, recipe: Mapping[str, Any]) -> GGUFFile | None:
        """The file under a key, if it is there and every byte is what its recipe gave."""
        storage = self._shelf.storage
        try:
            directory = self._given.enter_context(storage.checkout(key))
            manifest = Manifest.read(directory)
            if manifest.recipe != recipe:
                raise IntegrityError(f"{shown(key)} was made by another recipe")
            manifest.verify(directory)
            self.types = manifest.record["types"]
        except NotFoundError:
            return None
        except (IntegrityError, MalformedError):
            storage.delete(key)
            return None
        file = manifest.content[GGUF_NAME]
        return GGUFFile(directory / GGUF_NAME, file.size, file.digest)

    def _make(
        self, model: BaseModel | Stored, key: str, recipe: Mapping[str, Any], progress: Progress
    ) -> None:
        storage = self._shelf.storage
        with (
            storage.staging(f"gguf-{uuid.uuid4().hex}") as staging,
            model_source(self._shelf, self._base, model) as (source, finish),
        ):
            plan = plan_gguf(
                source,
                self.quantization,
                name=model.name,
                chat_template=recipe["chat_template"],
                keys=recipe["keys"],
                llama_cpp=self._llama_cpp,
            )
            file = plan.write(staging / GGUF_NAME, progress)
            finish(progress)
            content = {GGUF_NAME: FileDigest(file.size, file.digest)}
            parents, record = {"source": model.digest}, {"types": dict(plan.types)}
            Manifest("gguf", content, parents, recipe, record).write(staging)
            try:
                storage.publish(staging, key)
            except AlreadyExistsError:
                return  # another deployment has just made the same file

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """See `backends.Artifact.directory`."""
        self._refuse_finished()
        if self.quantization != "no_quantization":
            raise UnsupportedQuantizationError(
                f"a model directory is not quantized here (asked for {self.quantization}); the "
                f"tool may have a setting of its own"
            )
        if is_adapter(self.model):
            raise UnsupportedError(
                f"{self.model.name} is an adapter; save it with Merger(registry).save first"
            )
        with (
            self.small_files() as (_, files),
            self._shelf.proven(self.model) as (directory, finish),
        ):
            if lacking := {name for name in files if not (directory / name).is_file()}:
                raise UnsupportedError(
                    f"{self.model.name} lacks {listed(lacking)}, which its base has; "
                    f"Merger(registry).save makes a complete model of it"
                )
            finish(no_progress)
            yield directory

    @contextmanager
    def adapter(self) -> Iterator[AdapterBesideBase]:
        """See `backends.Artifact.adapter`."""
        self._refuse_finished()
        if not is_adapter(self.model):
            raise UnsupportedError(f"{self.model.name} is a whole model, and has no adapter")
        with (
            self._shelf.proven(self._base) as (base, finish_base),
            self._shelf.proven(self.model) as (adapter, finish),
        ):
            finish(no_progress)
            finish_base(no_progress)
            yield AdapterBesideBase(adapter, base, self._base.digest)


def serving_keys(files: Mapping[str, Path], *, chat_template: bool) -> dict[str, bool | int]:
    """What a served file must say beside what a converted one does.

    Every token that ends an answer, where there are several. And, for a tool that renders with a
    deployment template, whether a beginning-of-text token is to be added: what the tokenizer does
    to plain texts need not be what conversations are made with.
    """
    keys: dict[str, bool | int] = {**EndTokens.read(files).file_keys}
    if not chat_template:
        with suppress(UnsupportedError):  # it has no chat template, and continues texts
            adds = ChatTemplate.read(files).file_adds_bos
            keys["tokenizer.ggml.add_bos_token"] = adds
    return keys
