"""What is on the disk, compared with what base and adapter give when they are opened again."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import evolve

from ..errors import IntegrityError, MergeError, NotReproducible, listed, shown
from ..files.digests import hash_file
from ..files.manifest import Manifest
from ..files.reading import opened, read_at
from ..files.safetensors import Checkpoint, TensorInfo, tensor_bytes
from ..models import BaseModel, CompleteModel, CustomizedModel, Progress, no_progress
from ..sources import CompletedSource, MergedSource, proven_merge
from .writing import checkpoint_digests, lineage_metadata

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..shelf import Shelf
    from . import MergeExecution
    from .copying import CheckpointCopy

    Merge: TypeAlias = MergeExecution | CheckpointCopy

_PIECE = 1 << 20  # bytes compared at once: they stay in a processor's cache

SAMPLES = 8
"""Changed tensors that are merged once more, and unchanged ones that are read once more.

A model has three to seven shapes of changed tensors, so that there is one of each."""


def prove(merged: CompletedSource, directory: Path, seed: str, progress: Progress) -> None:
    """Compare a sample of what was written with base and adapter.

    All names, dtypes and shapes are compared. Of the changed tensors one of each shape, at most
    `SAMPLES`, is merged once more, by PEFT itself and from values that are read again. Of the
    others `SAMPLES` are compared with the base's bytes. Files are opened again, but what they hold
    may still come from the system's cache.

    Args:
        merged: What was written.
        directory: Where.
        seed: Decides which tensors are sampled.
        progress: Told how many bytes have been compared.

    Raises:
        MergeError: Naming the tensors that differ.
    """
    base, merge = Checkpoint.open(merged.layout.directory), merged.merge
    if isinstance(merged, MergedSource) and merged.merge.adapter_in_memory:
        merge = merged.open_again()
    written = Checkpoint.open(directory)
    draw = random.Random(seed)
    names = _one_of_each_shape(merge, draw)[:SAMPLES]
    others = sorted(merge.infos.keys() - merge.changed)
    names += draw.sample(others, min(SAMPLES, len(others)))
    if wrong := different(written, base, merge, names, progress, merge.reference_blocks):
        raise MergeError(
            f"what was written is not what base and adapter give: {listed(wrong)}; "
            f"nothing was published. If it happens again, suspect this machine's disk or memory"
        )


def _one_of_each_shape(merge: Merge, draw: random.Random) -> list[str]:
    by_shape: dict[object, list[str]] = {}
    for name in sorted(merge.changed):
        by_shape.setdefault(merge.infos[name].shape, []).append(name)
    chosen = [draw.choice(names) for names in by_shape.values()]
    draw.shuffle(chosen)
    return chosen


def different(
    written: Checkpoint,
    base: Checkpoint,
    merge: Merge,
    names: Collection[str],
    progress: Progress,
    blocks: Callable[[str], Iterable[torch.Tensor]],
) -> set[str]:
    """The names of tensors whose bytes differ.

    Args:
        written: What is compared.
        base: Its unchanged tensors must be in `written`.
        merge: Which tensors there must be.
        names: Whose bytes are compared. A missing tensor, an additional one, or one of another
            dtype or shape than the merge states is found in any case.
        progress: Told how many bytes have been compared.
        blocks: Gives the bytes of a changed tensor.
    """
    wrong = set(written.infos.keys() ^ merge.infos.keys())
    wrong |= {
        name
        for name in written.infos.keys() & merge.infos.keys()
        if _kind(written.infos[name]) != _kind(merge.infos[name])
    }
    total, done = sum(merge.infos[name].size for name in names), 0

    def same(name: str) -> bool:
        if name in merge.changed:
            return _is_written(blocks(name), written, name)
        return _same_range(written, base, name)

    with ThreadPoolExecutor(1) as aside:  # blocks change the number of torch's threads there
        for name in names:
            progress("proving", done, total)
            done += merge.infos[name].size
            if name not in wrong and not aside.submit(same, name).result():
                wrong.add(name)
    progress("proving", total, total)
    return wrong


def _kind(info: TensorInfo) -> tuple[str, tuple[int, ...]]:
    return info.dtype, info.shape


def _is_written(blocks: Iterable[torch.Tensor], written: Checkpoint, name: str) -> bool:
    info, at = written.infos[name], 0
    with opened(written.directory / info.file) as fd:
        for block in blocks:
            data = tensor_bytes(block.contiguous())
            for start in range(0, len(data), _PIECE):
                part = data[start : start + _PIECE]
                if (
                    at + len(part) > info.size
                    or read_at(fd, info.start + at, len(part), name) != part
                ):
                    return False
                at += len(part)
    return at == info.size


def _same_range(written: Checkpoint, base: Checkpoint, name: str) -> bool:
    one, other = written.infos[name], base.infos[name]
    with (
        opened(written.directory / one.file) as here,
        opened(base.directory / other.file) as there,
    ):
        return all(
            _part(here, one, at) == _part(there, other, at) for at in range(0, one.size, _PIECE)
        )


def _part(fd: int, info: TensorInfo, at: int) -> bytearray:
    return read_at(fd, info.start + at, min(_PIECE, info.size - at), info.file)


def derive_again(
    shelf: Shelf, base: BaseModel, customized: CustomizedModel, complete: CompleteModel
) -> None:
    """See `Merger.verify`.

    Imports torch and PEFT, so it is for a process of its own.
    """
    shelf.verify(complete)
    with (
        shelf.opened(complete) as directory,
        proven_merge(shelf, base, customized) as (merged, check),
    ):
        content, merge, layout = Manifest.read(directory).content, merged.merge, merged.layout
        said = lineage_metadata(base, customized)
        digests = checkpoint_digests(
            merge, layout, no_progress, merge.changed, check=check, metadata=said
        )
        again = dict(digests)
        again |= {name: hash_file(path) for name, path in merged.source.files.items()}
        check.finish(no_progress)
        if files := {name for name, _ in content.items() ^ again.items()}:
            wrong = _name_tensors(files, Checkpoint.open(directory), merged)
            _refuse(complete, merge.recipe, f"other bytes in {listed(wrong)}")


def _name_tensors(files: set[str], written: Checkpoint, merged: CompletedSource) -> set[str]:
    """The tensors that differ, in place of the shards that have them."""
    merge = merged.merge
    shards = files & merge.shards.keys()
    names = [name for file in shards for name in merge.shards[file]]
    return files - shards | different(
        written, merged.layout, merge, names, no_progress, merge.blocks
    )


def check_rebuilt(expected: Mapping[str, Any], manifest: Manifest) -> Manifest:
    """Check that a rebuilt model is the first one.

    A recipe that differs only in what turns out not to matter is as good: the content is the same.

    Args:
        expected: `digest` and `recipe` of the first.
        manifest: Of the rebuilt one.

    Returns:
        The manifest under the recipe of the first.

    Raises:
        NotReproducible: The content is not the same.
    """
    again = evolve(manifest, recipe=expected["recipe"])
    if again.digest != expected["digest"]:
        raise NotReproducible(
            f"merging again gives {again.digest}, not {expected['digest']}; "
            f"{_differences(expected['recipe'], manifest.recipe)}"
        )
    return again


def _refuse(complete: CompleteModel, now: Mapping[str, Any], found: str) -> None:
    """Raise what it means that `complete` is not what merging gives now."""
    if complete.recipe == now:
        raise IntegrityError(
            f"{complete.name} is not what its base and adapter give: {found}; every field of its "
            f"recipe is the same here"
        )
    raise NotReproducible(
        f"merging again gives {found} of {complete.name}; {_differences(complete.recipe, now)}"
    )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which fields of two recipes differ, for a message."""
    fields = [
        f"{field} ({shown(then.get(field))} then, {shown(now.get(field))} now)"
        for field in sorted({*then, *now})
        if then.get(field) != now.get(field)
    ]
    return f"the recipes differ in {', '.join(fields) or 'nothing'}"
