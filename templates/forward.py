"""The forward kernel: one program computes a tile of query rows of one head, walking over the keys it attends to."""

from __future__ import annotations

import triton
import triton.language as tl

from .block_walk import find_row, masked_tile, plain_tile, tile_counts, tile_of_program
from .memory import load_tile, slice_of, store_tile
from .names import kernel_name
from .online_softmax import row_statistics, softmax_step
from .product import product, product_transposed
from .scores import attended, log2_factor, modified_scores


@triton.jit
def _attend(acc, m_i, l_i, q_tile, k, v, k_ptr, v_ptr, start_n, stop_n, is_full, offs_m, b, h, scale, factor, captured,
            shape, score_mod: tl.constexpr, mask_mod: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add the keys from `start_n` on to the rows' sums."""
    offs_n = start_n + tl.arange(0, shape.BLOCK_N)
    q_idx, kv_idx = offs_m[:, None], offs_n[None, :]
    k_tile = load_tile(k_ptr, k, start_n, stop_n, shape.BLOCK_N, shape.D, shape.BLOCK_D, MASKED, shape.OFFSET)
    qk = product_transposed(q_tile, k_tile, shape.PRECISION)  # [BLOCK_M, BLOCK_N]
    if not shape.SCALE_IN_FACTOR:
        qk = qk * scale
    qk = modified_scores(qk, b, h, q_idx, kv_idx, captured, score_mod)
    if MASKED:
        keep = attended(qk, b, h, q_idx, kv_idx, kv_idx, stop_n, is_full, captured, mask_mod)
        qk = tl.where(keep, qk, float("-inf"))
    p, alpha, m_i, l_i = softmax_step(qk, factor, m_i, l_i)
    v_tile = load_tile(v_ptr, v, start_n, stop_n, shape.BLOCK_N, shape.DV, shape.BLOCK_DV, MASKED, shape.OFFSET)
    acc = product(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], shape.PRECISION)
    return acc, m_i, l_i


@triton.jit(repr=kernel_name("attention_forward"))
def attention_forward(q, k, v, out, lse, max_scores, lists, captured, L, S, heads, group_size, tiles, scale, shape,
                      score_mod: tl.constexpr, mask_mod: tl.constexpr):  # fmt: skip
    """out = softmax(score_mod(scale * q k^T), masked) v, with lse and max_scores [B, Hq, L], contiguous float32.

    Matrices: q, out [B, Hq, L, .], k, v [B, Hkv, S, .], with a batch stride of 0 where all entries share their keys.
    Grid: `tiles` of query rows x `heads` x B, in one dimension.
    """
    t = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    b, h = bh // heads, bh % heads
    row, start_m, stop_m = tile_of_program(t, L, shape.SPARSE_Q, shape.BLOCK_M)
    offs_m = start_m + tl.arange(0, shape.BLOCK_M)
    k_ptr, v_ptr = slice_of(k, b, h // group_size), slice_of(v, b, h // group_size)
    q_tile = load_tile(slice_of(q, b, h), q, start_m, stop_m, shape.BLOCK_M, shape.D, shape.BLOCK_D, True, shape.OFFSET)
    factor = log2_factor(scale, shape.SCALE_IN_FACTOR)
    m_i = tl.full([shape.BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([shape.BLOCK_M], tl.float32)
    acc = tl.zeros([shape.BLOCK_M, shape.BLOCK_DV], tl.float32)

    partial, n_partial, full, n_full = find_row(lists, b, h, row, shape.LISTED)
    partial_tiles, masked_tiles, plain_tiles = tile_counts(
        full, n_partial, n_full, S, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED, mask_mod is not None
    )
    for i in tl.range(0, masked_tiles):
        start_n, stop_n, is_full = masked_tile(
            partial, full, i, partial_tiles, plain_tiles, S, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED
        )  # fmt: skip
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q_tile, k, v, k_ptr, v_ptr, start_n, stop_n, is_full, offs_m, b, h, scale, factor, captured,
            shape, score_mod, mask_mod, True,
        )  # fmt: skip
    for i in tl.range(0, plain_tiles):
        start_n = plain_tile(full, i, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED, shape.CONTIGUOUS)
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q_tile, k, v, k_ptr, v_ptr, start_n, S, True, offs_m, b, h, scale, factor, captured,
            shape, score_mod, mask_mod, False,
        )  # fmt: skip

    divisor, lse_i, max_i = row_statistics(m_i, l_i)
    store_tile(
        slice_of(out, b, h), out, start_m, stop_m, acc / divisor[:, None], shape.BLOCK_M, shape.DV, shape.BLOCK_DV,
        shape.OFFSET,
    )  # fmt: skip
    at = bh.to(tl.int64) * L + offs_m
    tl.store(lse + at, lse_i, mask=offs_m < stop_m)
    tl.store(max_scores + at, max_i, mask=offs_m < stop_m)
