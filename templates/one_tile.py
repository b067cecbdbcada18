"""Kernels that do nothing but call a generated function on a tile, for comparing it with what its graph means."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def apply_score_mod(out, score, b, h, captured, L, S, f: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """out[q, kv] = f(score[q, kv], b, h, q, kv)."""
    q_idx, kv_idx = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    at, inside = q_idx * S + kv_idx, (q_idx < L) & (kv_idx < S)
    value = f(tl.load(score + at, mask=inside, other=0.0), b, h, q_idx, kv_idx, captured)
    tl.store(out + at, value, mask=inside)


@triton.jit
def apply_gradient(out, grad, score, b, h, captured, L, S, f: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """out[q, kv] = f(grad[q, kv], score[q, kv], b, h, q, kv)."""
    q_idx, kv_idx = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    at, inside = q_idx * S + kv_idx, (q_idx < L) & (kv_idx < S)
    scores = tl.load(score + at, mask=inside, other=0.0)
    value = f(tl.load(grad + at, mask=inside, other=0.0), scores, b, h, q_idx, kv_idx, captured)
    tl.store(out + at, value, mask=inside)


@triton.jit
def apply_mask_mod(out, b, h, captured, L, S, f: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """out[q, kv] = f(b, h, q, kv)."""
    q_idx, kv_idx = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    value = tl.broadcast_to(f(b, h, q_idx, kv_idx, captured), [M, N])
    tl.store(out + q_idx * S + kv_idx, value, mask=(q_idx < L) & (kv_idx < S))
