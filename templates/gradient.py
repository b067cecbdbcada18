"""From a tile's scores to the gradient of its raw scores; shared by both backward passes.

With P = exp(S' - lse) for modified scores S', dP = dO V^T and delta = rowsum(dO * O) - dlse:

    dS' = P * (dP - delta),   dS = dS' * d score_mod / d score
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import LOG2E, attended, modified_scores


@triton.jit
def load_row_statistics(lse, delta, at, rows, stop):
    """lse in units of log2, and delta. A row that does not exist or attends to nothing has weight 2^(x - inf) = 0."""
    exists = rows < stop
    lse_i = tl.load(lse + at, mask=exists, other=float("-inf"))
    lse_i = tl.where(lse_i == float("-inf"), float("inf"), lse_i * LOG2E)
    return lse_i, tl.load(delta + at, mask=exists, other=0.0)


@triton.jit
def score_gradients(qk, dp, lse_i, delta_i, is_full, index, stop, b, h, q_idx, kv_idx, scale, factor, captured,
                    shape, score_mod: tl.constexpr, mask_mod: tl.constexpr, score_mod_grad: tl.constexpr,
                    MASKED: tl.constexpr):  # fmt: skip
    """Weights P, dS', dS, the scaled raw scores, and which elements are attended.

    `lse_i` and `delta_i` broadcast against the tile. The last two results mean nothing unless a mod (a mask) needs them.
    """
    if shape.SCALE_IN_FACTOR:
        raw = qk
    else:
        raw = qk * scale
    score = modified_scores(raw, b, h, q_idx, kv_idx, captured, score_mod)
    keep = is_full
    if MASKED:
        keep = attended(qk, b, h, q_idx, kv_idx, index, stop, is_full, captured, mask_mod)
        score = tl.where(keep, score, float("-inf"))
    p = tl.exp2(score * factor - lse_i)
    dmodified = p * (dp - delta_i)
    if score_mod_grad is None:
        ds = dmodified
    else:
        ds = score_mod_grad(dmodified, raw, b, h, q_idx, kv_idx, captured)
    if MASKED:  # a derivative may be nan there
        ds = tl.where(keep, ds, 0.0)
    return p, dmodified, ds, raw, keep
