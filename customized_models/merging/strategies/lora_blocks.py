"""Plain LoRA on a linear layer, a block of rows at a time: PEFT's bits with little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from peft.tuners.lora import Linear

from ...files.safetensors import TensorInfo
from ..groups import TensorGroup
from ..layers import AdaptedLayer
from .fused import fused_bit_identical, fused_sum
from .outcome import Outcome
from .protocol import Cost, MergeContext, Reading, ReadNext
from .rows import COMPARED, LoraFactors, MergedRows


class LoraBlocks:
    """Merges a layer whose shape blocks were found to suit.

    Whether blocks give the bits of PEFT's whole product depends on shapes and on the machine's math
    library, not on the values. So for each shape the whole product of two random factors is
    compared with its blocks once.
    """

    name = "lora_blocks"

    def __init__(self, group: TensorGroup, context: MergeContext, *, is_fused: bool) -> None:
        """`group`: one that `for_group` accepts. `is_fused`: whether that gives PEFT's bits."""
        (planned,), (info,) = group.layers, group.infos
        self._is_fused = is_fused
        self._layer, self._context, self._tensor = planned.adapted, context, info.name
        self._may_stay = planned.may_stay
        (tensor,) = context.skeleton.conversion(planned.sources["weight"]).tensors
        self._stored = context.skeleton.base.infos[tensor]
        self._dtype = context.skeleton.dtypes[planned.outputs["weight"]]

    @classmethod
    def for_group(cls, group: TensorGroup, context: MergeContext) -> LoraBlocks | None:
        """None if it is not a plain LoRA's weight, or if blocks would give other bits than PEFT."""
        if not group.is_one_weight:
            return None
        shapes = _factor_shapes(group.layers[0].adapted)
        if shapes is None:
            return None
        decide = partial(context.threads.run_in_block_thread, _suits, *shapes, context)
        blocks, fused = context.decisions.once(shapes, decide)
        return cls(group, context, is_fused=fused) if blocks else None

    @property
    def cost(self) -> Cost:
        """Blocks only."""
        return Cost(0)

    def blocks(self, tensor: str, read_next: ReadNext) -> Iterator[torch.Tensor]:
        """See `Strategy`. The sum is computed in float32 and rounded once.

        Source: `peft/tuners/lora/layer.py`, `Linear.merge`, where torch promotes the sum.
        """
        return self._rows().blocks(read_next)

    def check(self, reading: Reading) -> None:
        """See `Strategy`."""
        with reading(self._tensor) as read_next:
            self._rows().check(read_next)

    def _rows(self) -> MergedRows:
        workspace = self._context.threads.workspace()
        factors = _factors(self._layer)

        fused = fused_sum(factors, self._dtype) if self._is_fused else None

        def add(before: torch.Tensor, after: torch.Tensor, start: int, end: int) -> None:
            if fused is not None and fused(before, after, start, end):
                return
            total = workspace.block("total", before.shape, torch.float32).copy_(before)
            after.copy_(total.add_(factors.product(start, end, workspace)))

        outcome = Outcome([self._tensor], self._context.changed, may_stay=self._may_stay)
        return MergedRows(self._stored, self._dtype, factors, add, workspace, outcome)

    @property
    def reference(self) -> WholeProduct:
        """PEFT's own product."""
        return WholeProduct(self._layer, self._stored, self._dtype, self._context, self._may_stay)


class WholeProduct:
    """The same by PEFT's own product, which is added as PEFT adds it."""

    name = "peft_module"

    def __init__(
        self,
        layer: AdaptedLayer,
        stored: TensorInfo,
        dtype: torch.dtype,
        context: MergeContext,
        may_stay: bool,
    ) -> None:
        self._layer, self._stored, self._dtype = layer, stored, dtype
        self._context, self._may_stay = context, may_stay

    @property
    def cost(self) -> Cost:
        """The product in float32."""
        return Cost(math.prod(self._stored.shape) * torch.float32.itemsize)

    def blocks(self, tensor: str, read_next: ReadNext) -> Iterator[torch.Tensor]:
        """See `Strategy`."""
        whole = self._context.threads.run_peft(self._layer.delta)

        def add(before: torch.Tensor, after: torch.Tensor, start: int, end: int) -> None:
            after.copy_(before)
            after += whole[start:end]

        workspace, factors = self._context.threads.workspace(), _factors(self._layer)
        outcome = Outcome([tensor], self._context.changed, may_stay=self._may_stay)
        rows = MergedRows(self._stored, self._dtype, factors, add, workspace, outcome)
        return rows.blocks(read_next)


def _factors(layer: AdaptedLayer) -> LoraFactors:
    return LoraFactors(*layer.factors(), layer.scaling)


def _factor_shapes(adapted: AdaptedLayer) -> tuple[torch.Size, torch.Size] | None:
    """Shapes of up and down, if PEFT adds their product to the weight and does nothing else."""
    layer = adapted.module
    if type(layer) is not Linear or len(layer.active_adapters) != 1 or layer.disable_adapters:
        return None
    (name,) = layer.active_adapters
    if name in layer.lora_variant or layer.fan_in_fan_out or layer.lora_bias[name]:
        return None
    up: torch.Tensor = layer.lora_B[name].get_parameter("weight")
    down: torch.Tensor = layer.lora_A[name].get_parameter("weight")
    return (up.shape, down.shape) if up.dtype == down.dtype == torch.float32 else None


def _suits(up: torch.Size, down: torch.Size, context: MergeContext) -> tuple[bool, bool]:
    """Whether blocks give the bits of PEFT's whole product, and whether the fused sum does."""
    drawn, workspace = torch.Generator().manual_seed(0), context.threads.workspace()
    blocks = fused = True
    for _ in range(0, COMPARED, up[0] * down[1] or COMPARED):
        one, other = (torch.randn(size, generator=drawn) for size in (up, down))
        one[1::7] = 0  # as training may leave a row: the sign of its product counts too
        factors = LoraFactors(one, other, 1.0)
        whole = context.threads.run_peft(torch.mm, one, other)
        blocks = blocks and factors.blocks_bit_identical(whole, workspace)
        fused = fused and blocks and fused_bit_identical(factors, whole, workspace)
    return blocks, fused
