"""A LoRA's product and sum in one pass over a block of rows, where Numba is installed.

Whether the product has the bits that PEFT's has depends on the machine's math library, as with
blocks, and is found out in the same way: for each shape, the product of two random factors is
compared with what that library makes of them.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ...kernels import has_numba
from ..threads import Workspace
from .rows import LoraFactors

MOST_RANK = 64
"""Of larger factors most time goes into the product, which math libraries compute faster."""

AddFused = Callable[[torch.Tensor, torch.Tensor, int, int], bool]
"""As `rows.AddRows`; whether all sums are finite: NaN may have other bits than torch gives it."""


def fused_sum(factors: LoraFactors, dtype: torch.dtype) -> AddFused | None:
    """What adds the product of `factors` to rows of that dtype; None if there is none for them."""
    rank, columns = factors.down.shape
    found = kernels()
    if found is None or not 0 < rank <= MOST_RANK or columns % found.LANES:
        return None
    if abs(factors.scaling) > torch.finfo(torch.float32).max:
        return None  # torch says what becomes of it
    merge = {torch.bfloat16: found.merge_bf16, torch.float32: found.merge_fp32}.get(dtype)
    if merge is None:
        return None
    up, down = factors.up.contiguous().numpy(), factors.down.contiguous().numpy()
    scaling = np.float32(factors.scaling)

    def add(before: torch.Tensor, after: torch.Tensor, start: int, end: int) -> bool:
        finite: bool = merge(_bits(before), up[start:end], down, scaling, _bits(after))
        return finite

    return add


def fused_bit_identical(factors: LoraFactors, whole: torch.Tensor, workspace: Workspace) -> bool:
    """Whether a fused sum has the bits of `whole`, their product times their scaling."""
    add = fused_sum(factors, torch.float32)
    return add is not None and all(
        _same_product(add, start, end, whole[start:end], workspace)
        for start, end in factors.bounds()
    )


def _same_product(
    add: AddFused, start: int, end: int, whole: torch.Tensor, workspace: Workspace
) -> bool:
    product = workspace.block("product", whole.shape, torch.float32)
    nothing = workspace.block("total", whole.shape, torch.float32)
    add(nothing.fill_(-0.0), product, start, end)  # no sum is changed by -0, not even that of -0
    return torch.equal(product.view(torch.int32), whole.view(torch.int32))


@cache
def kernels() -> ModuleType | None:
    """What Numba compiles, ready to run; None where it is not installed, or not for this numpy."""
    if not has_numba():
        return None
    try:
        from ...kernels.cache import import_kept, reload_unkept
    except ImportError:  # Numba says so of a numpy that is newer than itself
        return None
    found = import_kept("fused_formulas", __package__ or "")
    try:
        _try(found)
    except OSError:  # the disk of what is kept is full, say
        found = reload_unkept(found)
        _try(found)
    return found


def _try(kernels: ModuleType) -> None:
    """Have both kernels compiled, or taken up from where they are kept."""
    factors = np.zeros((1, 1), np.float32), np.zeros((1, kernels.LANES), np.float32)
    for merge, dtype in ((kernels.merge_bf16, np.uint16), (kernels.merge_fp32, np.float32)):
        rows = np.zeros((1, kernels.LANES), dtype)
        merge(rows, *factors, np.float32(1), np.empty_like(rows))


def _bits(rows: torch.Tensor) -> np.ndarray[Any, Any]:
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
