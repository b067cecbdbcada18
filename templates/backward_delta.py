"""The first backward kernel: what the gradient of the softmax subtracts from every score's gradient in a row."""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import load_tile, rows_of
from .names import kernel_name


@triton.jit(repr=kernel_name("attention_delta"), do_not_specialize=["tiles"])
def attention_delta(out, dout, dlse, delta, dq_sum, L, rows, heads, tiles, HAS_DLSE: tl.constexpr, D: tl.constexpr,
                    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
                    OFFSET: tl.constexpr):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, all [B, Hq, L] contiguous float32; out and dout are matrices [B, Hq, L, Ev].

    If given, `dq_sum` [B, Hq, rows, D], contiguous float32, is set to zero, for what will be added to it.
    Grid: `tiles` of BLOCK_M rows x `heads` x B, in one dimension.
    """
    bh = tl.program_id(0) // tiles
    b = bh // heads
    h = bh % heads
    start = tl.program_id(0) % tiles * BLOCK_M
    offs_m = start + tl.arange(0, BLOCK_M)
    o = load_tile(rows_of(out, None, None, b, h), out, start, L, BLOCK_M, DV, BLOCK_DV, 0, True, OFFSET)[0].to(
        tl.float32
    )
    do = load_tile(rows_of(dout, None, None, b, h), dout, start, L, BLOCK_M, DV, BLOCK_DV, 0, True, OFFSET)[0].to(
        tl.float32
    )
    total = tl.sum(o * do, 1)
    at = bh.to(tl.int64) * L + offs_m
    if HAS_DLSE:
        total -= tl.load(dlse + at, mask=offs_m < L, other=0.0)
    tl.store(delta + at, total, mask=offs_m < L)
    if dq_sum is not None:
        columns = tl.arange(0, BLOCK_D)[None, :]
        zero_at = (bh.to(tl.int64) * rows + offs_m)[:, None] * D + columns
        inside = (offs_m[:, None] < rows) & (columns < D)
        tl.store(dq_sum + zero_at, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), mask=inside)
