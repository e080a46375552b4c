"""A matrix merged a block of rows at a time: what plain LoRA and stacked experts have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from attrs import frozen

from ...files.safetensors import TensorInfo, tensor_bytes, torch_dtype
from ..threads import Workspace
from .outcome import Outcome, refuse_non_finite
from .protocol import ReadNext

BLOCK_ELEMENTS = 1 << 19
"""Of a block: two megabytes in float32, so that it stays in a processor's second-level cache."""

MIN_ROWS = 64
"""Of a block: with fewer rows, math libraries multiply by another routine, with other bits."""


COMPARED = 1 << 14
"""Numbers that are compared at least to tell two ways of rounding apart.

Of products of one row, one number in sixteen was seen to differ: of few numbers, none may.
"""


@frozen
class LoraFactors:
    """The factors of one matrix (out, in), both float32.

    A LoRA changes a weight by `scaling * up @ down`.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685,
    section 4.1, where up is B, down is A and scaling is alpha / r.

    Attributes:
        up: (out, rank).
        down: (rank, in).
        scaling: A number.
    """

    up: torch.Tensor
    down: torch.Tensor
    scaling: float

    def bounds(self) -> Iterator[tuple[int, int]]:
        """The first row and the end, exclusive, of each block."""
        rows, columns = len(self.up), self.down.shape[1]
        count = max(1, rows // max(MIN_ROWS, BLOCK_ELEMENTS // columns))
        return pairwise(rows * i // count for i in range(count + 1))

    def product(self, start: int, end: int, workspace: Workspace) -> torch.Tensor:
        """Rows `start` to `end`, exclusive, of `up @ down * scaling`."""
        shape = (end - start, self.down.shape[1])
        product = workspace.block("product", shape, torch.float32)
        return torch.mm(self.up[start:end], self.down, out=product).mul_(self.scaling)

    def largest_change(self) -> float:
        """No element of the product is larger, nor any sum on the way to it; NaN if one is NaN."""
        factors = (self.up, self.down)
        up, down = (float(factor.abs().max()) if factor.numel() else 0.0 for factor in factors)
        return up * down * self.up.shape[1] * max(1.0, abs(self.scaling))

    def blocks_bit_identical(self, whole: torch.Tensor, workspace: Workspace) -> bool:
        """Whether the blocks of the product have the bits of the whole product."""
        return all(
            torch.equal(
                self.product(start, end, workspace).view(torch.int32),
                whole[start:end].view(torch.int32),
            )
            for start, end in self.bounds()
        )


AddRows = Callable[[torch.Tensor, torch.Tensor, int, int], None]
"""Writes to its second argument the first plus rows of a product, from one row to another."""


@frozen
class MergedRows:
    """A matrix of the base and what is added to it, a block of rows at a time.

    Attributes:
        info: The matrix in the base's file.
        dtype: What it is loaded as, and merged to.
        factors: Their blocks' bounds are taken.
        add: The sum.
        workspace: The calling thread's.
        outcome: Told whether any block differs from the base's.
    """

    info: TensorInfo
    dtype: torch.dtype
    factors: LoraFactors
    add: AddRows
    workspace: Workspace
    outcome: Outcome

    def blocks(self, read_next: ReadNext) -> Iterator[torch.Tensor]:
        """The merged rows; raises NonFiniteError and UnchangedTargetsError as `Strategy.blocks`.

        Args:
            read_next: Reads the matrix's bytes.
        """
        same, bounded = True, self.factors.largest_change() < _room(self.dtype)
        for before, after in self._pairs(read_next, bounded=bounded):
            same = same and torch.equal(before, after)
            yield after
        self.outcome.note([self.info.name], same=same, where=self.info.name)

    def check(self, read_next: ReadNext) -> None:
        """Raise what `blocks` would, without reading further than to the first change.

        That tells all if the change is too small to carry a number of the base out of its dtype.
        """
        largest, same = self.factors.largest_change(), True
        bounded = largest < _room(self.dtype)
        if bounded and self.outcome.may_stay:
            return
        for before, after in self._pairs(read_next, bounded=bounded) if largest != 0 else ():
            same = same and torch.equal(before, after)
            if bounded and not same:
                break
        self.outcome.note([self.info.name], same=same, where=self.info.name)

    def _pairs(
        self, read_next: ReadNext, *, bounded: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows before and after the merge.

        `bounded`: whether the change is too small to make any number of the base infinite.
        """
        stored, columns = torch_dtype(self.info.dtype), self.info.shape[1]
        for start, end in self.factors.bounds():
            rows = self.workspace.block("rows", (end - start, columns), stored)
            read_next(tensor_bytes(rows))
            before = rows.to(self.dtype)
            after = self.workspace.result(rows.shape, self.dtype)
            self.add(before, after, start, end)
            if not bounded:
                refuse_non_finite(self.info.name, after, partial(torch.Tensor.detach, before))
            yield before, after


def _room(dtype: torch.dtype) -> float:
    """Less than what must be added to any number of that dtype to make it infinite.

    The largest number is half a step away from being rounded to infinity; of float32 too, in which
    all sums are computed.
    """
    coarser = (torch.finfo(one) for one in (dtype, torch.float32))
    return min(info.max * info.eps / 4 for info in coarser)
