"""The backward pass over query tiles: dQ, and what tiles give to captured tensors."""

from __future__ import annotations

import triton
import triton.language as tl

from .block_walk import find_row, masked_tile, plain_tile, tile_bounds, tile_counts
from .gradient import load_row_statistics, score_gradients
from .launch_order import work_of_program
from .memory import load_tile, rows_of, slice_of, store_tile
from .names import COUNTS, kernel_name
from .product import product, product_transposed, scaled, zeros
from .scores import log2_factor


@triton.jit
def _add_keys(dq_acc, sums, q_tile, do_tile, lse_i, delta_i, k, v, keys, values, start_n, stop_n, is_full, start_m, stop_m,
              b, h, S, scale, factor, captured, dcaptured, line, slot, shape, score_mod: tl.constexpr,
              mask_mod: tl.constexpr, score_mod_grad: tl.constexpr, row_grads: tl.constexpr, tile_grads: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """dq, before the scale, and the sums of captured gradients, plus what the keys from `start_n` on contribute."""
    offs_m, offs_n = start_m + tl.arange(0, shape.BLOCK_M), start_n + tl.arange(0, shape.BLOCK_N)
    q_idx, kv_idx = offs_m[:, None], offs_n[None, :]
    k_tile = load_tile(
        keys, k, start_n, stop_n, shape.BLOCK_N, shape.D, shape.BLOCK_D, shape.REST_D, MASKED, shape.OFFSET
    )
    v_tile = load_tile(
        values, v, start_n, stop_n, shape.BLOCK_N, shape.DV, shape.BLOCK_DV, shape.REST_DV, MASKED, shape.OFFSET
    )
    # Both products before the elementwise work, which can then overlap the second.
    qk = product_transposed(q_tile, k_tile, shape.PRECISION)  # [BLOCK_M, BLOCK_N]
    dp = product_transposed(do_tile, v_tile, shape.PRECISION)
    _, dmodified, ds, raw, keep = score_gradients(
        qk, dp, lse_i[:, None], delta_i[:, None], is_full, kv_idx, stop_n, b, h, q_idx, kv_idx, scale, factor, captured,
        shape, score_mod, mask_mod, score_mod_grad, MASKED,
    )  # fmt: skip
    if row_grads is not None:  # what rows that do not exist sum up is not stored
        sums = row_grads(sums, dmodified, raw, b, h, q_idx, kv_idx, keep, captured)
    if tile_grads is not None:
        # The comparison makes a mask of it for Triton's interpreter (3.9), whose `&` of bools is an integer.
        counted = (tl.broadcast_to(q_idx < stop_m, qk.shape) & keep) != 0
        tile_grads(dmodified, raw, b, h, q_idx, kv_idx, counted, captured, dcaptured, line, S, slot, start_n - start_m)
    return product(ds.to(k_tile[0].dtype), k_tile, dq_acc, shape.PRECISION), sums


@triton.jit(repr=kernel_name("attention_backward_dq"), do_not_specialize=[*COUNTS, "first", "first_line", "slots"])
def attention_backward_dq(q, k, v, dout, dq, q_tma, k_tma, v_tma, do_tma, q_rest, k_rest, v_rest, do_rest, lse, delta,
                          lists, order, captured, row_sums, dcaptured, first, first_line, slots, L, S, heads, group_size,
                          heads_at_once, batches, tiles, scale, shape, score_mod: tl.constexpr, mask_mod: tl.constexpr,
                          score_mod_grad: tl.constexpr, row_grads: tl.constexpr, tile_grads: tl.constexpr,
                          ROWS: tl.constexpr):  # fmt: skip
    """dq = scale * dS k, and the gradients of loads: ROWS of them, summed over the keys, to `row_sums`; others by tile.

    Operands and grid as those of `attention_forward`; lse, delta and each of `row_sums` [B, Hq, L], contiguous float32.
    The grid may be launched in parts, from the program `first` on, which begins with line `first_line` of B * Hq * L, if
    programs go head by head. The workspaces of a part are in `dcaptured`, with `slots` tiles for each program.
    """
    program = tl.program_id(0) + first
    slot = tl.program_id(0).to(tl.int64) * slots  # of the first tile, in a workspace
    t, b, h = work_of_program(program, tiles, heads, batches, heads_at_once, order)
    bh = b * heads + h
    line = bh.to(tl.int64) * L - first_line
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
    do_tile = load_tile(
        rows_of(dout, do_tma, do_rest, b, h),
        dout,
        start_m,
        stop_m,
        shape.BLOCK_M,
        shape.DV,
        shape.BLOCK_DV,
        shape.REST_DV,
        True,
        shape.OFFSET,
    )
    lse_i, delta_i = load_row_statistics(lse, delta, bh.to(tl.int64) * L + offs_m, offs_m, stop_m)
    factor = log2_factor(scale, shape.SCALE_IN_FACTOR)
    acc = zeros(shape.BLOCK_M, shape.BLOCK_D, shape.REST_D)
    sums = (tl.zeros([shape.BLOCK_M], tl.float32),) * ROWS

    partial, n_partial, full, n_full = find_row(lists, b, h, row, shape.LISTED)
    partial_tiles, masked_tiles, plain_tiles = tile_counts(
        full, n_partial, n_full, S, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED, mask_mod is not None
    )
    for i in tl.range(0, masked_tiles):
        start_n, stop_n, is_full = masked_tile(
            partial, full, i, partial_tiles, plain_tiles, S, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED
        )  # fmt: skip
        acc, sums = _add_keys(
            acc, sums, q_tile, do_tile, lse_i, delta_i, k, v, keys, values, start_n, stop_n, is_full, start_m, stop_m,
            b, h, S, scale, factor, captured, dcaptured, line, slot + i, shape, score_mod, mask_mod,
            score_mod_grad, row_grads, tile_grads, True,
        )  # fmt: skip
    for i in tl.range(0, plain_tiles):
        start_n = plain_tile(full, i, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED, shape.CONTIGUOUS)
        acc, sums = _add_keys(
            acc, sums, q_tile, do_tile, lse_i, delta_i, k, v, keys, values, start_n, S, True, start_m, stop_m,
            b, h, S, scale, factor, captured, dcaptured, line, slot + masked_tiles + i, shape, score_mod, mask_mod,
            score_mod_grad, row_grads, tile_grads, False,
        )  # fmt: skip
    store_tile(
        slice_of(dq, b, h),
        dq,
        start_m,
        stop_m,
        scaled(acc, scale),
        shape.BLOCK_M,
        shape.D,
        shape.BLOCK_D,
        shape.REST_D,
        shape.OFFSET,
    )
    for i in tl.static_range(ROWS):
        tl.store(row_sums[i] + bh.to(tl.int64) * L + offs_m, sums[i], mask=offs_m < stop_m)
