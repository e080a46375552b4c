"""Quantized tensors that the adapter does not change: 16-bit ones by transformers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..groups import TensorGroup
from .peft_module import ComputedTogether, Recomputed, Tensors, stored_infos
from .protocol import Cost, MergeContext, Reading, ReadNext


class Dequantize:
    """Loads and saves the tensors of a group by transformers."""

    name = "dequantize"

    def __init__(self, group: TensorGroup, context: MergeContext) -> None:
        """`group`: one that `for_group` accepts."""
        self._group, self._context = group, context
        self._values = ComputedTogether((i.name for i in group.infos), self._compute, context)

    @classmethod
    def for_group(cls, group: TensorGroup, context: MergeContext) -> Dequantize | None:
        """None if layers of the group are merged."""
        return None if group.layers else cls(group, context)

    @property
    def cost(self) -> Cost:
        """The whole group."""
        return Cost.of_whole(self._group.infos, stored_infos(self._group, self._context))

    def blocks(self, tensor: str, read_next: ReadNext) -> Iterator[torch.Tensor]:
        """See `Strategy`."""
        yield self._values.take(tensor)

    def _compute(self) -> Tensors:
        conversions, tensors = self._context.skeleton.conversions, Tensors()
        for conversion in self._group.conversions:
            tensors |= conversions.save(conversion, conversions.load(conversion))
        return tensors

    def check(self, reading: Reading) -> None:
        """See `Strategy`: that it can be dequantized was seen by names and shapes."""

    @property
    def reference(self) -> Recomputed:
        """The same once more."""
        return Recomputed(self.name, self.cost, lambda tensor: self._compute())
