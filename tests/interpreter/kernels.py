"""Kernels that collect the gradients of captured tensors over one tile, by generated functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def apply_sums(out, grad, score, keep, b, h, captured, L, S, f: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
               TRANSPOSED: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """out[i] += the sum over the second axis of the gradients of load i, of a tile that may lie transposed."""
    if TRANSPOSED:
        q_idx, kv_idx, rows, end = tl.arange(0, M)[None, :], tl.arange(0, N)[:, None], tl.arange(0, N), S
    else:
        q_idx, kv_idx, rows, end = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, M), L
    at, inside = q_idx * S + kv_idx, (q_idx < L) & (kv_idx < S)
    kept = tl.load(keep + at, mask=inside, other=0) != 0
    scores = tl.load(score + at, mask=inside, other=0.0)
    grads = tl.load(grad + at, mask=inside, other=0.0)
    sums = f((tl.zeros_like(rows).to(tl.float32),) * COUNT, grads, scores, b, h, q_idx, kv_idx, kept, captured)
    for i in tl.static_range(COUNT):
        tl.store(out[i] + rows, sums[i], mask=rows < end)


@triton.jit
def apply_tile_grads(grad, score, keep, b, h, captured, dcaptured, L, S, f: tl.constexpr, M: tl.constexpr,
                     N: tl.constexpr):  # fmt: skip
    """Put the gradients of all loads of a tile where they belong; it is the only one."""
    q_idx, kv_idx = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    at, inside = q_idx * S + kv_idx, (q_idx < L) & (kv_idx < S)
    kept = tl.load(keep + at, mask=inside, other=0) != 0
    scores = tl.load(score + at, mask=inside, other=0.0)
    grads = tl.load(grad + at, mask=inside, other=0.0)
    zero = tl.zeros((), tl.int64)
    f(grads, scores, b, h, q_idx, kv_idx, kept, captured, dcaptured, zero, S, zero, 0)
