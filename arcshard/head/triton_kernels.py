"""Triton kernels of the head: one thing per kernel, launched by arcshard/head/kernels.py.

Importing this module needs Triton. Shapes: B rows of the global batch, n rows of a block of class
centers, D columns. Matrices are contiguous. Sums are in fp32 and in a fixed order: two runs give
the same bits. Offsets into a matrix are 64-bit, also where a block has more than 2^31 numbers.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401  # for the launches

TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _norm(w, norm_floor):
    """Returns |w| of rows, at least the floor; NaN where it overflows: the step is skipped."""
    length = tl.maximum(tl.sqrt(tl.sum(w * w, axis=1)), norm_floor)
    return tl.where(length < float("inf"), length, float("nan"))


@triton.jit(do_not_specialize=["n"])
def normalize_rows_kernel(
    weight,  # [N, D]
    rows,  # [n] int64 rows of `weight`, or not read
    operand,  # [n, D], written
    norm,  # [n] fp32, written
    n,
    norm_floor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """Writes rows / |row| in the operand's dtype, and |row|."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    here = row < n
    mask = here[:, None] & (column < D)[None, :]
    source = tl.load(rows + row, mask=here, other=0) if HAS_ROWS else row
    w = tl.load(weight + source[:, None] * D + column[None, :], mask=mask, other=0.0)
    w = w.to(tl.float32)
    length = _norm(w, norm_floor)
    tl.store(norm + row, length, mask=here)
    unit = (w / length[:, None]).to(operand.dtype.element_ty)
    tl.store(operand + row[:, None] * D + column[None, :], unit, mask=mask)


@triton.jit(do_not_specialize=["n", "start"])
def softmax_numerators_kernel(
    unit,  # [B, D] embeddings times s: a pointer, or a tensor descriptor where HAS_TMA
    operand,  # [n, D] normalized centers: likewise
    column,  # [B] int64 target among the classes of the step
    at_target,  # [B], or not read
    numerators,  # [n, B], written: likewise
    sums,  # [tiles of n, B] fp32, written where HAS_SUMS
    batch,
    n,
    start,  # first class of the block among the classes of the step
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_TMA: tl.constexpr,
    HAS_AT_TARGET: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Writes exp(W E^T), with `at_target` or 0 at the targets, and sums over a tile's classes."""
    tiles = tl.cdiv(batch, BLOCK_B)
    # Tiles of the same classes follow each other, so that their centers are in the cache.
    tile, tile_b = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first, first_b = tile * BLOCK_N, tile_b * BLOCK_B
    i = first_b + tl.arange(0, BLOCK_B)
    in_batch = i < batch
    target = tl.load(column + i, mask=in_batch, other=-1) - (start + first)
    is_here = (target >= 0) & (target < BLOCK_N) & in_batch
    target = tl.where(is_here, target, -1).to(tl.int32)
    # E W^T rather than W E^T: a row's sum is then within few threads. The tile is turned as it is
    # stored.
    z = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        if HAS_TMA:
            w = operand.load([first, d])
            e = unit.load([first_b, d])
        else:
            j = tl.arange(0, BLOCK_N)
            k = d + tl.arange(0, BLOCK_D)
            w_mask, e_mask = (j < n - first)[:, None], in_batch[:, None]
            if D % BLOCK_D != 0:
                w_mask, e_mask = w_mask & (k < D)[None, :], e_mask & (k < D)[None, :]
            of_tile = operand + first.to(tl.int64) * D
            w = tl.load(of_tile + (j[:, None] * D + k[None, :]), mask=w_mask, other=0.0)
            e = tl.load(unit + (i[:, None] * D + k[None, :]), mask=e_mask, other=0.0)
        z = tl.dot(e, tl.trans(w), z)
    # This order leaves registers for three programs per multiprocessor on an H100.
    j = tl.arange(0, BLOCK_N)  # classes from the first of the tile
    in_block = j < n - first
    p = tl.exp(z)
    is_target = j[None, :] == target[:, None]
    is_there = in_block[None, :]
    if (tl.max(target, axis=0) >= 0) | (first + BLOCK_N > n):  # few tiles
        at = 0.0
        if HAS_AT_TARGET:
            at = tl.load(at_target + i, mask=in_batch, other=0.0).to(tl.float32)[:, None]
        p = tl.where(is_target, at, tl.where(is_there, p, 0.0))
    h = p.to(DTYPE)
    if HAS_SUMS:
        total = tl.sum(h.to(tl.float32), axis=1)
        tl.store(sums + tile.to(tl.int64) * batch + i, total, mask=in_batch)
    if HAS_TMA:
        numerators.store([first, first_b], tl.trans(h))
    else:
        place = numerators + first.to(tl.int64) * batch + (j[:, None] * batch + i[None, :])
        tl.store(place, tl.trans(h), mask=in_block[:, None] & in_batch[None, :])


@triton.jit(do_not_specialize=["n", "start"])
def fill_targets_kernel(
    numerators,  # [n, B], written at the targets
    column,  # [B] int64 target among the classes of the step
    at_target,  # [B]
    batch,
    n,
    start,
    BLOCK_B: tl.constexpr,
):
    """Writes the targets' places of a block."""
    i = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.load(column + i, mask=i < batch, other=-1) - start
    mask = (i < batch) & (j >= 0) & (j < n)
    tl.store(numerators + j * batch + i, tl.load(at_target + i, mask=mask), mask=mask)


@triton.jit
def _mix(x):
    """Mixes the bits of uint32 (MurmurHash3's finalizer, A. Appleby)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _round(x, bits, ROUNDS: tl.constexpr):
    """Rounds fp32 to bf16 up or down by 16 random bits; infinity and NaN stay."""
    if ROUNDS:
        b = x.to(tl.uint32, bitcast=True)
        cut = (b + (bits & 0xFFFF)) & 0xFFFF0000
        is_finite = (b & 0x7F800000) != 0x7F800000
        return tl.where(is_finite, cut, b).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x


@triton.jit(do_not_specialize=["n", "first_row", "key0", "key1"])
def update_rows_kernel(
    gradient,  # [n, D] fp32
    weight,  # [N, D]
    first,  # [N, D] momentum or exp_avg, or not read
    second,  # [N, D] exp_avg_sq, or not read
    steps,  # [N] float64 counts of AdamW, or not read
    rows,  # [n] int64 rows of `weight`, or not read
    numbers,  # [n] int64 numbers of the rows in the shard, or not read
    veto,  # uint8 scalar, or not read
    n,
    first_row,  # what makes numbers, or rows, those of all ranks' rows
    key0,
    key1,
    norm_floor,
    learning_rate,
    weight_decay,
    momentum,  # of SGD
    one_minus_beta1,  # of AdamW; a number here is fp32, in which 1 - beta cancels
    one_minus_beta2,
    eps,
    log_beta1,
    log_beta2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_ADAMW: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    NORMALIZES: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_NUMBERS: tl.constexpr,
    HAS_VETO: tl.constexpr,
    ROUNDS_WEIGHT: tl.constexpr,
    ROUNDS_STATE: tl.constexpr,
):
    """Applies the gradient of normalized centers: projection, optimizer step and rounding."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    here = row < n
    place = tl.load(rows + row, mask=here, other=0) if HAS_ROWS else row
    mask = here[:, None] & (column < D)[None, :]
    offset = place[:, None] * D + column[None, :]
    g = tl.load(gradient + row[:, None] * D + column[None, :], mask=mask, other=0.0)
    w = tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_VETO:
        here = here & (tl.load(veto + row * 0) == 0)
    if NORMALIZES:
        length = _norm(w, norm_floor)[:, None]
        u = w / length
        g = (g - tl.sum(g * u, axis=1)[:, None] * u) / length
    if IS_ADAMW:
        m = tl.load(first + offset, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(second + offset, mask=mask, other=0.0).to(tl.float32)
        m += one_minus_beta1 * (g - m)
        v += one_minus_beta2 * (g * g - v)
        t = tl.load(steps + place, mask=here, other=0.0) + 1
        # In float64, because 1 - beta^t cancels.
        correction1 = 1 - tl.exp(t * log_beta1)
        correction2 = tl.sqrt(1 - tl.exp(t * log_beta2))
        factor = (correction1 / correction2).to(tl.float32)[:, None]
        floor = (correction1 * eps).to(tl.float32)[:, None]
        w -= learning_rate * weight_decay * w
        w -= learning_rate * (m / (tl.sqrt(v) * factor + floor))
        tl.store(steps + place, t, mask=here)
    else:
        m = g + weight_decay * w
        if HAS_MOMENTUM:
            m += momentum * tl.load(first + offset, mask=mask, other=0.0).to(tl.float32)
        w -= learning_rate * m
    bits = row.to(tl.uint32)[:, None]  # Triton needs a value also where none is used
    if ROUNDS_WEIGHT or ROUNDS_STATE:
        number = first_row + (tl.load(numbers + row, mask=here, other=0) if HAS_NUMBERS else place)
        key = _mix((number & 0xFFFFFFFF).to(tl.uint32) ^ key0.to(tl.uint32))
        key = _mix(key ^ (number >> 32).to(tl.uint32) ^ key1.to(tl.uint32))
        bits = _mix(key[:, None] ^ (column.to(tl.uint32) * 0x9E3779B1)[None, :])
    mask = here[:, None] & (column < D)[None, :]
    tl.store(weight + offset, _round(w, bits, ROUNDS_WEIGHT), mask=mask)
    if IS_ADAMW or HAS_MOMENTUM:
        tl.store(first + offset, _round(m, bits >> 16, ROUNDS_STATE), mask=mask)
    if IS_ADAMW:
        tl.store(second + offset, _round(v, _mix(bits), ROUNDS_STATE), mask=mask)
