"""The backward pass over key tiles: dK, dV, and what columns of scores give to captured tensors.

One program owns its keys, for all heads that share them or for a part of these, so nothing here needs atomics. In one pass
with dQ it adds what its keys give to the queries' gradients, too: five products a tile, where two passes have seven.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .block_walk import find_row, masked_tile, plain_tile, tile_bounds, tile_counts
from .gradient import load_row_statistics, score_gradients
from .launch_order import work_of_program
from .memory import add_rows, load_tile, rows_of, slice_of, store_tile
from .names import COUNTS, kernel_name
from .product import product, product_transposed, scaled, transposed_product, zeros
from .scores import log2_factor


@triton.jit
def _add_queries(dk_acc, dv_acc, sums, k_tile, v_tile, q, dout, queries, douts, dq_sum, dq_tma, dq_rest, lse, delta, at,
                 dq_row, rows, start_m, stop_m, is_full, offs_n, b, h, scale, factor, captured, shape,
                 score_mod: tl.constexpr, mask_mod: tl.constexpr, score_mod_grad: tl.constexpr, column_grads: tl.constexpr,
                 MASKED: tl.constexpr):  # fmt: skip
    """dk (before the scale), dv and the sums plus what the queries from `start_m` on contribute.

    Tiles have the keys as rows, so that two products take them from registers; UPRIGHT, the queries, and a row's lse and
    delta are few registers.
    """
    offs_m = start_m + tl.arange(0, shape.BLOCK_M)
    q_tile = load_tile(
        queries, q, start_m, stop_m, shape.BLOCK_M, shape.D, shape.BLOCK_D, shape.REST_D, MASKED, shape.OFFSET
    )
    do_tile = load_tile(
        douts, dout, start_m, stop_m, shape.BLOCK_M, shape.DV, shape.BLOCK_DV, shape.REST_DV, MASKED, shape.OFFSET
    )
    lse_i, delta_i = load_row_statistics(lse, delta, at + offs_m, offs_m, stop_m)
    # Both products before the elementwise work, which can then overlap the second.
    if shape.UPRIGHT:
        q_idx, kv_idx = offs_m[:, None], offs_n[None, :]
        qk = product_transposed(q_tile, k_tile, shape.PRECISION)  # [BLOCK_M, BLOCK_N]
        dp = product_transposed(do_tile, v_tile, shape.PRECISION)
        p, _, ds, _, _ = score_gradients(
            qk, dp, lse_i[:, None], delta_i[:, None], is_full, q_idx, stop_m, b, h, q_idx, kv_idx, scale, factor,
            captured, shape, score_mod, mask_mod, score_mod_grad, MASKED,
        )  # fmt: skip
        ds_low = ds.to(q_tile[0].dtype)
        dv_acc = transposed_product(p.to(do_tile[0].dtype), do_tile, dv_acc, shape.PRECISION)
        dk_acc = transposed_product(ds_low, q_tile, dk_acc, shape.PRECISION)
    else:
        q_idx, kv_idx = offs_m[None, :], offs_n[:, None]
        qkT = product_transposed(k_tile, q_tile, shape.PRECISION)  # [BLOCK_N, BLOCK_M]
        dpT = product_transposed(v_tile, do_tile, shape.PRECISION)
        pT, dmodified, dsT, raw, keep = score_gradients(
            qkT, dpT, lse_i[None, :], delta_i[None, :], is_full, q_idx, stop_m, b, h, q_idx, kv_idx, scale, factor,
            captured, shape, score_mod, mask_mod, score_mod_grad, MASKED,
        )  # fmt: skip
        if column_grads is not None:
            sums = column_grads(sums, dmodified, raw, b, h, q_idx, kv_idx, keep, captured)
        ds_low = dsT.to(q_tile[0].dtype)
        dv_acc = product(pT.to(do_tile[0].dtype), do_tile, dv_acc, shape.PRECISION)
        dk_acc = product(ds_low, q_tile, dk_acc, shape.PRECISION)
    if dq_sum is not None:
        zero = zeros(shape.BLOCK_M, shape.BLOCK_D, shape.REST_D)
        if shape.UPRIGHT:
            dq_tile = product(ds_low, k_tile, zero, shape.PRECISION)
        else:
            dq_tile = transposed_product(ds_low, k_tile, zero, shape.PRECISION)
        first = start_m
        if MASKED:  # the last block may have tiles beyond the buffer: zeros, for rows of the same block
            first = tl.minimum(start_m, rows - shape.BLOCK_M)
        add_rows(dq_sum, dq_tma, dq_rest, dq_row + first, dq_tile, shape.BLOCK_D, shape.REST_D)
    return dk_acc, dv_acc, sums


@triton.jit(repr=kernel_name("attention_backward_dkdv"), do_not_specialize=COUNTS)
def attention_backward_dkdv(q, k, v, dout, dk, dv, dq_sum, q_tma, k_tma, v_tma, do_tma, dq_tma, q_rest, k_rest,
                            v_rest, do_rest, dq_rest, lse, delta, lists, order,
                            captured, column_sums, L, S, rows, heads, group_size, heads_at_once, sharing, batches, splits,
                            tiles, scale, shape, score_mod: tl.constexpr, mask_mod: tl.constexpr,
                            score_mod_grad: tl.constexpr, column_grads: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """dk = scale * dS^T q and dv = P^T dout, summed over the query heads and batch entries that share keys.

    Those are `group_size` heads and `sharing` entries. With `splits` above 1 a program takes a part of them, and dk and dv
    are [B * splits, Hkv, S, .], to be summed. The gradients of COLUMNS loads, summed over the queries, go to `column_sums`,
    each [B, Hq, S], contiguous float32. Operands as those of `attention_forward`; `lists` are by key block: which query
    blocks attend to it. If given, `dq_sum` [B, Hq, rows, BLOCK_D], float32, gets dS k added, without the scale.
    Grid: `tiles` of keys x Hkv x `batches`, which is the keys' batch times `splits`, in one dimension.
    """
    t, kv_part, kv_h = work_of_program(tl.program_id(0), tiles, heads // group_size, batches, heads_at_once, order)
    kv_b = kv_part // splits
    column, start_n, stop_n = tile_bounds(t, S, shape.SPARSE_KV, shape.BLOCK_N)
    offs_n = start_n + tl.arange(0, shape.BLOCK_N)
    k_tile = load_tile(
        rows_of(k, k_tma, k_rest, kv_b, kv_h),
        k,
        start_n,
        stop_n,
        shape.BLOCK_N,
        shape.D,
        shape.BLOCK_D,
        shape.REST_D,
        True,
        shape.OFFSET,
    )
    v_tile = load_tile(
        rows_of(v, v_tma, v_rest, kv_b, kv_h),
        v,
        start_n,
        stop_n,
        shape.BLOCK_N,
        shape.DV,
        shape.BLOCK_DV,
        shape.REST_DV,
        True,
        shape.OFFSET,
    )
    factor = log2_factor(scale, shape.SCALE_IN_FACTOR)
    dk_acc = zeros(shape.BLOCK_N, shape.BLOCK_D, shape.REST_D)
    dv_acc = zeros(shape.BLOCK_N, shape.BLOCK_DV, shape.REST_DV)

    part = (sharing * group_size + splits - 1) // splits
    first = kv_part % splits * part
    for j in tl.range(first, tl.minimum(first + part, sharing * group_size)):
        b = kv_b + j // group_size
        h = kv_h * group_size + j % group_size
        queries, douts = rows_of(q, q_tma, q_rest, b, h), rows_of(dout, do_tma, do_rest, b, h)
        bh = (b * heads + h).to(tl.int64)
        at, dq_row = bh * L, bh * rows
        sums = (tl.zeros([shape.BLOCK_N], tl.float32),) * COLUMNS
        partial, n_partial, full, n_full = find_row(lists, b, h, column, shape.LISTED)
        partial_tiles, masked_tiles, plain_tiles = tile_counts(
            full, n_partial, n_full, L, shape.SPARSE_Q, shape.BLOCK_M, shape.LISTED, mask_mod is not None
        )
        for i in tl.range(0, masked_tiles):
            start_m, stop_m, is_full = masked_tile(
                partial, full, i, partial_tiles, plain_tiles, L, shape.SPARSE_Q, shape.BLOCK_M, shape.LISTED
            )  # fmt: skip
            dk_acc, dv_acc, sums = _add_queries(
                dk_acc, dv_acc, sums, k_tile, v_tile, q, dout, queries, douts, dq_sum, dq_tma, dq_rest, lse, delta, at,
                dq_row, rows, start_m, stop_m, is_full, offs_n, b, h, scale, factor, captured, shape, score_mod, mask_mod,
                score_mod_grad, column_grads, True,
            )  # fmt: skip
        for i in tl.range(0, plain_tiles):
            start_m = plain_tile(full, i, shape.SPARSE_Q, shape.BLOCK_M, shape.LISTED, shape.CONTIGUOUS)
            dk_acc, dv_acc, sums = _add_queries(
                dk_acc, dv_acc, sums, k_tile, v_tile, q, dout, queries, douts, dq_sum, dq_tma, dq_rest, lse, delta, at,
                dq_row, rows, start_m, L, True, offs_n, b, h, scale, factor, captured, shape, score_mod, mask_mod,
                score_mod_grad, column_grads, False,
            )  # fmt: skip
        for i in tl.static_range(COLUMNS):
            tl.store(column_sums[i] + bh * S + offs_n, sums[i], mask=offs_n < stop_n)
    store_tile(
        slice_of(dk, kv_part, kv_h), dk, start_n, stop_n, scaled(dk_acc, scale), shape.BLOCK_N, shape.D, shape.BLOCK_D,
        shape.REST_D, shape.OFFSET,
    )  # fmt: skip
    store_tile(
        slice_of(dv, kv_part, kv_h), dv, start_n, stop_n, dv_acc, shape.BLOCK_N, shape.DV, shape.BLOCK_DV, shape.REST_DV,
        shape.OFFSET,
    )  # fmt: skip
