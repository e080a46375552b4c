"""Queries, keys and values in one tensor, taken apart as llama.cpp wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .format import Change

if TYPE_CHECKING:
    import torch


def apart_by_kind(heads: int) -> Change:
    """All queries, all keys, all values, from a query, a key and a value for each head.

    Source: `BloomModel.modify_tensors` in `conversion/bloom.py` of llama.cpp b11434.
    """

    def apply(rows: torch.Tensor) -> torch.Tensor:
        by_head = rows.reshape(heads, 3, -1, *rows.shape[1:])
        return by_head.swapaxes(0, 1).reshape(rows.shape)

    return Change(apply, rows=0)
