"""A full model that a training saved: copied in, checked, and tied to the base it began from.

Such a directory has a `config.json` and whole weights, where an adapter has an
`adapter_config.json` and a change of weights. A Trainer's `checkpoint-N`, a full fine-tune, and
what FSDP or DeepSpeed have consolidated are of this kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from .adapters.settings import CONFIG as ADAPTER_CONFIG
from .adapters.tensor_names import layer_of
from .errors import (
    BaseModelMismatch,
    MalformedError,
    NonFiniteError,
    UnsupportedBaseError,
    UnsupportedError,
    listed,
    shown,
)
from .files.copying import copy_untrusted
from .files.digests import FileDigest, hash_file
from .files.finite import non_finite
from .files.links import linked_file
from .files.model_directory import CARRIED, Role, files_of, row_of
from .files.paths import NAMES, strip_paths, without_paths
from .files.reading import json_object
from .files.safetensors import INDEX, SINGLE, Checkpoint, TensorInfo
from .files.writing import disk_errors
from .pickled import FULL_INDEX, FULL_PICKLED

CONFIG = "config.json"

_MAX_FILES = 2000  # the largest models have some hundred shards
_SHARDED = {
    "pytorch_model_fsdp_0": "`accelerate merge-weights pytorch_model_fsdp_0 .` consolidates it",
    "latest": "`python zero_to_fp32.py . . --safe_serialization` consolidates it",
}
"""What FSDP and DeepSpeed leave in a checkpoint's directory, and the way out."""


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory that a training saved is a full model's, and not an adapter's."""
    if os.path.lexists(directory / ADAPTER_CONFIG) or not os.path.lexists(directory / CONFIG):
        return False
    names = (SINGLE, INDEX, FULL_PICKLED, FULL_INDEX, *_SHARDED)
    return any(os.path.lexists(directory / name) for name in names)


@frozen
class TrainedCheckpoint:
    """A checked copy of a full model.

    Attributes:
        weights: Its tensors.
        config: Its `config.json`.
        content: Size and digest of each of its files, by name.
        stated_base: What its configuration said that it was loaded from.
    """

    weights: Checkpoint = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    content: Mapping[str, FileDigest] = field(repr=False)
    stated_base: object


def take_in(source: Path, destination: Path) -> TrainedCheckpoint:
    """Copy a full model's files into the empty directory `destination`, and check them.

    Each file of `source` is read once. What only the training needs, such as the state of its
    optimizer, is left out. `config.json` is rewritten with sorted keys and without paths.

    Args:
        source: The directory that a training saved.
        destination: An empty directory.

    Raises:
        MalformedError: The weights are incomplete, a file does not parse, or one changed while it
            was copied.
        UnsafeFileError: A file is a link out of a Hub cache, a pipe or a device, or is too large.
        NonFiniteError: A tensor has NaN or infinity.
        UnsupportedError: The weights are pickled, sharded by FSDP or DeepSpeed, or quantized.
        StorageError: The disk failed.
    """
    _refuse_other_weights(source)
    source = source.resolve()
    with disk_errors(f"the checkpoint in {shown(source)} cannot be copied"):
        content = {
            name: copy_untrusted(linked_file(source, name), destination, name)
            for name in _names(source)
        }
        config = json_object(destination / CONFIG, limit=row_of(CONFIG).limit)
        stated = next((config[key] for key in NAMES if config.get(key)), None)
        config = without_paths(config)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (destination / CONFIG).write_text(text)
        content[CONFIG] = hash_file(destination / CONFIG)
        content |= strip_paths(destination, content)
    weights = Checkpoint.open(destination)
    _check(weights, config)
    return TrainedCheckpoint(weights, config, content, stated)


def _refuse_other_weights(source: Path) -> None:
    if any(os.path.lexists(source / name) for name in (SINGLE, INDEX)):
        return
    for name, way_out in _SHARDED.items():
        if os.path.lexists(source / name):
            raise UnsupportedError(f"the checkpoint in {shown(source)} is sharded; {way_out}")
    raise UnsupportedError(
        f"{shown(source)} has pickled weights, which can run code when they are read; "
        f"customized_models.importing.convert_pickle writes a copy with safetensors weights, and "
        f"reads nothing but tensors"
    )


def _names(source: Path) -> list[str]:
    """The files that are taken: weights, and what a model directory carries beside them."""
    shards = Checkpoint.open(source).shards
    index = [INDEX] if SINGLE not in shards else []
    names = [*shards, *index, *(files_of(source, *CARRIED).keys() - shards.keys())]
    if len(names) > _MAX_FILES:
        raise MalformedError(
            f"{shown(source)} has {len(names)} files; a checkpoint has at most {_MAX_FILES}"
        )
    return names


def _check(weights: Checkpoint, config: Mapping[str, Any]) -> None:
    architecture_of(config)
    if "quantization_config" in config:
        raise UnsupportedBaseError(
            "the checkpoint is quantized; register the full model that was trained, or the adapter"
        )
    if not weights.infos:
        raise MalformedError("the checkpoint has no tensors")
    if odd := {name for name, info in weights.infos.items() if info.dtype.startswith("F8")}:
        raise UnsupportedBaseError(f"tensors of the checkpoint are quantized: {listed(odd)}")
    wrong: set[str] = set()
    for file, header in weights.shards.items():
        wrong.update(non_finite(weights.directory / file, header.tensors.values()))
    if wrong:
        raise NonFiniteError(
            f"the checkpoint has NaN or infinity in {listed(wrong)}: its training has diverged; "
            f"register an earlier checkpoint, or train again with a smaller learning rate"
        )


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that a configuration names.

    Raises:
        MalformedError: It names none.
    """
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise MalformedError(f"{CONFIG} names no architecture, or several")
    return named[0]


# Which base it belongs to


def refuse_unless_fits(trained: TrainedCheckpoint, base: Checkpoint) -> None:
    """See that a full model can have begun from `base`, by architecture, names and shapes.

    The layers' weights must be the same, whatever stands before the layer's number in their names.
    Heads may differ, and the vocabulary if the checkpoint has a tokenizer of its own.

    Raises:
        BaseModelMismatch: It cannot.
    """
    config = json_object(base.directory / CONFIG)
    ours, theirs = trained.config.get("model_type"), config.get("model_type")
    if ours != theirs:
        raise BaseModelMismatch(
            f"the checkpoint is a {shown(ours)}, and the base a {shown(theirs)}"
        )
    one, other = _in_layers(trained.weights), _in_layers(base)
    wrong = {name for name, _ in one ^ other}
    for name, info in trained.weights.infos.items():
        if layer_of(name) < 0 and name in base.infos and _width(info) != _width(base.infos[name]):
            wrong.add(name)
    if wrong:
        raise BaseModelMismatch(
            f"the checkpoint did not begin from this base model, as its tensors show: "
            f"{listed(wrong)} differ in name or shape"
        )
    sizes = _vocabulary_size(trained.config), _vocabulary_size(config)
    if sizes[0] != sizes[1] and not files_of(trained.weights.directory, Role.VOCABULARY):
        raise BaseModelMismatch(
            f"the checkpoint has a vocabulary of {shown(sizes[0])} tokens, the base one of "
            f"{shown(sizes[1])}, and no tokenizer comes with it; save the tokenizer beside it"
        )


def _in_layers(weights: Checkpoint) -> set[tuple[str, tuple[int, ...]]]:
    """Names from the layer's number on, and shapes; buffers are left out."""
    return {
        (_from_layer(name), info.shape)
        for name, info in weights.infos.items()
        if layer_of(name) >= 0 and name.endswith(".weight")
    }


def _from_layer(name: str) -> str:
    return name[name.index(f".{layer_of(name)}.") :] if layer_of(name) >= 0 else name


def _width(info: TensorInfo) -> tuple[int, ...]:
    """A shape but for its rows, which an added token or another head changes."""
    return info.shape[1:]


def _vocabulary_size(config: Mapping[str, Any]) -> object:
    inner = config.get("text_config")
    size = config.get("vocab_size")
    return inner.get("vocab_size") if size is None and isinstance(inner, dict) else size


def has_tokenizer_of(base: Path, directory: Path) -> bool:
    """Whether a checkpoint's tokenizer has every token of the base's, with the same number.

    True if the checkpoint has no tokenizer.
    """
    own, theirs = (files_of(one, Role.VOCABULARY) for one in (directory, base))
    if "tokenizer.json" in own.keys() & theirs.keys():
        tokens = _tokens(own["tokenizer.json"])
        return _tokens(theirs["tokenizer.json"]).items() <= tokens.items()
    common = own.keys() & theirs.keys()
    return not own or (
        bool(common) and all(hash_file(own[name]) == hash_file(theirs[name]) for name in common)
    )


def _tokens(path: Path) -> dict[str, int]:
    """The tokens in a `tokenizer.json`, with their numbers."""
    document = json_object(path)
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    try:
        if isinstance(vocabulary, list):  # of Unigram: tokens with their scores
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {one["content"]: one["id"] for one in document.get("added_tokens") or ()}
        tokens = {**(vocabulary or {}), **added}
    except (TypeError, ValueError, KeyError) as error:
        raise MalformedError(f"{shown(path.name)} holds no tokens with their numbers") from error
    return tokens
