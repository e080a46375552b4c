"""A registered model as a `ModelSource`: what the merger writes out and the deployer quantises."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from .adapters.intake import Adapter
from .base_models import small_files
from .files.safetensors import Checkpoint, ModelSource, json_object
from .models import BaseModel, CompleteModel, CustomizedModel

if TYPE_CHECKING:
    from .merging import Merge
    from .registry import ModelRegistry

_VOCABULARY_FILES = {"tokenizer.json", "tokenizer.model", "vocab.json"}
_CHAT_TEMPLATE_FILES = {"chat_template.jinja", "chat_template.json"}
_MODEL_FILES = {"config.json", "generation_config.json"}
_PROCESSOR_FILES = {"preprocessor_config.json", "processor_config.json"}


def combined_files(base: Path, adapter: Path) -> dict[str, Path]:
    """The small files of `base` merged with `adapter`.

    Configurations are the base's. The tokenizer is taken whole from the adapter if it has one,
    and so is the chat template; files of two tokenizers are never mixed.
    """
    files, own = small_files(base), small_files(adapter)
    own = {name: path for name, path in own.items() if name not in _MODEL_FILES}
    if _VOCABULARY_FILES & own.keys():
        kept = _MODEL_FILES | _CHAT_TEMPLATE_FILES
        files = {n: p for n, p in files.items() if n in kept | _PROCESSOR_FILES}
        return files | own
    return files | {name: path for name, path in own.items() if name in _CHAT_TEMPLATE_FILES}


@frozen
class MergedSource:
    """A customized model merged on the fly, over the layout of its base."""

    source: ModelSource
    layout: Checkpoint
    adapter: Adapter
    merge: Merge


@contextmanager
def merged_source(registry: ModelRegistry, customized: CustomizedModel) -> Iterator[MergedSource]:
    """The customized model's merge, while the block lasts; the caller's job holds its parents.

    Raises:
        BaseModelMissingError, BaseModelMismatch: its base is gone or changed.
        UnsupportedAdapterError: it cannot be merged exactly; the message says why.
    """
    from .merging import open_merge

    base = registry.get(BaseModel, customized.base)
    with registry._opened(base) as base_directory, registry._opened(customized) as directory:
        layout = Checkpoint.open(base_directory)
        adapter = Adapter.open(directory)
        merge = open_merge(layout, adapter)
        files = combined_files(base_directory, directory)
        with _configured(files, merge.config) as configured:
            yield MergedSource(ModelSource(configured, merge), layout, adapter, merge)


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
    registry: ModelRegistry, model: CustomizedModel | CompleteModel
) -> Iterator[ModelSource]:
    """A customized or complete model, while the block lasts; the caller's job holds it."""
    if isinstance(model, CustomizedModel):
        registry.verify(model)
        with merged_source(registry, model) as merged:
            yield merged.source
    else:
        with registry._opened(model) as directory:
            yield ModelSource(small_files(directory), Checkpoint.open(directory))
