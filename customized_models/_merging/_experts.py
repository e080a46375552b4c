"""Experts that transformers stacks into one parameter, merged two at a time: with less memory.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

import torch

from ._target import Target


def stack_of(target: Target) -> tuple[object, ...] | None:
    """What it depends on whether experts may be merged two at a time; None if they never may."""
    if target.experts < 4 or target.own:
        return None
    return target.experts, *_shapes(target), target.module.in_features


def pairs_make_up(target: Target) -> bool:
    """Whether what PEFT adds to two experts has the bits of what it adds to them among all."""
    drawn = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=drawn) for shape in _shapes(target))
    whole = target.delta_of_experts(up, down, 0, target.experts, torch.float32)
    pairs = _pairs(target.experts)
    parts = (target.delta_of_experts(up, down, *pair, torch.float32) for pair in pairs)
    return all(torch.equal(part, whole[a:b]) for part, (a, b) in zip(parts, pairs, strict=True))


@torch.no_grad()
def merge_in_pairs(target: Target, weight: torch.Tensor) -> None:
    """Add to `weight` (experts, ...) what PEFT adds, as PEFT adds it."""
    up, down = target.factors()
    for start, end in _pairs(target.experts):
        weight[start:end] += target.delta_of_experts(up, down, start, end, weight.dtype)


def _pairs(experts: int) -> list[tuple[int, int]]:
    """The first and the end, exclusive, of each pair; the last are three if their number is odd."""
    starts = range(0, experts - 1, 2)
    return [(start, start + 2 if start + 3 != experts else experts) for start in starts]


def _shapes(target: Target) -> tuple[torch.Size, torch.Size]:
    (name,) = target.module.active_adapters
    up, down = (getattr(target.module, part)[name].weight for part in ("lora_B", "lora_A"))
    return up.shape, down.shape
