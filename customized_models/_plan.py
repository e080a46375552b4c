"""`MergePlan`: what a save will change, write and need, known before it begins."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from ._adapters import PREFIX
from ._checkpoints import ITEM_SIZE, TensorInfo
from ._models import CustomizedModel, html_table
from ._sources import MergedSource, merged_source
from ._writer import files_at_once

if TYPE_CHECKING:
    from ._registry import ModelRegistry

ROWS = 20  # of a table that is shown
_FLOAT32 = ITEM_SIZE["F32"]
_BLOCKS = 32 << 20  # bytes
_FIRST_USE = 256 << 20  # bytes: seen with DoRA, which makes the libraries load most
_HEADER = ("tensor", "dtype", "shape", "bytes", "from")


@frozen
class Change:
    """A tensor of the complete model that differs from the base's.

    `tensor`: its name in the checkpoint. `size`: bytes. `adapter_tensors`: those that it is
    computed from, by the names in the adapter's file; none if its module goes by another name
    there than in the checkpoint.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    adapter_tensors: tuple[str, ...]


@frozen
class MergePlan:
    """What `Merger.save` would do with a customized model; shown as a table.

    `customized`, `base`: names. `changes`: the tensors that change, in checkpoint order.
    `others`: adapter tensors that stand under none of them: copies of the base's own, which PEFT
    saves along, and those of modules that transformers renames. `tensors`: how many the complete
    model has. `size`: bytes of all its tensors, which is what a save writes but for headers and
    small files. `memory`: an upper estimate of the worker's peak in bytes, over what it takes to
    import torch, transformers and PEFT. `recipe`: what the merged bits will depend on here.

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
            (c.tensor, c.dtype, str(c.shape), f"{c.size:,}", ", ".join(c.adapter_tensors))
            for c in self.changes[:ROWS]
        ]
        if len(self.changes) > ROWS:
            rows.append((f"and {len(self.changes) - ROWS} more", "", "", "", ""))
        return rows


def plan_merge(registry: ModelRegistry, name: str) -> MergePlan:
    """The plan for the customized model `name`; imports torch and PEFT, so for an own process."""
    customized = registry.get(CustomizedModel, name)
    with merged_source(registry, customized) as merged:
        infos = merged.merge.infos
        changed = [name for name in infos if name in merged.merge.changed]
        sources, others = _sources_of(merged.adapter.tensors, changed)
        return MergePlan(
            customized=customized.name,
            base=customized.base,
            changes=tuple(_change(infos[name], sources[name]) for name in changed),
            others=others,
            tensors=len(infos),
            size=sum(info.size for info in infos.values()),
            memory=_memory(merged),
            recipe=dict(merged.merge.recipe),
        )


def _change(info: TensorInfo, adapter_tensors: Iterable[str]) -> Change:
    return Change(info.name, info.dtype, info.shape, info.size, tuple(adapter_tensors))


def _sources_of(
    adapter_tensors: Iterable[str], changed: Iterable[str]
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """The adapter's tensors by the changed tensor whose module they lie in, and the others."""
    sources: dict[str, list[str]] = {name: [] for name in changed}
    others: list[str] = []
    for name in adapter_tensors:
        path = name.removeprefix(PREFIX)
        if path in sources:  # a whole tensor, of modules_to_save
            sources[path].append(name)
            continue
        while (module := f"{path}.weight") not in sources and "." in path:
            path = path.rpartition(".")[0]
        sources.get(module, others).append(name)
    return sources, tuple(others)


def _memory(merged: MergedSource) -> int:
    """The most bytes at once.

    The adapter as PEFT loads it, if it does, twice, for the proof opens it again. The largest
    changed tensor: either PEFT's product before and after scaling, with which blocks are compared;
    or, where PEFT merges it as a whole, what was read and its cast, the products, the operands of
    the sum in float32, and what DoRA weighs it with. Of each file that is written, blocks, and two
    tensors that PEFT merged. And what the libraries load when they are first used.
    """
    merge, base = merged.merge, merged.layout.infos
    adapter = merged.adapter.tensors.values() if merge.keeps_values else ()
    held = sum(info.size + 2 * math.prod(info.shape) * _FLOAT32 for info in adapter)
    at_once, waiting = 0, 0
    for info in (merge.infos[name] for name in merge.changed):
        product = math.prod(info.shape) * _FLOAT32
        if merge.takes_blocks(info.name):
            at_once = max(at_once, 2 * product)
        else:
            at_once = max(at_once, base.get(info.name, info).size + info.size + 5 * product)
            waiting = max(waiting, 2 * info.size)
    files = min(files_at_once(), len(merge.shards))
    return held + at_once + files * (waiting + _BLOCKS) + _FIRST_USE
