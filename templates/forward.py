"""The forward kernel: one program computes a tile of query rows of one head, walking over the keys it attends to."""

from __future__ import annotations

import triton
import triton.language as tl

from .block_walk import find_row, first_tile, masked_tile, plain_tile, tile_bounds, tile_counts
from .launch_order import work_of_program
from .memory import load_tile, rows_of, slice_of, store_tile
from .names import COUNTS, kernel_name
from .online_softmax import row_statistics, softmax_step
from .product import product, product_transposed, scaled, zeros
from .scores import attended, log2_factor, modified_scores


@triton.jit
def _attend(acc, m_i, l_i, p_before, before, q_tile, k, v, keys, values, start_n, stop_n, is_full, offs_m, b, h, scale, factor,
            captured, shape, score_mod: tl.constexpr, mask_mod: tl.constexpr, MASKED: tl.constexpr,
            FIRST: tl.constexpr):  # fmt: skip
    """Add the keys from `start_n` on to the rows' sums.

    OVERLAP: the values are added one tile late, those from `before` on with the weights `p_before`, while the softmax of
    this tile is computed. FIRST: there is no tile before this one.
    """
    offs_n = start_n + tl.arange(0, shape.BLOCK_N)
    q_idx, kv_idx = offs_m[:, None], offs_n[None, :]
    k_tile = load_tile(
        keys, k, start_n, stop_n, shape.BLOCK_N, shape.D, shape.BLOCK_D, shape.REST_D, MASKED, shape.OFFSET
    )
    qk = product_transposed(q_tile, k_tile, shape.PRECISION)  # [BLOCK_M, BLOCK_N]
    if shape.OVERLAP and not FIRST:
        v_tile = load_tile(
            values, v, before, stop_n, shape.BLOCK_N, shape.DV, shape.BLOCK_DV, shape.REST_DV, MASKED, shape.OFFSET
        )
        acc = product(p_before.to(v_tile[0].dtype), v_tile, acc, shape.PRECISION)
    if not shape.SCALE_IN_FACTOR:
        qk = qk * scale
    qk = modified_scores(qk, b, h, q_idx, kv_idx, captured, score_mod)
    if MASKED:
        keep = attended(qk, b, h, q_idx, kv_idx, kv_idx, stop_n, is_full, captured, mask_mod)
        qk = tl.where(keep, qk, float("-inf"))
    p, alpha, m_i, l_i = softmax_step(qk, factor, m_i, l_i)
    if not FIRST:
        acc = scaled(acc, alpha[:, None])
    if not shape.OVERLAP:
        v_tile = load_tile(
            values, v, start_n, stop_n, shape.BLOCK_N, shape.DV, shape.BLOCK_DV, shape.REST_DV, MASKED, shape.OFFSET
        )
        acc = product(p.to(v_tile[0].dtype), v_tile, acc, shape.PRECISION)
        return acc, m_i, l_i, p_before, before
    else:
        return acc, m_i, l_i, p, start_n


@triton.jit(repr=kernel_name("attention_forward"), do_not_specialize=COUNTS)
def attention_forward(q, k, v, out, q_tma, k_tma, v_tma, q_rest, k_rest, v_rest, lse, max_scores, lists, order, captured, L,
                      S, heads, group_size, heads_at_once, batches, tiles, scale, shape, score_mod: tl.constexpr,
                      mask_mod: tl.constexpr):  # fmt: skip
    """out = softmax(score_mod(scale * q k^T), masked) v, with lse and max_scores [B, Hq, L], contiguous float32.

    Matrices: q, out [B, Hq, L, .], k, v [B, Hkv, S, .], with a batch stride of 0 where all entries share their keys.
    q_tma, k_tma, v_tma: descriptors of those, or None; q_rest, k_rest, v_rest: of second pieces. Grid: `tiles` of query rows
    x `heads` x `batches`, in one dimension, in the order that `work_of_program` explains.
    """
    t, b, h = work_of_program(tl.program_id(0), tiles, heads, batches, heads_at_once, order)
    bh = b * heads + h
    row, start_m, stop_m = tile_bounds(t, L, shape.SPARSE_Q, shape.BLOCK_M)
    offs_m = start_m + tl.arange(0, shape.BLOCK_M)
    keys, values = rows_of(k, k_tma, k_rest, b, h // group_size), rows_of(v, v_tma, v_rest, b, h // group_size)
    q_tile = load_tile(
        rows_of(q, q_tma, q_rest, b, h),
        q,
        start_m,
        stop_m,
        shape.BLOCK_M,
        shape.D,
        shape.BLOCK_D,
        shape.REST_D,
        True,
        shape.OFFSET,
    )
    factor = log2_factor(scale, shape.SCALE_IN_FACTOR)
    m_i = tl.full([shape.BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([shape.BLOCK_M], tl.float32)
    acc = zeros(shape.BLOCK_M, shape.BLOCK_DV, shape.REST_DV)

    partial, n_partial, full, n_full = find_row(lists, b, h, row, shape.LISTED)
    partial_tiles, masked_tiles, plain_tiles = tile_counts(
        full, n_partial, n_full, S, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED, mask_mod is not None
    )
    p, before = m_i, start_m  # OVERLAP: the weights of the tile whose values are added next, and its first key
    first_masked, first_plain = 0, 0
    if shape.OVERLAP:
        start_n, stop_n, is_full = first_tile(
            partial, full, partial_tiles, masked_tiles, plain_tiles, S, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED
        )  # fmt: skip
        acc, m_i, l_i, p, before = _attend(
            acc, m_i, l_i, p, before, q_tile, k, v, keys, values, start_n, stop_n, is_full, offs_m, b, h, scale, factor,
            captured, shape, score_mod, mask_mod, True, True,
        )  # fmt: skip
        first_masked, first_plain = 1, tl.where(masked_tiles == 0, 1, 0)
    for i in tl.range(first_masked, masked_tiles):
        start_n, stop_n, is_full = masked_tile(
            partial, full, i, partial_tiles, plain_tiles, S, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED
        )  # fmt: skip
        acc, m_i, l_i, p, before = _attend(
            acc, m_i, l_i, p, before, q_tile, k, v, keys, values, start_n, stop_n, is_full, offs_m, b, h, scale, factor,
            captured, shape, score_mod, mask_mod, True, False,
        )  # fmt: skip
    for i in tl.range(first_plain, plain_tiles):
        start_n = plain_tile(full, i, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED, shape.CONTIGUOUS)
        acc, m_i, l_i, p, before = _attend(
            acc, m_i, l_i, p, before, q_tile, k, v, keys, values, start_n, S, True, offs_m, b, h, scale, factor,
            captured, shape, score_mod, mask_mod, False, False,
        )  # fmt: skip
    if shape.OVERLAP:
        v_tile = load_tile(
            values, v, before, S, shape.BLOCK_N, shape.DV, shape.BLOCK_DV, shape.REST_DV, True, shape.OFFSET
        )
        acc = product(p.to(v_tile[0].dtype), v_tile, acc, shape.PRECISION)

    divisor, lse_i, max_i = row_statistics(m_i, l_i)
    store_tile(
        slice_of(out, b, h), out, start_m, stop_m, scaled(acc, 1.0 / divisor[:, None]), shape.BLOCK_M, shape.DV,
        shape.BLOCK_DV, shape.REST_DV, shape.OFFSET,
    )  # fmt: skip
    at = bh.to(tl.int64) * L + offs_m
    tl.store(lse + at, lse_i, mask=offs_m < stop_m)
    tl.store(max_scores + at, max_i, mask=offs_m < stop_m)
