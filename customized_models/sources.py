"""A registered model as a `ModelSource`: what the merger writes out and the deployer quantises."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from .adapters.intake import Adapter
from .cards.reading import has_chat_template
from .files.checking import FileCheck
from .files.model_directory import CARRIED, Role, files_of, role_of
from .files.reading import json_object
from .files.safetensors import Checkpoint, ModelSource
from .merging import open_merge
from .merging.copying import CheckpointCopy
from .models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    is_adapter,
    is_trained_checkpoint,
)
from .shelf import Finish, Shelf

if TYPE_CHECKING:
    from .merging import MergeExecution

_OF_TOKENIZER = (Role.VOCABULARY, Role.TOKENIZER)


def combined_files(base: Path, adapter: Path) -> dict[str, Path]:
    """The small files of `base` merged with `adapter`.

    Configurations are the base's. The tokenizer is taken whole from the adapter if it has a
    vocabulary, with its processor; files of two tokenizers are never mixed. So is the chat
    template if the adapter has one.
    """
    own = files_of(adapter, Role.CHAT_TEMPLATE)
    if files_of(adapter, Role.VOCABULARY):
        own |= files_of(adapter, *_OF_TOKENIZER, Role.PROCESSOR)
    return _with_base(base, own)


def completed_files(base: Path, checkpoint: Path) -> dict[str, Path]:
    """The small files of a full model, and from its `base` what it lacks.

    As in `combined_files`, files of two tokenizers are never mixed.
    """
    return _with_base(base, files_of(checkpoint, *CARRIED))


def _with_base(base: Path, own: dict[str, Path]) -> dict[str, Path]:
    files = files_of(base, *CARRIED)
    replaced = {Role.CHAT_TEMPLATE} if has_chat_template(own) else set()
    if any(role_of(name) is Role.VOCABULARY for name in own):
        replaced |= {*_OF_TOKENIZER}
    return {name: path for name, path in files.items() if role_of(name) not in replaced} | own


@frozen
class CompletedSource:
    """A customized model as a complete one.

    Attributes:
        source: The complete model.
        layout: Has all tensors that do not change: the base of an adapter, or the full model.
        merge: Gives the tensors.
    """

    source: ModelSource
    layout: Checkpoint
    merge: MergeExecution | CheckpointCopy


@frozen
class MergedSource(CompletedSource):
    """An adapter merged on the fly, over the layout of its base."""

    merge: MergeExecution
    adapter: Adapter


@contextmanager
def merge_of(base: Path, adapter: Path) -> Iterator[MergedSource]:
    """The merge of the adapter in one directory into the base in another, while the block lasts.

    Raises:
        UnsupportedError, BaseModelMismatch, MergeError, MalformedError: It cannot be merged
            exactly; the message says why.
    """
    layout, opened = Checkpoint.open(base), Adapter.open(adapter)
    merge = open_merge(layout, opened)
    with _configured(combined_files(base, adapter), merge.config) as files:
        yield MergedSource(ModelSource(files, merge), layout, merge, opened)


@contextmanager
def proven_merge(
    shelf: Shelf, base: BaseModel, customized: CustomizedModel
) -> Iterator[tuple[CompletedSource, FileCheck]]:
    """As `merge_of`, of registered models that the caller holds.

    Every byte of an adapter is compared with what was registered before anything is merged, and
    what a full model takes from its base with what was added.

    Yields:
        The merge, and what compares its layout with what was recorded, to be finished by the block:
        it raises `BaseModelMismatch` or `IntegrityError` if a byte differs.

    Raises:
        IntegrityError: The adapter is not what was registered.
        BaseModelMissingError, BaseModelMismatch: The base is gone or changed.
    """
    with (
        shelf.checked(base) as (base_directory, check),
        shelf.checked(customized) as (directory, adapter_check),
    ):
        if is_trained_checkpoint(customized):
            yield _completed(base_directory, directory, check), adapter_check
            return
        adapter_check.finish(_silent)
        with merge_of(base_directory, directory) as merged:
            yield merged, check


def completed_checkpoint(base: Path, checkpoint: Path) -> CompletedSource:
    """A full model in one directory, with what it lacks from its base in another."""
    copy = CheckpointCopy(Checkpoint.open(checkpoint))
    source = ModelSource(completed_files(base, checkpoint), copy)
    return CompletedSource(source, copy.checkpoint, copy)


def _completed(base: Path, checkpoint: Path, check: FileCheck) -> CompletedSource:
    """As `completed_checkpoint`, once `check` has seen what is the base's."""
    completed = completed_checkpoint(base, checkpoint)
    files = completed.source.files.items()
    check.only({name for name, path in files if path.is_relative_to(base)}).finish(_silent)
    return completed


@contextmanager
def _configured(files: dict[str, Path], changes: Mapping[str, Any]) -> Iterator[dict[str, Path]]:
    """`files` with a `config.json` that has these values in place of its own; None removes one."""
    if not changes:
        yield files
        return
    with tempfile.TemporaryDirectory() as directory:
        changed = Path(directory, "config.json")
        document = {**json_object(files["config.json"]), **changes}
        removed = {key for key in changes if changes[key] is None}
        document = {key: value for key, value in document.items() if key not in removed}
        changed.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        yield files | {"config.json": changed}


@contextmanager
def model_source(
    shelf: Shelf, base: BaseModel, model: BaseModel | CustomizedModel | CompleteModel
) -> Iterator[tuple[ModelSource, Finish]]:
    """A model, while the block lasts; the caller holds it.

    Yields:
        The source, and what is called once all has been read: it raises `BaseModelMismatch` or
        `IntegrityError` if any byte is not what was recorded.
    """
    if isinstance(model, CustomizedModel):
        with proven_merge(shelf, base, model) as (merged, check), check.beside() as finish:
            yield merged.source, finish
    else:
        with shelf.proven(model) as (directory, finish):
            yield ModelSource(files_of(directory, *CARRIED), Checkpoint.open(directory)), finish


@contextmanager
def small_files(
    shelf: Shelf, base: BaseModel, model: BaseModel | CustomizedModel | CompleteModel
) -> Iterator[tuple[Path, dict[str, Path]]]:
    """A directory with a model's configuration and tokenizer as whoever opens it has them.

    Yields:
        The directory, and its files by name; both are there while the block lasts.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        opened = stack.enter_context(shelf.opened(model))
        if isinstance(model, CustomizedModel):
            combine = combined_files if is_adapter(model) else completed_files
            files = combine(stack.enter_context(shelf.opened(base)), opened)
        else:
            files = files_of(opened, *CARRIED)
        for name, path in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / name)
        yield directory, {name: directory / name for name in files}


def _silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
