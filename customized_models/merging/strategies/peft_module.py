"""PEFT's own module, which merges a group of tensors as a whole: suits everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import torch

from ...errors import MergeError, shown
from ...files.safetensors import TensorInfo
from ..groups import PlannedLayer, TensorGroup
from ..layers import AdaptedLayer
from .outcome import Outcome, refuse_non_finite
from .protocol import Cost, MergeContext, Reading, ReadNext

Tensors: TypeAlias = dict[str, torch.Tensor]

MergeLayer: TypeAlias = Callable[[AdaptedLayer, Tensors], Mapping[str, torch.Tensor]]
"""Like `AdaptedLayer.merge`; it may write to the values that it is given."""

_NUMBER = torch.zeros(())  # what a parameter has instead that the base lacks
_HEAD = 4096  # elements: enough to tell nearly all changed tensors from the base's, and small


class PeftModule:
    """Merges the layers of a group with PEFT, between transformers' loading and saving."""

    name = "peft_module"

    def __init__(self, group: TensorGroup, context: MergeContext) -> None:
        self._group, self._context = group, context
        self._merged = ComputedTogether((i.name for i in group.infos), self._merge, context)

    @property
    def cost(self) -> Cost:
        """The whole group."""
        return Cost.of_whole(self._group.infos, stored_infos(self._group, self._context))

    def blocks(self, tensor: str, read_next: ReadNext) -> Iterator[torch.Tensor]:
        """See `Strategy`."""
        yield self._merged.take(tensor)

    def _merge(self) -> Tensors:
        return merge_group(self._group, self._context, AdaptedLayer.merge)

    def check(self, reading: Reading) -> None:
        """See `Strategy`: all of it is merged."""
        self._merge()

    @property
    def reference(self) -> Recomputed:
        """The same once more."""
        return Recomputed(self.name, self.cost, lambda tensor: self._merge())


class ComputedTogether:
    """Tensors that only come all at once; each waits until it is asked for."""

    def __init__(
        self, names: Iterable[str], compute: Callable[[], Tensors], context: MergeContext
    ) -> None:
        self._compute = compute
        self._lock = context.threads.one_group
        self._waiting: Tensors = {}
        self._never_taken = {*names}

    def take(self, name: str) -> torch.Tensor:
        """One of them; the caller may keep it and write to it."""
        with self._lock:
            if name not in self._waiting:
                self._waiting |= self._compute()
            tensor = self._waiting.pop(name)
            self._never_taken.discard(name)
            if not self._never_taken:  # the others have been taken before and came once more
                self._waiting.clear()
            return tensor


class Recomputed:
    """Computes everything anew for each tensor, and keeps nothing."""

    def __init__(self, name: str, cost: Cost, compute: Callable[[str], Tensors]) -> None:
        """`compute`: gives a tensor of that name, and maybe others."""
        self.name, self.cost, self._compute = name, cost, compute

    def blocks(self, tensor: str, read_next: ReadNext) -> Iterator[torch.Tensor]:
        """See `Reference`."""
        yield self._compute(tensor)[tensor]


def stored_infos(group: TensorGroup, context: MergeContext) -> list[TensorInfo]:
    """The base's tensors that a group is loaded from."""
    infos = context.skeleton.base.infos
    names = [name for conversion in group.conversions for name in conversion.tensors]
    names += [info.name for info in group.infos]
    return [infos[name] for name in dict.fromkeys(names) if name in infos]


def merge_group(
    group: TensorGroup,
    context: MergeContext,
    merge: MergeLayer,
    outcome: Outcome | None = None,
) -> Tensors:
    """The merged tensors of a group: loaded by transformers, merged, and saved by transformers.

    Args:
        group: What to merge.
        context: Of the merge.
        merge: Merges one layer; it is called in PEFT's thread.
        outcome: Of the stack, where the group is a part of one.

    Raises:
        NonFiniteError, UnchangedTargetsError, MergeError, UnsupportedArchitectureError: As
            `Strategy.blocks`.
    """
    conversions, skeleton = context.skeleton.conversions, context.skeleton
    values: Tensors = {}
    for conversion in group.conversions:
        values |= conversions.load(conversion)
    for layer in group.layers:
        values |= _MergedLayer(group, context, layer, outcome).merge(values, merge)
    tensors: Tensors = {}
    for conversion in group.conversions:
        of_it = {name: values.pop(name) for name in conversion.parameters}
        tensors |= conversions.save(conversion, of_it)
    for path, tensor in values.items():
        tensors |= dict.fromkeys(skeleton.tensors_of(path) or [path], tensor)
    return tensors


class _MergedLayer:
    """One layer of a group, merged and compared with the base."""

    def __init__(
        self,
        group: TensorGroup,
        context: MergeContext,
        layer: PlannedLayer,
        outcome: Outcome | None,
    ) -> None:
        self._group, self._context, self._layer = group, context, layer
        self._outcome = outcome or Outcome((), context.changed, may_stay=layer.may_stay)

    def merge(self, loaded: Tensors, merge: MergeLayer) -> Tensors:
        """The changed parameters by their names in the model; `loaded` values may be written to."""
        adapted, skeleton = self._layer.adapted, self._context.skeleton
        values, heads = Tensors(), Tensors()
        for name, path in self._layer.outputs.items():
            trained = adapted.trained_values.get(name)
            if name in self._layer.sources:
                source = self._layer.sources[name]
                before = loaded[source] if source in loaded else skeleton.read(source)
                heads[name] = _head(before).clone()
            else:
                before = torch.zeros(skeleton.shapes[path], dtype=skeleton.dtypes[path])
            values[name] = before if trained is None else trained.clone()
        merged = self._context.threads.run_peft(merge, adapted, values)
        for name in self._layer.outputs:
            self._check(name, merged[name], heads.get(name))
        return {self._layer.outputs[name]: merged[name] for name in adapted.changed}

    def _check(self, name: str, merged: torch.Tensor, head: torch.Tensor | None) -> None:
        path, changed = self._layer.outputs[name], self._layer.adapted.changed
        refuse_non_finite(path, merged, lambda: self._before(name) if head is not None else _NUMBER)
        if head is None:
            self._context.changed.set()
            return
        same = torch.equal(_head(merged), head) and torch.equal(merged, self._before(name))
        if not same and name not in changed:
            raise MergeError(f"merging changed {shown(path)}, which the adapter does not target")
        beside_weight = name.endswith("bias") and len(changed) > 1  # its gradient may have been 0
        if name in changed and not (same and beside_weight):
            names = [info.name for info in self._group.infos]
            self._outcome.note(names, same=same, where=path)

    def _before(self, name: str) -> torch.Tensor:
        """The base's values, read once more, for they may have been written to."""
        source, skeleton = self._layer.sources[name], self._context.skeleton
        for conversion in self._group.conversions:  # which may be of a part of a stack
            if source in conversion.parameters:
                return skeleton.conversions.load(conversion)[source]
        return skeleton.read(source)


def _head(tensor: torch.Tensor) -> torch.Tensor:
    """Its first elements, which tell most changed tensors from the base's."""
    return tensor.reshape(-1)[:_HEAD]
