"""A LoRA's product and its sum with the base in one pass, for Numba: nothing is put down between.

Each number of the product is one chain of fused multiplications and additions over the rank, in
order, as math libraries compute it for the ranks of LoRAs; it is scaled, added and rounded as torch
does it, each step by itself.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import config

from ...kernels.lanes import (
    bits,
    fma,
    from_bits,
    from_half,
    largest,
    loader,
    low_half,
    store,
    where,
    zeros,
)

N = np.int32
LANES = 16  # with four rows at once, eight registers of AVX2, and twice as many are there
COLUMNS = (
    256  # of the lower factor at a time: with a rank of 16, they fill half a first-level cache
)
MAGNITUDE, INFINITY = N(0x7FFFFFFF), N(0x7F800000)

kernel = njit(nogil=True, error_model="numpy", cache=bool(config.CACHE_DIR))
function = njit(nogil=True, error_model="numpy")
load = loader(LANES)


@function
def from_bf16(stored):
    return from_bits(from_half(stored) << N(16))


@function
def to_bf16(total):
    """Rounded to nearest, ties to even; of finite numbers."""
    b = bits(total)
    return low_half((b + N(0x7FFF) + ((b >> N(16)) & N(1))) >> N(16))


@function
def as_it_is(value):
    return value


def merger(read, rounded):
    """A kernel for bases of one dtype.

    `read`: its lanes as float32. `rounded`: float32 as its lanes.
    """

    @function
    def add(base, product, scaling, out, top):
        total = read(load(base)) + product * scaling
        store(out, rounded(total))
        magnitude = bits(total) & MAGNITUDE
        return where(magnitude > top, magnitude, top)

    @kernel
    def merge(base, up, down, scaling, out):
        """Write `base + up @ down * scaling` to `out`; whether all sums are finite.

        `base`, `out`: (rows, columns). `up`: (rows, rank). `down`: (rank, columns). Columns come in
        multiples of `LANES`.
        """
        rank, columns = down.shape
        fours = len(base) // 4 * 4
        zero = zeros(load(down[0]))
        top = bits(zero)
        for left in range(0, columns, COLUMNS):
            right = min(left + COLUMNS, columns)
            for m in range(0, fours, 4):
                for n in range(left, right, LANES):
                    a = b = c = d = zero
                    for k in range(rank):
                        line = load(down[k, n:])
                        a = fma(up[m, k], line, a)
                        b = fma(up[m + 1, k], line, b)
                        c = fma(up[m + 2, k], line, c)
                        d = fma(up[m + 3, k], line, d)
                    top = add(base[m, n:], a, scaling, out[m, n:], top)
                    top = add(base[m + 1, n:], b, scaling, out[m + 1, n:], top)
                    top = add(base[m + 2, n:], c, scaling, out[m + 2, n:], top)
                    top = add(base[m + 3, n:], d, scaling, out[m + 3, n:], top)
            for m in range(fours, len(base)):
                for n in range(left, right, LANES):
                    a = zero
                    for k in range(rank):
                        a = fma(up[m, k], load(down[k, n:]), a)
                    top = add(base[m, n:], a, scaling, out[m, n:], top)
        return largest(top) < INFINITY

    return merge


merge_bf16 = merger(from_bf16, to_bf16)
merge_fp32 = merger(as_it_is, as_it_is)
