"""`MergePlan`: what a save will change, write and need, known before it begins."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from ..display import html_table
from ..files.safetensors import ITEM_SIZE
from ..models import BaseModel, CustomizedModel
from ..sources import MergedSource, merge_of
from .writing import files_at_once

if TYPE_CHECKING:
    from ..shelf import Shelf
    from . import Merge

ROWS = 20  # of a table that is shown
_FLOAT32 = ITEM_SIZE["F32"]
_BLOCKS = 32 << 20  # bytes
_FIRST_USE = 192 << 20  # bytes: seen with DoRA, which makes the libraries load most
_HEADER = ("tensor", "dtype", "shape", "bytes", "by", "from")


@frozen
class Change:
    """A tensor of the complete model that differs from the base's.

    `tensor`: its name in the checkpoint. `size`: bytes. `adapter_tensors`: those that it is
    computed from, by the names in the adapter's file; none where a quantized base is dequantized or
    an output layer becomes one of its own. `by`: "blocks", a row block at a time with the bits of
    PEFT's whole product, or "PEFT" itself; "transformers" where it is only dequantized; "copy" for
    such an output layer.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    by: str
    adapter_tensors: tuple[str, ...]


@frozen
class MergePlan:
    """What `Merger.save` would do with a customized model; shown as a table.

    `customized`, `base`: names. `changes`: the tensors that change, in checkpoint order.
    `others`: adapter tensors that stand under none of them: copies of the base's own, which PEFT
    saves along, and what all layers share. `tensors`: how many the complete model has. `size`:
    bytes of all its tensors, which is what a save writes but for headers and small files. `memory`:
    an upper estimate of the worker's peak in bytes, over what it takes to import torch,
    transformers and PEFT. `recipe`: what the merged bits will depend on here.

    A plain LoRA is merged in blocks if they give the bits of PEFT's whole product, which is tried
    once for each shape, here as in a save; else PEFT merges it, and takes more memory.
    """

    customized: str
    base: str
    changes: tuple[Change, ...]
    others: tuple[str, ...]
    tensors: int
    size: int
    memory: int
    recipe: Mapping[str, Any] = field(hash=False)

    def __repr__(self) -> str:
        return (
            f"<MergePlan {self.customized}: {len(self.changes)} of {self.tensors} tensors change, "
            f"{self.size:,} bytes to write, at most about {self.memory:,} bytes of memory>"
        )

    def __str__(self) -> str:
        rows = [_HEADER, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join((repr(self), *lines))

    def _repr_html_(self) -> str:
        rows: list[tuple[object, ...]] = [*self._rows()]
        return f"<p>{html.escape(repr(self))}</p>{html_table(_HEADER, rows)}"

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            (c.tensor, c.dtype, str(c.shape), f"{c.size:,}", c.by, ", ".join(c.adapter_tensors))
            for c in self.changes[:ROWS]
        ]
        if len(self.changes) > ROWS:
            rows.append((f"and {len(self.changes) - ROWS} more", "", "", "", "", ""))
        return rows


def plan_merge(shelf: Shelf, base: BaseModel, customized: CustomizedModel) -> MergePlan:
    """The plan for a customized model; imports torch and PEFT, so for an own process."""
    with (
        shelf.opened(base) as base_directory,
        shelf.proven(customized) as (directory, finish),
        merge_of(base_directory, directory) as merged,
    ):
        finish(_silent)
        infos = merged.merge.infos
        changes = tuple(
            _change(merged.merge, name) for name in infos if name in merged.merge.changed
        )
        used = {name for change in changes for name in change.adapter_tensors}
        return MergePlan(
            customized=customized.name,
            base=customized.base,
            changes=changes,
            others=tuple(name for name in merged.adapter.tensors if name not in used),
            tensors=len(infos),
            size=sum(info.size for info in infos.values()),
            memory=_memory(merged),
            recipe=dict(merged.merge.recipe),
        )


def _change(merge: Merge, name: str) -> Change:
    info = merge.infos[name]
    return Change(name, info.dtype, info.shape, info.size, merge.way(name), merge.sources(name))


def _memory(merged: MergedSource) -> int:
    """The most bytes at once.

    The adapter as PEFT loads it, if it does, twice, for the proof opens it again. What is merged at
    once: either PEFT's product, with which the proof compares blocks; or, where PEFT merges it as a
    whole, what was read and its cast, the products, the operands of the sum in float32, and what
    DoRA weighs it with; or PEFT's product of stacked experts, with which that of two was compared.
    Of each file that is written, blocks, and twice what PEFT merged at once. And what the libraries
    load when they are first used.
    """
    merge, base = merged.merge, merged.layout.infos
    adapter = merged.adapter.tensors.values() if merge.keeps_values else ()
    held = sum(info.size + 2 * math.prod(info.shape) * _FLOAT32 for info in adapter)
    at_once, waiting = merge.compared * _FLOAT32 * 5 // 4, 0
    for infos in {merge.together(name) for name in merge.changed}:
        product = sum(math.prod(info.shape) for info in infos) * _FLOAT32
        if merge.way(infos[0].name) == "blocks":
            at_once = max(at_once, product)
        else:
            sizes = (base.get(info.name, info).size + info.size for info in infos)
            at_once = max(at_once, sum(sizes) + 5 * product)
            waiting = max(waiting, 2 * sum(info.size for info in infos))
    files = min(merge.at_once or files_at_once(), len(merge.shards))
    return held + at_once + files * (waiting + _BLOCKS) + _FIRST_USE


def _silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
