"""From the products of a tile to its scores: scale, score_mod, mask. The same lines serve forward and backward.

Scores leave here times `factor` being in units of log2: the scale is part of the factor where nothing else needs it
(SCALE_IN_FACTOR), so that an unmodified score costs one multiply-add before exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log2_factor(scale, SCALE_IN_FACTOR: tl.constexpr):
    """What takes a score of `modified_scores` to units of log2."""
    if SCALE_IN_FACTOR:
        return scale * LOG2E
    else:
        return scale * 0.0 + LOG2E


@triton.jit
def modified_scores(qk, b, h, q_idx, kv_idx, captured, score_mod: tl.constexpr):
    """score_mod of scores that are scaled already."""
    if score_mod is None:
        return qk
    else:
        return score_mod(qk, b, h, q_idx, kv_idx, captured)


@triton.jit
def attended(qk, b, h, q_idx, kv_idx, index, stop, is_full, captured, mask_mod: tl.constexpr):
    """[tile] bool: which elements of a tile of the masked phase are attended.

    `index`, which is q_idx or kv_idx, runs along the walked axis and ends before `stop`. A full block is not masked.
    """
    inside = tl.broadcast_to(index < stop, qk.shape)
    if mask_mod is None:
        return inside
    else:
        return inside & (mask_mod(b, h, q_idx, kv_idx, captured) | is_full)
