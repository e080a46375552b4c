"""Experts that transformers stacks into one parameter, merged a few at a time.

PEFT computes the change of all experts of a layer in one batched product. In float32 that takes
twice as much memory as the experts in 16 bits. Where parts of the product have the same bits, the
parts are merged instead: blocks of rows if the checkpoint has the matrices of the experts as
tensors of their own, else two experts at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Literal, TypeAlias

import torch
from attrs import evolve

from ...files.safetensors import torch_dtype
from ..conversion import StackPosition
from ..groups import TensorGroup
from ..layers import AdaptedLayer
from .outcome import Outcome
from .peft_module import ComputedTogether, Recomputed, Tensors, merge_group, stored_infos
from .protocol import Cost, MergeContext, Reading, ReadNext
from .rows import COMPARED, LoraFactors, MergedRows

GROUP_ELEMENTS = 1 << 24
"""Of the experts that are merged at once in pairs, one pair at least: 64 megabytes in float32."""

_MIN_EXPERTS = 4  # of fewer, two are no small part

Chunking: TypeAlias = Literal["blocks", "pairs"] | None
"""Which parts of a stack have PEFT's bits: blocks of rows and pairs, pairs alone, or none."""

Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Up (out, rank x experts) and down (experts x rank, in), of all experts of a stack."""

Positions: TypeAlias = Mapping[str, StackPosition]
"""Where each tensor of the checkpoint is in its stack."""


def for_stack(group: TensorGroup, context: MergeContext) -> ExpertBlocks | ExpertPairs | None:
    """The strategy for a stack of experts; None if it is not one, or only the whole suits."""
    if len(group.layers) != 1 or _shapes(group.layers[0].adapted) is None:
        return None
    conversions, positions = context.skeleton.conversions, None
    if len(group.conversions) == 1:
        positions = conversions.stack_positions(group.conversions[0])
    rows = group.infos[0].shape[0] if positions else 0
    chunking = chunking_for(group.layers[0].adapted, rows, context)
    if chunking == "blocks" and positions is not None:
        return ExpertBlocks(group, positions, context)
    return ExpertPairs(group, positions, context) if chunking else None


class ExpertBlocks:
    """Merges each matrix by itself, a block of rows at a time."""

    name = "expert_blocks"

    def __init__(self, group: TensorGroup, positions: Positions, context: MergeContext) -> None:
        (planned,) = group.layers
        self._layer, self._context, self._positions = planned.adapted, context, positions
        self._outcome = Outcome(positions, context.changed, may_stay=planned.may_stay)
        self._pairs = ExpertPairs(group, positions, context)
        self._verified = False

    @property
    def cost(self) -> Cost:
        """Blocks only."""
        return Cost(0)

    def blocks(self, tensor: str, read_next: ReadNext) -> Iterator[torch.Tensor]:
        """See `Strategy`. The product is rounded before it is added, and the sum once more.

        Source: `peft/tuners/lora/layer.py`, `ParamWrapper.get_delta_weight` and `merge`.
        """
        return self._rows(tensor).blocks(read_next)

    def check(self, reading: Reading) -> None:
        """See `Strategy`."""
        for tensor in self._positions:
            rows = self._rows(tensor)
            with reading(tensor) as read_next:
                rows.check(read_next)

    def _rows(self, tensor: str) -> MergedRows:
        if not self._verified:
            self._pairs.verify_positions()
            self._verified = True
        stored = self._context.skeleton.base.infos[tensor]
        dtype, workspace = self._pairs.dtype, self._context.threads.workspace()
        every = _recent_factors(self._layer, self._context)
        factors = matrix_factors(self._layer, every, self._positions[tensor], stored.shape[0])

        def add(before: torch.Tensor, after: torch.Tensor, start: int, end: int) -> None:
            rounded = workspace.block("rounded", before.shape, dtype)
            torch.add(before, rounded.copy_(factors.product(start, end, workspace)), out=after)

        return MergedRows(stored, dtype, factors, add, workspace, self._outcome)

    @property
    def reference(self) -> Recomputed:
        """PEFT's own product of two experts at a time."""
        return self._pairs.reference


class ExpertPairs:
    """Merges two experts at a time by PEFT's own product.

    Attributes:
        dtype: Of the parameter.
    """

    name = "expert_pairs"

    def __init__(
        self, group: TensorGroup, positions: Positions | None, context: MergeContext
    ) -> None:
        """`positions`: None if the tensors of `group` are not matrices of the stack."""
        (planned,) = group.layers
        self._layer, self._context, self._positions = planned.adapted, context, positions
        self._parts = _split(group, positions, context) if positions else {0: group}
        names = [info.name for info in group.infos]
        self._outcome = Outcome(names, context.changed, may_stay=planned.may_stay)
        self._first_of = {i.name: first for first, p in self._parts.items() for i in p.infos}
        self._merged = {
            first: ComputedTogether((i.name for i in p.infos), partial(self._merge, first), context)
            for first, p in self._parts.items()
        }
        self.dtype = torch_dtype(group.infos[0].dtype)

    @property
    def cost(self) -> Cost:
        """The largest part."""
        parts = self._parts.values()
        costs = (Cost.of_whole(part.infos, stored_infos(part, self._context)) for part in parts)
        largest = max(costs, key=lambda cost: cost.working)
        # Parts are so small that some may wait for every file that is written side by side.
        return evolve(largest, together=largest.together and self._positions is None)

    def blocks(self, tensor: str, read_next: ReadNext) -> Iterator[torch.Tensor]:
        """See `Strategy`."""
        yield self._merged[self._first_of[tensor]].take(tensor)

    def _merge(self, first: int) -> Tensors:
        """The tensors of the part whose first expert is `first`."""
        factors = _recent_factors(self._layer, self._context)
        merge = partial(_merge_in_pairs, factors, first)
        return merge_group(self._parts[first], self._context, merge, self._outcome)

    def check(self, reading: Reading) -> None:
        """See `Strategy`: all of it is merged."""
        for first in self._parts:
            self._merge(first)

    def verify_positions(self) -> None:
        """See `Conversions.verify_positions`."""
        first, part = next(iter(self._parts.items()))
        inside = {i.name: (self._positions or {})[i.name] for i in part.infos}
        relative = {name: (expert - first, row) for name, (expert, row) in inside.items()}
        with self._context.threads.one_group:
            conversions = self._context.skeleton.conversions
            conversions.verify_positions(part.conversions[0], relative)

    @property
    def reference(self) -> Recomputed:
        """The same once more."""
        return Recomputed(self.name, self.cost, lambda name: self._merge(self._first_of[name]))


def _split(
    group: TensorGroup, positions: Positions, context: MergeContext
) -> dict[int, TensorGroup]:
    """Groups of pairs of experts, by the first expert of each."""
    conversions, parts = context.skeleton.conversions, {}
    by_position = {position: name for name, position in positions.items()}
    for start, end in _ranges(group.layers[0].adapted):
        inside = {name: at for name, at in positions.items() if start <= at[0] < end}
        chosen = {by_position[expert - start, row]: n for n, (expert, row) in inside.items()}
        conversion = conversions.subset(group.conversions[0], chosen)
        infos = tuple(info for info in group.infos if info.name in inside)
        parts[start] = TensorGroup(group.layers, (conversion,), infos)
    return parts


def _ranges(layer: AdaptedLayer) -> list[tuple[int, int]]:
    """The first expert and the end, exclusive, of parts of about GROUP_ELEMENTS."""
    up, down = _parameters(layer)
    each = len(up) * down.shape[1]
    ranges = list[tuple[int, int]]()
    for start, end in _pairs(layer.experts):
        first = ranges[-1][0] if ranges else start
        if ranges and (end - first) * each <= GROUP_ELEMENTS:
            ranges[-1] = first, end
        else:
            ranges.append((start, end))
    return ranges


def _pairs(experts: int) -> list[tuple[int, int]]:
    """The first and the end, exclusive, of each pair; the last are three of an odd number."""
    starts = range(0, experts - 1, 2)
    return [(start, start + 2 if start + 3 != experts else experts) for start in starts]


def _merge_in_pairs(
    factors: Factors, first: int, layer: AdaptedLayer, values: Tensors
) -> Mapping[str, torch.Tensor]:
    """Add what PEFT adds to the experts of a part, whose first is `first`, as PEFT adds it."""
    with torch.no_grad():
        for weight in values.values():
            for start, end in _pairs(layer.experts):
                if first <= start < first + len(weight):
                    rows = weight[start - first : end - first]
                    rows += layer.delta_of_experts(*factors, start, end, weight.dtype)
    return values


def matrix_factors(
    layer: AdaptedLayer, factors: Factors, position: StackPosition, rows: int
) -> LoraFactors:
    """The factors of what PEFT adds to some rows of one expert, (out, in).

    lora_B's columns are ordered (rank, expert), lora_A's rows (expert, rank).

    Source: `peft/tuners/lora/layer.py`, `ParamWrapper.get_delta_weight`.

    Args:
        layer: The stack's.
        factors: Of all experts.
        position: The expert, and the first of its rows.
        rows: How many.
    """
    (expert, row), (up, down) = position, factors
    up = up.reshape(len(up), -1, layer.experts)[row : row + rows, :, expert]
    down = down.reshape(layer.experts, -1, down.shape[1])[expert]
    return LoraFactors(up.contiguous(), down, layer.scaling)


# Which parts have PEFT's bits


def chunking_for(layer: AdaptedLayer, rows: int, context: MergeContext) -> Chunking:
    """Which parts of a stack give PEFT's bits.

    This depends on shapes and on the machine's math library, not on values. So for each shape the
    product of random factors is computed for all experts at once, and compared with its parts. That
    takes as much memory as all experts in float32, so it is done before any values are read.

    Args:
        layer: A stack's.
        rows: Of each matrix in the checkpoint; 0 if it does not have them singly.
        context: Of the merge.
    """
    shapes = _shapes(layer)
    if shapes is None:
        return None
    decide = partial(_find_chunking, layer, rows, context)
    return context.decisions.once(
        (*shapes, rows), partial(context.threads.run_in_block_thread, decide)
    )


def _find_chunking(layer: AdaptedLayer, rows: int, context: MergeContext) -> Chunking:
    drawn, run_peft = torch.Generator().manual_seed(0), context.threads.run_peft
    compared, blocks = 0, bool(rows)
    while compared < COMPARED:
        up, down = (torch.randn(one.shape, generator=drawn) for one in _parameters(layer))
        of_all = partial(layer.delta_of_experts, up, down, 0, layer.experts, torch.float32)
        whole = run_peft(of_all)
        context.decisions.saw_product(whole.numel())
        if not run_peft(pairs_bit_identical, layer, (up, down), whole):
            return None
        positions = product(range(len(whole)), range(0, len(whole[0]), rows)) if blocks else ()
        blocks = blocks and all(
            matrix_factors(layer, (up, down), (expert, row), rows).blocks_bit_identical(
                whole[expert][row:][:rows], context.threads.workspace()
            )
            for expert, row in positions
        )
        compared += whole.numel() or COMPARED
    return "blocks" if blocks else "pairs"


def pairs_bit_identical(layer: AdaptedLayer, factors: Factors, whole: torch.Tensor) -> bool:
    """Whether what PEFT adds to two experts has the bits of what it adds to them among all."""
    pairs = _pairs(layer.experts)
    parts = (layer.delta_of_experts(*factors, *pair, torch.float32) for pair in pairs)
    return all(torch.equal(part, whole[a:b]) for part, (a, b) in zip(parts, pairs, strict=True))


def _shapes(layer: AdaptedLayer) -> tuple[object, ...] | None:
    """What the bits depend on; None if it is not a stack whose experts may be merged singly."""
    if layer.experts < _MIN_EXPERTS or layer.trained_values:
        return None
    up, down = _parameters(layer)
    if not up.dtype == down.dtype == torch.float32:
        return None
    return layer.experts, up.shape, down.shape, layer.module.in_features


def _parameters(layer: AdaptedLayer) -> Factors:
    """Of the factors' shapes and dtypes; they may have no values."""
    (name,) = layer.module.active_adapters
    up, down = (getattr(layer.module, part)[name].weight for part in ("lora_B", "lora_A"))
    return up, down


def _recent_factors(layer: AdaptedLayer, context: MergeContext) -> Factors:
    """The factors of all experts, read once while a thread merges two stacks, as of one layer."""
    return context.threads.workspace().recent(layer.wrapper_path, layer.factors)
