"""ggml's quantizers byte for byte: its scalar formulas, with a sub-block in each lane.

Names and order of operations are those of the C, and each operation rounds to float32 by itself.
Where a sub-block depends on no other, 32 or 16 of them are worked on at once, each in the order in
which ggml works on one; a branch becomes a choice by lane.

Source: `ggml/src/ggml-quants.c` of llama.cpp b11434: `quantize_row_q4_K_ref`, `_q5_K_ref`,
`_q6_K_ref`, `_q8_0_ref`, `_q5_0_ref`, `_q5_1_ref`, `make_qkx2_quants`, `make_qx_quants`,
`nearest_int`; and `ggml_compute_fp32_to_fp16` and back in `ggml/src/ggml-impl.h`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import config

from ...kernels.lanes import (
    bit_mask,
    bits,
    first,
    integer,
    largest,
    loader,
    low_byte,
    real,
    store,
    transposer,
    where,
)

F, N, U, B = np.float32, np.int32, np.uint32, np.uint8
LANES = 16  # sub-blocks at once; more do not fit into the registers of AVX2

kernel = njit(nogil=True, error_model="numpy", cache=bool(config.CACHE_DIR))
function = njit(nogil=True, error_model="numpy")
load, load16, load32 = loader(LANES), loader(16), loader(32)
transpose, transpose16 = transposer(LANES, 32), transposer(16, 16)


@function
def fp16_bits(x):
    """A float32 as the bits of a float16, in integer arithmetic: not every processor converts."""
    w = F(x).view(np.uint32)
    bias = max(U((w << U(1)) & U(0xFF000000)), U(0x71000000))
    base = F(abs(x) * F(2.0**112)) * F(2.0**-110) + U((bias >> U(1)) + U(0x07800000)).view(F)
    rounded = F(base).view(np.uint32)
    magnitude = ((rounded >> U(13)) & U(0x7C00)) + (rounded & U(0xFFF))
    return np.uint16(((w & U(0x80000000)) >> U(16)) | magnitude)


@function
def fp16_value(h):
    """The float32 that the bits of a float16 stand for."""
    w = U(U(h) << U(16))
    two_w = U(w + w)
    denormal = U((two_w >> U(17)) | U(126 << 23)).view(F) - F(0.5)
    normal = U((two_w >> U(4)) + U(0xE0 << 23)).view(F) * F(2.0**-112)
    value = denormal if two_w < U(1 << 27) else normal
    return U((w & U(0x80000000)) | F(value).view(np.uint32)).view(F)


@function
def put16(y, at, h):
    """Two bytes, the lower first."""
    y[at], y[at + 1] = h & 255, h >> 8


@function
def nearest_int_of_one(v):
    """To the nearest integer by adding 1.5 * 2^23, which leaves no bits for a fraction."""
    return N((F(v + F(12582912)).view(np.int32) & N(0x7FFFFF)) - N(0x400000))


@function
def nearest_int(v):
    """The same of every lane."""
    return (bits(v + F(12582912)) & N(0x7FFFFF)) - N(0x400000)


@function
def clamp(v, low, high):
    """At least `low`, at most `high`."""
    v = where(v > N(low), v, N(low))
    return where(v < N(high), v, N(high))


# Q4_K and Q5_K: 8 sub-blocks of 32, each with a scale and a minimum of 6 bits ---------------------


@function
def make_qkx2_quants(x, weights, levels, nmax, rmin, nstep):
    """Scale and minimum of each sub-block, one in each lane: the best of `nstep` + 2 tries.

    Returns them, and what makes the levels: `nearest_int(best_iscale * (x - best_low))`.
    """
    low = high = load(x[0])
    sum_w = load(weights[0])
    sum_x = sum_w * low
    zero = low * F(0)
    for i in range(1, 32):
        v, w = load(x[i]), load(weights[i])
        low = where(v < low, v, low)
        high = where(v > high, v, high)
        sum_w += w
        sum_x += w * v
    low = where(low > F(0), F(0), low)
    flat = high == low  # ggml returns scale 0 here
    iscale = where(flat, F(0), F(nmax) / (high - low))
    scale = where(flat, F(0), F(1) / iscale)
    best_error = zero
    for i in range(32):
        v, w = load(x[i]), load(weights[i])
        level = real(clamp(nearest_int(iscale * (v - low)), 0, nmax))
        difference = scale * level + low - v
        best_error += w * (difference * difference)
    best_error = where(flat, F(-1), best_error)  # so that no error is less
    best_iscale, best_low = iscale, low

    for step in range(nstep + 1):
        iscale = (F(rmin) + F(0.1) * F(step) + F(nmax)) / (high - low)
        sum_l = sum_l2 = sum_xl = error = zero
        for i in range(32):
            v = load(x[i])
            level = real(clamp(nearest_int(iscale * (v - low)), 0, nmax))
            store(levels[i], level)
            wl = load(weights[i]) * level
            sum_l += wl
            sum_l2 += wl * level
            sum_xl += wl * v
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = this_low > F(0)
        this_scale = where(positive, sum_xl / sum_l2, this_scale)
        this_low = where(positive, F(0), this_low)
        for i in range(32):
            difference = this_scale * load(levels[i]) + this_low - load(x[i])
            error += load(weights[i]) * (difference * difference)
        better = (determinant > F(0)) & (error < best_error)
        best_error = where(better, error, best_error)
        best_iscale = where(better, iscale, best_iscale)
        best_low = where(better, low, best_low)
        scale, low = where(better, this_scale, scale), where(better, this_low, low)
    return scale, -low, best_iscale, best_low


@function
def put_scales(y, scales, mins, d16, dmin16, inv_scale, inv_min, ds, dms):
    """The 6 bits of each scale and minimum, and what they are worth: `ds`, `dms`."""
    for j in range(8):
        ls = min(B(nearest_int_of_one(inv_scale * scales[j])), B(63))
        lm = min(B(nearest_int_of_one(inv_min * mins[j])), B(63))
        if j < 4:
            y[4 + j] = ls
            y[8 + j] = lm
        else:
            y[8 + j] = (ls & 15) | ((lm & 15) << 4)
            y[j] |= (ls >> 4) << 6
            y[4 + j] |= (lm >> 4) << 6
        ds[j], dms[j] = fp16_value(d16) * F(ls), fp16_value(dmin16) * F(lm)


@function
def q45_k(rows, out, nmax, rmin, nstep):
    """`rows` (blocks, 8, 32), `out` (blocks, bytes); the blocks fill all lanes, over and over."""
    x, weights = np.empty((32, LANES), F), np.empty((32, LANES), F)
    levels, found = np.empty((32, LANES), F), np.empty((4, LANES), F)
    q, ds, dms = np.empty((8, 32), B), np.empty(8, F), np.empty(8, F)
    flat_rows, flat_x = rows.reshape(-1), x.reshape(-1)
    for start in range(0, len(rows), LANES // 8):
        for i in range(0, 32, LANES):
            transpose(flat_rows[start * 256 + i :], flat_x[i * LANES :])
        v = load(x[0])
        sum_x2 = v * F(0)
        for i in range(32):
            v = load(x[i])
            sum_x2 += v * v
        av_x = np.sqrt(sum_x2 / F(32))
        for i in range(32):
            store(weights[i], av_x + abs(load(x[i])))

        scale, the_min, best_iscale, best_low = make_qkx2_quants(
            x, weights, levels, nmax, rmin, nstep
        )
        store(found[0], scale)
        store(found[1], the_min)
        store(found[2], best_iscale)
        store(found[3], best_low)

        for b in range(LANES // 8):
            block, y = rows[start + b], out[start + b]
            scales, mins, iscales, lows = found[:, 8 * b : 8 * b + 8]
            max_scale = max_min = F(0)
            for j in range(8):
                max_scale = max(max_scale, scales[j])
                max_min = max(max_min, mins[j])
            inv_scale = F(63) / max_scale if max_scale > F(0) else F(0)
            inv_min = F(63) / max_min if max_min > F(0) else F(0)
            d16, dmin16 = fp16_bits(max_scale / F(63)), fp16_bits(max_min / F(63))
            put16(y, 0, d16)
            put16(y, 2, dmin16)
            put_scales(y, scales, mins, d16, dmin16, inv_scale, inv_min, ds, dms)
            for j in range(8):
                v = load32(block[j])
                # ggml keeps the levels of the best try where the scale has become 0.
                v = (v + dms[j]) / ds[j] if ds[j] != F(0) else iscales[j] * (v - lows[j])
                store(q[j], low_byte(clamp(nearest_int(v), 0, nmax)))
            quants = y[len(y) - 128 :]
            fifth_bits = load32(q[0]) & B(0)
            for j in range(0, 8, 2):
                even, odd = load32(q[j]), load32(q[j + 1])
                store(quants[16 * j :], (even & B(15)) | (odd << B(4)))
                fifth_bits |= ((even >> B(4)) << B(j)) | ((odd >> B(4)) << B(j + 1))
            if nmax > 15:
                store(y[16:], fifth_bits)


@kernel
def q4_k(rows, out):
    """Levels 0 to 15."""
    q45_k(rows, out, 15, -1.0, 20)


@kernel
def q5_k(rows, out):
    """Levels 0 to 31."""
    q45_k(rows, out, 31, -0.5, 15)


# Q6_K: 16 sub-blocks of 16, each with a scale of 8 bits -------------------------------------------


@function
def make_qx_quants(x, w, wx):
    """The scale of each sub-block, one in each lane: the best of 19 tries, by weights x squared.

    Returns it, what makes the levels, `nearest_int(best_iscale * x)`, and where all is about 0.
    """
    amax = top = sum_lx = sum_l2 = load16(x[0]) * F(0)
    for i in range(16):
        v = load16(x[i])
        larger = abs(v) > amax
        amax, top = where(larger, abs(v), amax), where(larger, v, top)
        store(w[i], v * v)
        store(wx[i], v * v * v)
    best_iscale = F(-32) / top
    for i in range(16):
        v = load16(x[i])
        level = real(clamp(nearest_int(best_iscale * v), -32, 31))
        sum_lx += v * v * v * level
        sum_l2 += v * v * level * level
    scale = where(sum_l2 == F(0), F(0), sum_lx / sum_l2)
    best = scale * sum_lx
    for step in range(-9, 10):
        if step:
            iscale = -(F(32) + F(0.1) * F(step)) / top
            sum_lx = sum_l2 = load16(x[0]) * F(0)
            for i in range(16):
                v = load16(x[i])
                level = real(clamp(nearest_int(iscale * v), -32, 31))
                sum_lx += load16(wx[i]) * level
                sum_l2 += load16(w[i]) * level * level
            better = (sum_l2 > F(0)) & (sum_lx * sum_lx > best * sum_l2)
            scale = where(better, sum_lx / sum_l2, scale)
            best = where(better, scale * sum_lx, best)
            best_iscale = where(better, iscale, best_iscale)
    empty = amax < F(1e-15)  # GROUP_MAX_EPS
    return where(empty, F(0), scale), best_iscale, empty


@kernel
def q6_k(rows, out):
    """`rows` (blocks, 16, 16), `out` (blocks, 210)."""
    x, w, wx = np.empty((16, 16), F), np.empty((16, 16), F), np.empty((16, 16), F)
    scales, iscales, levels = np.empty(16, F), np.empty(16, F), np.empty((16, 16), B)
    for b in range(len(rows)):
        block, y = rows[b], out[b]
        transpose16(block.reshape(-1), x.reshape(-1))
        scale, best_iscale, empty = make_qx_quants(x, w, wx)
        store(scales, scale)
        store(iscales, best_iscale)
        empties = bit_mask(empty)
        max_abs_scale = largest(where(abs(scale) > F(0), abs(scale), F(0)))  # not NaN
        if max_abs_scale < F(1e-15):
            y[:] = 0
            continue
        iscale = F(-128) / scales[first(abs(scale) == max_abs_scale)]
        d16 = fp16_bits(F(1) / iscale)
        put16(y, 208, d16)
        for j in range(16):
            s = np.int8(min(nearest_int_of_one(iscale * scales[j]), N(127)))
            y[192 + j] = B(s)
            d = fp16_value(d16) * F(s)
            v = load16(block[j])
            v = v / d if d != F(0) else v * iscales[j]
            level = low_byte(clamp(nearest_int(v), -32, 31) + N(32))
            if d == F(0) and empties >> j & 1:
                level = level & B(0)
            store(levels[j], level)
        put_q6_k(levels, y)


@function
def put_q6_k(levels, y):
    """The lower 4 bits of all levels, then the upper 2."""
    for h in range(2):
        for c in range(2):
            q1, q2 = load16(levels[8 * h + c]), load16(levels[8 * h + c + 2])
            q3, q4 = load16(levels[8 * h + c + 4]), load16(levels[8 * h + c + 6])
            store(y[64 * h + 16 * c :], (q1 & B(15)) | ((q3 & B(15)) << B(4)))
            store(y[64 * h + 16 * c + 32 :], (q2 & B(15)) | ((q4 & B(15)) << B(4)))
            upper = (q1 >> B(4)) | ((q2 >> B(4)) << B(2))
            upper |= ((q3 >> B(4)) << B(4)) | ((q4 >> B(4)) << B(6))
            store(y[128 + 32 * h + 16 * c :], upper)


# Q8_0, Q5_0, Q5_1: blocks of 32, one at a time ----------------------------------------------------


@function
def byte(v):
    """C's `(uint8_t) v` as x86 has it: 0 for NaN and for what is far outside."""
    return low_byte(integer(where(abs(v) < F(200), v, F(0))))


@kernel
def q8_0(rows, out):
    """`rows` (blocks, 32), `out` (blocks, 34)."""
    for b in range(len(rows)):
        x, y = load32(rows[b]), out[b]
        d = largest(abs(x)) / F(127)
        inv = F(1) / d if d != F(0) else F(0)
        put16(y, 0, fp16_bits(d))
        v = x * inv
        half = where(v > F(0), F(0.49999997), F(-0.49999997))  # roundf: the float below a half
        store(y[2:], byte(v + half))


@function
def put_five_bits(y, at, q, v):
    """The fifth bits of all, then the lower four in pairs; `q`: room for 32 bytes."""
    high = bit_mask(v > B(15))
    put16(y, at, high & 0xFFFF)
    put16(y, at + 2, high >> 16)
    store(q, v)
    store(y[at + 4 :], (load16(q) & B(15)) | (load16(q[16:]) << B(4)))


@kernel
def q5_0(rows, out):
    """`rows` (blocks, 32), `out` (blocks, 22)."""
    q = np.empty(32, B)
    for b in range(len(rows)):
        x, y = load32(rows[b]), out[b]
        amax = largest(abs(x))
        top = rows[b, first(abs(x) == amax)] if amax != F(0) else F(0)
        d = top / F(-16)
        inv = F(1) / d if d != F(0) else F(0)
        put16(y, 0, fp16_bits(d))
        v = byte(x * inv + F(16.5))
        put_five_bits(y, 2, q, where(v < B(31), v, B(31)))


@kernel
def q5_1(rows, out):
    """`rows` (blocks, 32), `out` (blocks, 24)."""
    q = np.empty(32, B)
    for b in range(len(rows)):
        x, y = load32(rows[b]), out[b]
        # The first of several: zeros have signs.
        high, low = rows[b, first(x == largest(x))], rows[b, first(-x == largest(-x))]
        d = (high - low) / F(31)
        inv = F(1) / d if d != F(0) else F(0)
        put16(y, 0, fp16_bits(d))
        put16(y, 2, fp16_bits(low))
        put_five_bits(y, 4, q, byte((x - low) * inv + F(0.5)))
