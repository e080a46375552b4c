"""Plain LoRA on a linear layer, row block by row block: PEFT's bits with little memory.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, pairwise, product
from typing import Literal, TypeAlias, TypeVar

import torch
from attrs import frozen
from peft.tuners.lora import Linear

from ..errors import UnchangedTargetsError, shown
from ..files.reading import opened, read_into
from ..files.safetensors import Checkpoint, TensorInfo, tensor_bytes, torch_dtype
from .conversion import Place
from .experts import matrix_factors, merge_in_pairs, pairs_make_up, random_factors, stack_of
from .layers import Target

_BLOCK = 1 << 19  # elements: two megabytes in float32, so that a block stays in the cache
_MIN_ROWS = 64  # products of fewer rows take another path in the math library, with other bits

T = TypeVar("T")
Pairs: TypeAlias = Iterator[tuple[torch.Tensor, torch.Tensor]]


class Merging:
    """Merges layers, from any thread; those of a shape that blocks were seen to suit, by blocks.

    Whether blocks give PEFT's bits depends on shapes and on the machine's math library, not on the
    values: for each shape the whole product of two random factors is compared with its blocks. It
    is computed, as is all that PEFT computes, in a thread of its own, because the bits may also
    depend on how many threads torch uses: there it is the number of the thread that planned the
    merge.

    `compared`: how many elements the largest product has that was so computed of stacked experts.
    """

    def __init__(self) -> None:
        self._peft = ThreadPoolExecutor(1, "peft", _use_threads, (torch.get_num_threads(),))
        self._aside = ThreadPoolExecutor(1, "blocks")
        self._here = threading.local()
        self._same_bits: dict[object, bool] = {}
        self.compared = 0
        self._deciding = threading.Lock()

    def merge(
        self, target: Target, values: Mapping[str, torch.Tensor], first: int
    ) -> Mapping[str, torch.Tensor]:
        """See `Target.merge`; of stacked experts, some, whose first is `first`, if pairs suit."""
        if not self._same_bits.get(stack_of(target)):
            return self._peft.submit(target.merge, values).result()
        factors = self._factors_of_experts(target)
        for weight in values.values():
            self._peft.submit(merge_in_pairs, target, weight, factors, first).result()
        return values

    def _factors_of_experts(self, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """Read once while a thread merges experts of the same two stacks, as of one layer.

        Raises:
            UnchangedTargetsError: no expert is changed.
        """
        kept: dict[str, tuple[torch.Tensor, torch.Tensor]]
        kept = self._here.__dict__.setdefault("factors", {})
        if target.place not in kept:
            up, down = target.factors()
            if not (up.any() and down.any()):
                raise UnchangedTargetsError(
                    f"the adapter leaves every expert of {shown(target.path)} as it is in the base"
                )
            if len(kept) == 2:
                kept.pop(next(iter(kept)))
            kept[target.place] = up, down
        return kept[target.place]

    def pieces(self, target: Target, rows: int) -> Literal["blocks", "pairs"] | None:
        """Which pieces of stacked experts give PEFT's bits: blocks of rows, else two experts.

        To be asked before their values are there: it takes as much memory as all in float32.
        `rows`: of each matrix in the files that the stack is made of; 0 where it is no such stack.
        """
        stack = stack_of(target)
        if stack is None:
            return None
        with self._deciding:
            if (stack, rows) not in self._same_bits:
                factors = random_factors(target)
                of_all = partial(target.delta_of_experts, *factors, 0, target.experts)
                whole = self._peft.submit(of_all, torch.float32).result()
                self.compared = max(self.compared, whole.numel())
                pairs = self._peft.submit(pairs_make_up, target, factors, whole).result()
                blocks = pairs and rows > 0 and self._make_up(target, factors, rows, whole)
                self._same_bits |= {stack: pairs, (stack, rows): blocks}
            if self._same_bits[stack, rows]:
                return "blocks"
            return "pairs" if self._same_bits[stack] else None

    def _make_up(
        self,
        target: Target,
        factors: tuple[torch.Tensor, torch.Tensor],
        rows: int,
        whole: torch.Tensor,
    ) -> bool:
        """Whether the blocks of all matrices of so many rows have the bits of the whole stack."""
        places = product(range(len(whole)), range(0, len(whole[0]), rows))
        return all(
            _Factors(*matrix_factors(target, factors, place, rows), _scaling(target)).make_up(
                whole[place[0]][place[1] :][:rows], self._workspace()
            )
            for place in places
        )

    def suits_blocks(self, target: Target) -> bool:
        """Whether it is a plain LoRA's layer, of a shape for which blocks give PEFT's bits."""
        shapes = _shapes_of(target)
        return shapes is not None and self._suits(*shapes)

    def by_blocks(
        self, target: Target, base: Checkpoint, info: TensorInfo, dtype: torch.dtype
    ) -> Pairs | None:
        """Rows of the layer's weight (out, in), before and after the merge; None if it takes PEFT.

        Both in `dtype`, rounded once. The former are good until the next pair is asked for, the
        latter until the one after that. The calling thread has one thread of torch's from then on.
        """
        if not self.suits_blocks(target):
            return None
        factors, workspace = _factors_of(target), self._workspace()

        def add(before: torch.Tensor, after: torch.Tensor, start: int, end: int) -> None:
            total = workspace.block("total", before.shape, torch.float32).copy_(before)
            after.copy_(total.add_(factors.product(start, end, workspace)))

        return self._pairs(base, info, dtype, factors.bounds(), add)

    def expert_by_blocks(
        self, target: Target, base: Checkpoint, info: TensorInfo, dtype: torch.dtype, place: Place
    ) -> Pairs:
        """As `by_blocks`, of a matrix of a stack that those suit; rounded twice, as PEFT does."""
        every, workspace = self._factors_of_experts(target), self._workspace()
        own = matrix_factors(target, every, place, info.shape[0])
        factors = _Factors(*own, _scaling(target))

        def add(before: torch.Tensor, after: torch.Tensor, start: int, end: int) -> None:
            rounded = workspace.block("rounded", before.shape, dtype)
            torch.add(before, rounded.copy_(factors.product(start, end, workspace)), out=after)

        return self._pairs(base, info, dtype, factors.bounds(), add)

    def by_peft(
        self, target: Target, base: Checkpoint, info: TensorInfo, dtype: torch.dtype
    ) -> Pairs | None:
        """As `by_blocks`, with PEFT's own product added as PEFT adds it; None for other layers."""
        if _shapes_of(target) is None:
            return None
        factors = _factors_of(target)
        whole = self._peft.submit(target.delta).result()

        def add(before: torch.Tensor, after: torch.Tensor, start: int, end: int) -> None:
            after.copy_(before)
            after += whole[start:end]

        return self._pairs(base, info, dtype, factors.bounds(), add)

    def _suits(self, up: torch.Size, down: torch.Size) -> bool:
        with self._deciding:
            if (up, down) not in self._same_bits:
                drawn = torch.Generator().manual_seed(0)
                one, other = (torch.randn(size, generator=drawn) for size in (up, down))
                factors = _Factors(one, other, 1.0)
                whole = self._peft.submit(torch.mm, factors.up, factors.down).result()
                self._same_bits[up, down] = factors.make_up(whole, self._workspace())
        return self._same_bits[up, down]

    def _pairs(
        self,
        base: Checkpoint,
        info: TensorInfo,
        dtype: torch.dtype,
        bounds: Iterable[tuple[int, int]],
        add: Callable[[torch.Tensor, torch.Tensor, int, int], None],
    ) -> Pairs:
        workspace, stored, into = self._workspace(), torch_dtype(info.dtype), info.shape[1]
        with opened(base.directory / info.file) as fd:
            for start, end in bounds:
                rows = workspace.block("rows", (end - start, into), stored)
                at = info.start + start * into * stored.itemsize
                read_into(tensor_bytes(rows), fd, at, info.file)
                before, after = rows.to(dtype), workspace.result(rows.shape, dtype)
                add(before, after, start, end)
                yield before, after

    def _workspace(self) -> _Workspace:
        if not hasattr(self._here, "workspace"):
            self._here.workspace = _Workspace()
        workspace: _Workspace = self._here.workspace
        return workspace

    def aside(self, work: Callable[[], T]) -> T:
        """What `work` returns, which may merge by blocks; the calling thread stays as it is."""
        return self._aside.submit(work).result()


def _use_threads(count: int) -> None:
    torch.get_num_threads()  # else torch sets this thread's number itself, at its first work
    torch.set_num_threads(count)


class _Workspace:
    """Memory of one thread, in which torch starts no others from then on.

    Blocks are too small to share out: threads would wait for one another at every step.
    """

    def __init__(self) -> None:
        _use_threads(1)
        self._memory: dict[str, torch.Tensor] = {}
        self._turns = cycle(("even", "odd"))

    def block(self, use: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for one use at a time."""
        size = math.prod(shape) * dtype.itemsize
        if use not in self._memory or self._memory[use].numel() < size:
            self._memory[use] = torch.empty(size, dtype=torch.uint8)
        return self._memory[use][:size].view(dtype).view(*shape)

    def result(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory that is used again at the next call but one."""
        return self.block(next(self._turns), shape, dtype)


@frozen
class _Factors:
    """`up` (out, rank), `down` (rank, in), both float32."""

    up: torch.Tensor
    down: torch.Tensor
    scaling: float

    def bounds(self) -> Iterator[tuple[int, int]]:
        """First row and end, exclusive, of each block."""
        out, into = len(self.up), self.down.shape[1]
        count = max(1, out // max(_MIN_ROWS, _BLOCK // into))
        return pairwise(out * i // count for i in range(count + 1))

    def product(self, start: int, end: int, workspace: _Workspace) -> torch.Tensor:
        """Rows of up @ down * scaling."""
        shape = (end - start, self.down.shape[1])
        product = workspace.block("product", shape, torch.float32)
        return torch.mm(self.up[start:end], self.down, out=product).mul_(self.scaling)

    def make_up(self, whole: torch.Tensor, workspace: _Workspace) -> bool:
        """Whether the blocks of the product have the bits of the whole one."""
        return all(
            torch.equal(
                self.product(start, end, workspace).view(torch.int32),
                whole[start:end].view(torch.int32),
            )
            for start, end in self.bounds()
        )


def _shapes_of(target: Target) -> tuple[torch.Size, torch.Size] | None:
    """Those of the factors of a layer for which PEFT adds their product and no more, else None."""
    layer = target.module
    if type(layer) is not Linear or len(layer.active_adapters) != 1 or layer.disable_adapters:
        return None
    (name,) = layer.active_adapters
    if name in layer.lora_variant or layer.fan_in_fan_out or layer.lora_bias[name]:
        return None
    up: torch.Tensor = layer.lora_B[name].get_parameter("weight")
    down: torch.Tensor = layer.lora_A[name].get_parameter("weight")
    return (up.shape, down.shape) if up.dtype == down.dtype == torch.float32 else None


def _factors_of(target: Target) -> _Factors:
    return _Factors(*target.factors(), _scaling(target))


def _scaling(target: Target) -> float:
    (name,) = target.module.active_adapters
    scaling: float = target.module.scaling[name]
    return scaling
