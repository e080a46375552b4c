"""Experts that transformers stacks into one parameter, merged one or two at a time.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

import torch

from .conversion import Place
from .layers import Target


def stack_of(target: Target) -> tuple[object, ...] | None:
    """What it depends on whether experts may be merged two at a time; None if they never may."""
    if target.experts < 4 or target.own:
        return None
    up, down = _factors(target)
    if not up.dtype == down.dtype == torch.float32:
        return None
    return target.experts, up.shape, down.shape, target.module.in_features


def random_factors(target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the shapes that those of all experts have."""
    drawn = torch.Generator().manual_seed(0)
    up, down = (torch.randn(one.shape, generator=drawn) for one in _factors(target))
    return up, down


def pairs_make_up(
    target: Target, factors: tuple[torch.Tensor, torch.Tensor], whole: torch.Tensor
) -> bool:
    """Whether what PEFT adds to two experts has the bits of what it adds to them among all."""
    pairs = _pairs(target.experts)
    parts = (target.delta_of_experts(*factors, *pair, torch.float32) for pair in pairs)
    return all(torch.equal(part, whole[a:b]) for part, (a, b) in zip(parts, pairs, strict=True))


def matrix_factors(
    target: Target,
    factors: tuple[torch.Tensor, torch.Tensor],
    place: Place,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices whose product is what PEFT adds to so many rows of one expert, once scaled.

    That holds where an expert is (out, in).
    """
    (expert, row), (up, down) = place, factors
    up = up.reshape(len(up), -1, target.experts)[row : row + rows, :, expert]
    return up.contiguous(), down.reshape(target.experts, -1, down.shape[1])[expert]


def groups_of(target: Target, elements: int) -> list[tuple[int, int]]:
    """The first and the end, exclusive, of groups of pairs: `elements` of the weight, or one pair.

    `elements` is what one expert has, times the experts of the group.
    """
    up, down = _factors(target)
    each = len(up) * down.shape[1]
    pairs, groups = _pairs(target.experts), list[tuple[int, int]]()
    for start, end in pairs:
        first = groups[-1][0] if groups else start
        if groups and (end - first) * each <= elements:
            groups[-1] = first, end
        else:
            groups.append((start, end))
    return groups


@torch.no_grad()
def merge_in_pairs(
    target: Target, weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], first: int
) -> None:
    """Add to `weight` (experts, ...), whose first is expert `first`, what PEFT adds, as it does.

    `factors`: those of all experts.
    """
    for start, end in _pairs(target.experts):
        if first <= start < first + len(weight):
            rows = weight[start - first : end - first]
            rows += target.delta_of_experts(*factors, start, end, weight.dtype)


def _pairs(experts: int) -> list[tuple[int, int]]:
    """The first and the end, exclusive, of each pair; the last are three if their number is odd."""
    starts = range(0, experts - 1, 2)
    return [(start, start + 2 if start + 3 != experts else experts) for start in starts]


def _factors(target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Which may have no values: up (out, rank x experts), down (experts x rank, in)."""
    (name,) = target.module.active_adapters
    up, down = (getattr(target.module, part)[name].weight for part in ("lora_B", "lora_A"))
    return up, down
