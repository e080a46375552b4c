"""A tensor that the merge adds, and that is a copy of another one of the base."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...files.safetensors import TensorInfo, tensor_bytes, torch_dtype
from .protocol import Cost, Reading, ReadNext
from .rows import BLOCK_ELEMENTS


class Copy:
    """Copies the embedding to an output layer that was tied to it, and no longer is."""

    name = "copy"

    def __init__(self, stored: TensorInfo) -> None:
        """`stored`: what is copied, a matrix."""
        self._stored = stored

    @property
    def cost(self) -> Cost:
        """Blocks only."""
        return Cost(0)

    def blocks(self, tensor: str, read_next: ReadNext) -> Iterator[torch.Tensor]:
        """See `Strategy`."""
        rows, columns = self._stored.shape
        step = max(1, BLOCK_ELEMENTS // columns)
        for start in range(0, rows, step):
            shape = (min(step, rows - start), columns)
            block = torch.empty(shape, dtype=torch_dtype(self._stored.dtype))
            read_next(tensor_bytes(block))
            yield block

    def check(self, reading: Reading) -> None:
        """See `Strategy`: nothing can go wrong."""

    @property
    def reference(self) -> Copy:
        """Itself."""
        return self
