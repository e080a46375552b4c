"""`MergePlan`: what a save will change, write and need, known before it begins."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from ..display import html_table, text_table
from ..files.safetensors import ITEM_SIZE
from ..files.streams import parallel_files
from ..models import BaseModel, CustomizedModel, is_trained_checkpoint, no_progress
from ..sources import MergedSource, completed_checkpoint, merge_of
from ..values import Value, checked

if TYPE_CHECKING:
    from ..shelf import Shelf
    from . import MergeExecution

MAX_ROWS = 20
"""Of a table that is shown."""

_HEADER = ("tensor", "dtype", "shape", "bytes", "by", "from")
_FLOAT32 = ITEM_SIZE["F32"]
_PROBE = 1.25  # products: the whole one, and the largest part of it that is compared with it
_BUFFERS = 32 << 20  # bytes: blocks, pieces that wait to be written, and what is copied, of a file
_FIRST_USE = 192 << 20  # bytes that libraries load at first use; the most was seen with DoRA


@frozen(field_transformer=checked)
class Change(Value):
    """A tensor of the complete model that differs from the base's.

    Attributes:
        tensor: Its name in the checkpoint.
        dtype: By its name in a safetensors header.
        shape: Of the tensor.
        size: In bytes.
        merged_by: The strategy: `lora_blocks` and `expert_blocks` take a block of rows at a time,
            `expert_pairs` two experts of a stack, all with the bits of PEFT's whole product;
            `peft_module` is PEFT's own merge of the module; `dequantize` is transformers', of
            tensors that the adapter does not change; `copy` is that of the embedding to an output
            layer that was tied to it.
        adapter_tensors: Names in the adapter's file of what it is computed from; none if it is
            only dequantized or copied.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    merged_by: str
    adapter_tensors: tuple[str, ...]


@frozen(field_transformer=checked)
class MergePlan(Value):
    """What `Merger.save` would do with a customized model; shown as a table.

    Which tensors are merged in blocks depends on the machine's math library: for each shape, blocks
    of a random product are compared with the whole product, here as in a save. Where their bits
    differ, PEFT merges the whole, which takes more memory.

    Attributes:
        customized: Name of the customized model.
        base: Name of its base model.
        changes: The tensors that change, in the checkpoint's order.
        unused_adapter_tensors: Names of adapter tensors that belong to no single change: copies of
            the base's own, which PEFT saves along, and what all layers share.
        untrained: The tensors that the adapter targets and that come out as they are in the base,
            because the training left their layers at zero: those that its data never reached.
        tensors: How many the complete model has.
        size: Bytes of all its tensors: what a save writes, but for headers and small files.
        memory: An upper estimate of the worker's peak in bytes, over what it takes to import torch,
            transformers and PEFT.
        recipe: What the merged bits will depend on here.
        completed: Names of files that a full model takes from its base. It is published as it is,
            without a merge, and nothing changes.
    """

    customized: str
    base: str
    changes: tuple[Change, ...]
    unused_adapter_tensors: tuple[str, ...]
    untrained: tuple[str, ...]
    tensors: int
    size: int
    memory: int
    recipe: Mapping[str, Any] = field(hash=False)
    completed: tuple[str, ...] = ()

    def __repr__(self) -> str:
        count = len(self.untrained)
        untrained = f", {count} more were left at zero by the training" if count else ""
        what = f"{len(self.changes)} of {self.tensors} tensors change{untrained}"
        if not (self.changes or self.untrained):
            taken = f", with {', '.join(self.completed)} of the base" if self.completed else ""
            what = f"a full model of {self.tensors} tensors, published without a merge{taken}"
        return (
            f"<MergePlan {self.customized}: {what}, {self.size:,} bytes to write, at most about "
            f"{self.memory:,} bytes of memory>"
        )

    def __str__(self) -> str:
        return f"{self!r}\n{text_table([_HEADER, *self._rows()])}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{html_table(_HEADER, self._rows())}"

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            (
                change.tensor,
                change.dtype,
                str(change.shape),
                f"{change.size:,}",
                change.merged_by,
                ", ".join(change.adapter_tensors),
            )
            for change in self.changes[:MAX_ROWS]
        ]
        if len(self.changes) > MAX_ROWS:
            rows.append((f"and {len(self.changes) - MAX_ROWS} more", "", "", "", "", ""))
        return rows


def plan_merge(shelf: Shelf, base: BaseModel, customized: CustomizedModel) -> MergePlan:
    """The plan for a customized model.

    Imports torch and PEFT for an adapter, so it is for a process of its own.
    """
    if is_trained_checkpoint(customized):
        return _plan_copy(shelf, base, customized)
    with (
        shelf.opened(base) as base_directory,
        shelf.checked(customized) as (directory, check),
        merge_of(base_directory, directory, trust_remote_code=base.trust_remote_code) as merged,
    ):
        check.finish(no_progress)
        merge = merged.merge
        merge.check()
        targeted = [name for name in merge.infos if name in merge.changed]
        changes = tuple(_change(merge, name) for name in targeted if name not in merge.untrained)
        used = {name for tensor in targeted for name in merge.sources(tensor)}
        return MergePlan(
            customized=customized.name,
            base=customized.base,
            changes=changes,
            unused_adapter_tensors=tuple(n for n in merged.adapter.tensors if n not in used),
            untrained=tuple(name for name in targeted if name in merge.untrained),
            tensors=len(merge.infos),
            size=sum(info.size for info in merge.infos.values()),
            memory=_memory(merged),
            recipe=dict(merge.recipe),
        )


def _plan_copy(shelf: Shelf, base: BaseModel, customized: CustomizedModel) -> MergePlan:
    """The plan for a full model, which takes what it lacks from its base."""
    with (
        shelf.opened(base) as base_directory,
        shelf.opened(customized) as directory,
        completed_checkpoint(base_directory, directory) as completed,
    ):
        merge, files = completed.merge, completed.source.files.items()
        return MergePlan(
            customized=customized.name,
            base=customized.base,
            changes=(),
            unused_adapter_tensors=(),
            untrained=(),
            tensors=len(merge.infos),
            size=sum(info.size for info in merge.infos.values()),
            memory=min(parallel_files(), len(merge.shards)) * _BUFFERS,
            recipe=dict(merge.recipe),
            completed=tuple(name for name, path in files if path.is_relative_to(base_directory)),
        )


def _change(merge: MergeExecution, name: str) -> Change:
    info, by = merge.infos[name], merge.strategy(name).name
    return Change(name, info.dtype, info.shape, info.size, by, merge.sources(name))


def _memory(merged: MergedSource) -> int:
    """The most bytes at once.

    The sum of: the adapter as PEFT loads it, if it does, twice, because the proof opens it again;
    the largest computation, whether of a strategy, of its proof, or of the probe that chose it; for
    every file that is written at a time, its buffers and results that wait; and what libraries load
    at first use.
    """
    merge = merged.merge
    adapter = merged.adapter.tensors.values() if merge.adapter_in_memory else ()
    held = sum(info.size + 2 * math.prod(info.shape) * _FLOAT32 for info in adapter)
    strategies = {id(s): s for s in map(merge.strategy, merge.changed)}.values()
    probe = int(merge.probe_elements * _FLOAT32 * _PROBE)
    proofs = (strategy.reference.cost.working for strategy in strategies)
    working = max(probe, *proofs, *(strategy.cost.working for strategy in strategies))
    waiting = max(strategy.cost.waiting for strategy in strategies)
    files = min(merge.max_parallel_files or parallel_files(), len(merge.shards))
    return held + working + files * (waiting + _BUFFERS) + _FIRST_USE
