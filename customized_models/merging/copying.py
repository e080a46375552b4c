"""A full model as what is written out where an adapter's merge would be: nothing of it changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from ..files.safetensors import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch


@frozen
class CheckpointCopy:
    """The tensors of a checkpoint, all of them as they are; see `MergeExecution`."""

    checkpoint: Checkpoint

    changed: frozenset[str] = frozenset()
    max_parallel_files: int | None = None

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What the bytes depend on besides the parents: nothing."""
        return {"arithmetic": "none: a full model, copied"}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor."""
        return self.checkpoint.infos

    @property
    def shards(self) -> Mapping[str, Sequence[str]]:
        """Names by file, as they lie there."""
        return {file: tuple(header.tensors) for file, header in self.checkpoint.shards.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name."""
        return self.checkpoint.read(name)

    def blocks(
        self, name: str, read_next: Callable[[memoryview], None] | None = None
    ) -> Iterator[torch.Tensor]:
        """The tensor of that name in pieces; `read_next` is not needed."""
        return self.checkpoint.blocks(name)

    def reference_blocks(self, name: str) -> Iterator[torch.Tensor]:
        """As `blocks`: there is nothing to compute."""
        return self.checkpoint.blocks(name)

    @property
    def saw_change(self) -> bool:
        """See `MergeExecution.saw_change`: nothing is to change."""
        return True

    def finish(self, elsewhere: Collection[str] = (), *, saw_change: bool = True) -> None:
        """All tensors have been taken; none was merged."""
