"""The first backward kernel: what the gradient of the softmax subtracts from every score's gradient in a row."""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import load_tile, slice_of
from .names import kernel_name


@triton.jit(repr=kernel_name("attention_delta"))
def attention_delta(out, dout, dlse, delta, L, heads, tiles, HAS_DLSE: tl.constexpr, DV: tl.constexpr,
                    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, all [B, Hq, L] contiguous float32; out and dout are matrices [B, Hq, L, Ev].

    Grid: `tiles` of BLOCK_M rows x `heads` x B, in one dimension.
    """
    bh = tl.program_id(0) // tiles
    b = bh // heads
    h = bh % heads
    start = tl.program_id(0) % tiles * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    o = load_tile(slice_of(out, b, h), out, start, L, BLOCK_M, DV, BLOCK_DV, True, OFFSET).to(tl.float32)
    do = load_tile(slice_of(dout, b, h), dout, start, L, BLOCK_M, DV, BLOCK_DV, True, OFFSET).to(tl.float32)
    total = tl.sum(o * do, 1)
    at = bh.to(tl.int64) * L + rows
    if HAS_DLSE:
        total -= tl.load(dlse + at, mask=rows < L, other=0.0)
    tl.store(delta + at, total, mask=rows < L)
