"""A matrix merged a block of rows at a time: what plain LoRA and stacked experts have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from attrs import frozen

from ...errors import UnchangedTargetsError, shown
from ...files.safetensors import TensorInfo, tensor_bytes, torch_dtype
from ..threads import Workspace
from .protocol import UNCHANGED, ReadNext, UnchangedTensors, refuse_non_finite

BLOCK_ELEMENTS = 1 << 19
"""Of a block: two megabytes in float32, so that it stays in a processor's second-level cache."""

MIN_ROWS = 64
"""Of a block: with fewer rows, math libraries multiply by another routine, with other bits."""


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


def merged_rows(
    info: TensorInfo,
    dtype: torch.dtype,
    factors: LoraFactors,
    add: AddRows,
    read_next: ReadNext,
    workspace: Workspace,
    unchanged: UnchangedTensors,
) -> Iterator[torch.Tensor]:
    """The merged rows of a matrix, block by block.

    Args:
        info: The matrix in the base's file.
        dtype: What it is loaded as, and merged to.
        factors: Their blocks' bounds are taken.
        add: The sum.
        read_next: Reads the matrix's bytes.
        workspace: The calling thread's.
        unchanged: Told if no block differs from the base's.

    Raises:
        NonFiniteError, UnchangedTargetsError: As `Strategy.blocks`.
    """
    stored, columns, same = torch_dtype(info.dtype), info.shape[1], True
    for start, end in factors.bounds():
        rows = workspace.block("rows", (end - start, columns), stored)
        read_next(tensor_bytes(rows))
        before, after = rows.to(dtype), workspace.result(rows.shape, dtype)
        add(before, after, start, end)
        refuse_non_finite(info.name, after)
        same = same and torch.equal(before, after)
        yield after
    if same and unchanged.add([info.name]):
        raise UnchangedTargetsError(UNCHANGED.format(shown(info.name)))
