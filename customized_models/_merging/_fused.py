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
from typing import TypeAlias, TypeVar

import torch
from attrs import frozen
from peft.tuners.lora import Linear

from .._checkpoints import Checkpoint, TensorInfo, opened, read_into, tensor_bytes, torch_dtype
from .._errors import UnchangedTargetsError, shown
from .._writer import files_at_once
from ._experts import matrix_factors, merge_in_pairs, pairs_make_up, random_factors, stack_of
from ._target import Target

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
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._taking = threading.Lock()
        self._deciding = threading.Lock()

    def merge(
        self, target: Target, values: Mapping[str, torch.Tensor], first: int = 0
    ) -> Mapping[str, torch.Tensor]:
        """See `Target.merge`; of stacked experts, some, whose first is `first`, if pairs suit."""
        return self._peft.submit(self._merged, target, values, first).result()

    def _merged(
        self, target: Target, values: Mapping[str, torch.Tensor], first: int
    ) -> Mapping[str, torch.Tensor]:
        if not self._same_bits.get(stack_of(target)):
            return target.merge(values)
        for weight in values.values():
            merge_in_pairs(target, weight, self._factors_of_experts(target), first)
        return values

    def _factors_of_experts(self, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """Read once for all of a layer's experts, if those are merged at about the same time.

        Raises:
            UnchangedTargetsError: no expert is changed.
        """
        with self._taking:
            factors = self._factors.pop(target.place, None) or target.factors()
            if not all(factor.any() for factor in factors):
                raise UnchangedTargetsError(
                    f"the adapter leaves every expert of {shown(target.path)} as it is in the base"
                )
            self._factors[target.place] = factors  # the last of all
            while len(self._factors) > 2 * files_at_once():  # a layer may have two stacks
                self._factors.pop(next(iter(self._factors)))
            return factors

    def suits_pairs(self, target: Target, rows: int = 0) -> bool:
        """Whether it stacks experts that can be merged two at a time: with the same bits.

        To be asked before their values are there: it takes as much memory as all in float32.
        `rows`: of matrices that the stack is made of, where blocks of them might suit as well.
        """
        stack = stack_of(target)
        if stack is None:
            return False
        with self._deciding:
            if (stack, rows) not in self._same_bits:
                factors = random_factors(target)
                of_all = partial(target.delta_of_experts, *factors, 0, target.experts)
                whole = self._peft.submit(of_all, torch.float32).result()
                self.compared = max(self.compared, whole.numel())
                pairs = self._peft.submit(pairs_make_up, target, factors, whole).result()
                blocks = pairs and rows > 0 and self._make_up(target, factors, rows, whole)
                self._same_bits |= {stack: pairs, (stack, rows): blocks}
        return self._same_bits[stack]

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

    def suits_blocks(self, target: Target, rows: int = 0) -> bool:
        """Whether it is a plain LoRA's layer, of a shape for which blocks give PEFT's bits.

        `rows`: as for `suits_pairs`, which was asked before.
        """
        if (stack := stack_of(target)) is not None:
            return self._same_bits.get((stack, rows), False)
        shapes = _shapes_of(target)
        return shapes is not None and self._suits(*shapes)

    def by_blocks(
        self,
        target: Target,
        base: Checkpoint,
        info: TensorInfo,
        dtype: torch.dtype,
        place: tuple[int, int] | None,
    ) -> Pairs | None:
        """Rows of the layer's weight (out, in), before and after the merge; None if it takes PEFT.

        `place`: of the tensor in a stack of experts, which one and its first row. Both in `dtype`,
        rounded as PEFT does. The former are good until the next pair is asked for, the latter until
        the one after that. The calling thread has one thread of torch's from then on.
        """
        if not self.suits_blocks(target, info.shape[0] if place else 0):
            return None
        workspace = self._workspace()

        def add(before: torch.Tensor, after: torch.Tensor, start: int, end: int) -> None:
            total = workspace.block("total", before.shape, torch.float32).copy_(before)
            after.copy_(total.add_(factors.product(start, end, workspace)))

        def add_rounded(before: torch.Tensor, after: torch.Tensor, start: int, end: int) -> None:
            rounded = workspace.block("total", before.shape, dtype)
            torch.add(before, rounded.copy_(factors.product(start, end, workspace)), out=after)

        if place is None:
            factors = _factors_of(target)
            return self._pairs(base, info, dtype, factors.bounds(), add)
        every = self._factors_of_experts(target)
        own = matrix_factors(target, every, place, info.shape[0])
        factors = _Factors(*own, _scaling(target))
        return self._pairs(base, info, dtype, factors.bounds(), add_rounded)

    def by_peft(
        self,
        target: Target,
        base: Checkpoint,
        info: TensorInfo,
        dtype: torch.dtype,
        place: tuple[int, int] | None,
    ) -> Pairs | None:
        """As `by_blocks`, with PEFT's own product added as PEFT adds it; None for other layers."""
        if place or _shapes_of(target) is None:
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
