"""Plain LoRA on a linear layer, row block by row block: PEFT's bits with little memory.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from attrs import frozen
from peft.tuners.lora import Linear

from ._target import Target

_BLOCK = 1 << 20  # elements: four megabytes in float32, so that a block stays in the cache
_MIN_ROWS = 64  # products of fewer rows take another path in the math library, with other bits


class Merging:
    """Merges layers; those of a shape for which blocks have been seen to give PEFT's bits, so.

    Whether they do depends on shapes and on the machine's math library, not on the values. The
    first layer of each shape is merged both ways and compared.
    """

    def __init__(self) -> None:
        self._same_bits: dict[object, bool] = {}

    def merge(
        self, target: Target, values: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """See `Target.merge`."""
        factors = _factors_of(target)
        if factors is None:
            return target.merge(values)
        weight = values["weight"]
        kind = (weight.shape, weight.dtype, factors.up.shape, torch.get_num_threads())
        if kind not in self._same_bits:
            other = weight.clone()
            with _one_thread():
                factors.add_to(other)
            merged = target.merge(values)
            self._same_bits[kind] = torch.equal(merged["weight"], other)
            return merged
        if not self._same_bits[kind]:
            return target.merge(values)
        with _one_thread():
            factors.add_to(weight)
        return values


@frozen
class _Factors:
    """`up` (out, rank), `down` (rank, in), both float32."""

    up: torch.Tensor
    down: torch.Tensor
    scaling: float

    @torch.no_grad()
    def add_to(self, weight: torch.Tensor) -> None:
        """weight (out, in) += up @ down * scaling, rounded once to its dtype."""
        out, into = weight.shape
        count = max(1, out // max(_MIN_ROWS, _BLOCK // into))
        bounds = [out * i // count for i in range(count + 1)]
        rows = max(end - start for start, end in pairwise(bounds))
        products, sums = torch.empty(rows, into), torch.empty(rows, into)
        for start, end in pairwise(bounds):
            block, product, total = weight[start:end], products[: end - start], sums[: end - start]
            torch.mm(self.up[start:end], self.down, out=product)
            block.copy_(total.copy_(block).add_(product.mul_(self.scaling)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Blocks are too small to share out: threads would wait for one another at every step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factors_of(target: Target) -> _Factors | None:
    """Those of a layer for which PEFT computes exactly this, else None."""
    layer = target.module
    if type(layer) is not Linear or len(layer.active_adapters) != 1 or layer.disable_adapters:
        return None
    (name,) = layer.active_adapters
    special = name in layer.lora_variant or layer.fan_in_fan_out or layer.lora_bias[name]
    up: torch.Tensor = layer.lora_B[name].get_parameter("weight")
    down: torch.Tensor = layer.lora_A[name].get_parameter("weight")
    if special or up.dtype != torch.float32 or down.dtype != torch.float32:
        return None
    return _Factors(up, down, layer.scaling[name])
