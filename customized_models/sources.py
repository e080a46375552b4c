"""A registered model as a `ModelSource`: what the merger writes out and the deployer quantises."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from .adapters.intake import Adapter
from .combining import combined_files, completed_files
from .files.checking import FileCheck
from .files.model_directory import carried_files
from .files.safetensors import Checkpoint, ModelSource
from .merging import open_merge
from .merging.copying import CheckpointCopy
from .models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    Progress,
    is_adapter,
    is_trained_checkpoint,
    no_progress,
)
from .shelf import Finish, Shelf

if TYPE_CHECKING:
    from .merging import MergeExecution


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
    trust_remote_code: bool = False

    def open_again(self) -> MergeExecution:
        """The same merge, of files that are opened anew."""
        base = Checkpoint.open(self.layout.directory)
        adapter = Adapter.open(self.adapter.directory)
        return open_merge(base, adapter, trust_remote_code=self.trust_remote_code)


@contextmanager
def merge_of(
    base: Path, adapter: Path, *, trust_remote_code: bool = False
) -> Iterator[MergedSource]:
    """The merge of the adapter in one directory into the base in another, while the block lasts.

    Raises:
        UnsupportedError, BaseModelMismatch, MergeError, MalformedError: It cannot be merged
            exactly; the message says why.
    """
    layout, opened = Checkpoint.open(base), Adapter.open(adapter)
    merge = open_merge(layout, opened, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        files = combined_files(layout, opened.directory, merge.config, Path(scratch))
        yield MergedSource(ModelSource(files, merge), layout, merge, opened, trust_remote_code)


@contextmanager
def proven_merge(
    shelf: Shelf,
    base: BaseModel,
    customized: CustomizedModel,
    *,
    in_memory: Progress | None = None,
) -> Iterator[tuple[CompletedSource, FileCheck]]:
    """As `merge_of`, of registered models that the caller holds.

    Every byte of an adapter is compared with what was registered before anything is merged, and
    what a full model takes from its base with what was added.

    Args:
        shelf: Where their bytes are.
        base: The base.
        customized: What is merged into it.
        in_memory: If the host is to keep the base in memory, for merges of other adapters as well:
            told how many bytes of it have been read.

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
            with completed_checkpoint(base_directory, directory) as completed:
                files = completed.source.files.items()
                taken = {name for name, path in files if path.is_relative_to(base_directory)}
                check.only(taken).finish(no_progress)
                yield completed, adapter_check
            return
        adapter_check.finish(no_progress)
        with ExitStack() as stack:
            if in_memory is not None:
                kept = check.from_memory(in_memory)
                base_directory, check = stack.enter_context(kept)
            merging = merge_of(base_directory, directory, trust_remote_code=base.trust_remote_code)
            yield stack.enter_context(merging), check


@contextmanager
def completed_checkpoint(base: Path, checkpoint: Path) -> Iterator[CompletedSource]:
    """A full model in one directory, with what it lacks from its base in another."""
    copy = CheckpointCopy(Checkpoint.open(checkpoint))
    with tempfile.TemporaryDirectory() as scratch:
        files = completed_files(Checkpoint.open(base), checkpoint, Path(scratch))
        yield CompletedSource(ModelSource(files, copy), copy.checkpoint, copy)


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
            weights = Checkpoint.open(directory)
            yield ModelSource(carried_files(directory, weights.shards), weights), finish


@contextmanager
def small_files(
    shelf: Shelf, base: BaseModel, model: BaseModel | CustomizedModel | CompleteModel
) -> Iterator[tuple[Path, dict[str, Path]]]:
    """A directory with a model's configuration and tokenizer as whoever opens it has them.

    Yields:
        The directory, and its files by name; both are there while the block lasts.
    """
    with ExitStack() as stack:
        directory, scratch = (
            Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)
        )
        opened = stack.enter_context(shelf.opened(model))
        if isinstance(model, CustomizedModel):
            beneath = Checkpoint.open(stack.enter_context(shelf.opened(base)))
            if is_adapter(model):
                files = combined_files(beneath, opened, {}, scratch)
            else:
                files = completed_files(beneath, opened, scratch)
        else:
            files = carried_files(opened, Checkpoint.open(opened).shards)
        for name, path in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / name)
        yield directory, {name: directory / name for name in files}
