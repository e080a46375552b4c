"""Which strategy a group of tensors is merged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..groups import TensorGroup
from .dequantize import Dequantize
from .expert_stack import for_stack
from .lora_blocks import LoraBlocks
from .peft_module import PeftModule
from .protocol import MergeContext, Strategy

STRATEGIES: Sequence[Callable[[TensorGroup, MergeContext], Strategy | None]] = (
    Dequantize.for_group,
    LoraBlocks.for_group,
    for_stack,
    PeftModule,
)
"""In the order in which they are tried: each returns None for groups that it does not suit."""


def choose_strategy(group: TensorGroup, context: MergeContext) -> Strategy:
    """The first of `STRATEGIES` that suits the group; the last one suits every group."""
    return next(found for make in STRATEGIES if (found := make(group, context)) is not None)
