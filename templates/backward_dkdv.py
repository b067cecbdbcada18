"""The backward pass over key tiles: dK, dV, and what columns of scores give to captured tensors.

No atomics: one program owns its keys, for all heads that share them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .block_walk import find_row, masked_tile, plain_tile, tile_counts, tile_of_program
from .gradient import load_row_statistics, score_gradients
from .memory import load_tile, slice_of, store_tile
from .names import kernel_name
from .product import product, product_transposed
from .scores import log2_factor


@triton.jit
def _add_queries(dk_acc, dv_acc, sums, k_tile, v_tile, q, dout, q_ptr, do_ptr, lse, delta, at, start_m, stop_m, is_full,
                 offs_n, b, h, scale, factor, captured, shape, score_mod: tl.constexpr, mask_mod: tl.constexpr,
                 score_mod_grad: tl.constexpr, column_grads: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """dk (before the scale), dv and the sums plus what the queries from `start_m` on contribute. Tiles are transposed."""
    offs_m = start_m + tl.arange(0, shape.BLOCK_M)
    q_idx, kv_idx = offs_m[None, :], offs_n[:, None]
    q_tile = load_tile(q_ptr, q, start_m, stop_m, shape.BLOCK_M, shape.D, shape.BLOCK_D, MASKED, shape.OFFSET)
    do_tile = load_tile(do_ptr, dout, start_m, stop_m, shape.BLOCK_M, shape.DV, shape.BLOCK_DV, MASKED, shape.OFFSET)
    lse_i, delta_i = load_row_statistics(lse, delta, at + offs_m, offs_m, stop_m)
    # Both products before the elementwise work, which can then overlap the second.
    qkT = product_transposed(k_tile, q_tile, shape.PRECISION)  # [BLOCK_N, BLOCK_M]
    dpT = product_transposed(v_tile, do_tile, shape.PRECISION)
    pT, dmodified, dsT, raw, keep = score_gradients(
        qkT, dpT, lse_i[None, :], delta_i[None, :], is_full, q_idx, stop_m, b, h, q_idx, kv_idx, scale, factor,
        captured, shape, score_mod, mask_mod, score_mod_grad, MASKED,
    )  # fmt: skip
    if column_grads is not None:
        sums = column_grads(sums, dmodified, raw, b, h, q_idx, kv_idx, keep, captured)
    dv_acc = product(pT.to(do_tile.dtype), do_tile, dv_acc, shape.PRECISION)
    dk_acc = product(dsT.to(q_tile.dtype), q_tile, dk_acc, shape.PRECISION)
    return dk_acc, dv_acc, sums


@triton.jit(repr=kernel_name("attention_backward_dkdv"))
def attention_backward_dkdv(q, k, v, dout, dk, dv, lse, delta, lists, captured, column_sums, L, S, heads, group_size,
                            batches, tiles, scale, shape, score_mod: tl.constexpr, mask_mod: tl.constexpr,
                            score_mod_grad: tl.constexpr, column_grads: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """dk = scale * dS^T q and dv = P^T dout, summed over the `group_size` query heads and the `batches` that share keys.

    The gradients of COLUMNS loads, summed over the queries, go to `column_sums`, each [B, Hq, S], contiguous float32.
    Operands as those of `attention_forward`; `lists` are by key block: which query blocks attend to it.
    Grid: `tiles` of keys x Hkv x the keys' batch, in one dimension.
    """
    t = tl.program_id(0) % tiles
    kv_heads = heads // group_size
    kv_b = tl.program_id(0) // tiles // kv_heads
    kv_h = tl.program_id(0) // tiles % kv_heads
    column, start_n, stop_n = tile_of_program(t, S, shape.SPARSE_KV, shape.BLOCK_N)
    offs_n = start_n + tl.arange(0, shape.BLOCK_N)
    k_tile = load_tile(
        slice_of(k, kv_b, kv_h), k, start_n, stop_n, shape.BLOCK_N, shape.D, shape.BLOCK_D, True, shape.OFFSET
    )
    v_tile = load_tile(
        slice_of(v, kv_b, kv_h), v, start_n, stop_n, shape.BLOCK_N, shape.DV, shape.BLOCK_DV, True, shape.OFFSET
    )
    factor = log2_factor(scale, shape.SCALE_IN_FACTOR)
    dk_acc = tl.zeros([shape.BLOCK_N, shape.BLOCK_D], tl.float32)
    dv_acc = tl.zeros([shape.BLOCK_N, shape.BLOCK_DV], tl.float32)

    for j in tl.range(0, batches * group_size):
        b = kv_b + j // group_size
        h = kv_h * group_size + j % group_size
        q_ptr, do_ptr = slice_of(q, b, h), slice_of(dout, b, h)
        bh = (b * heads + h).to(tl.int64)
        at = bh * L
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
                dk_acc, dv_acc, sums, k_tile, v_tile, q, dout, q_ptr, do_ptr, lse, delta, at, start_m, stop_m, is_full,
                offs_n, b, h, scale, factor, captured, shape, score_mod, mask_mod, score_mod_grad, column_grads, True,
            )  # fmt: skip
        for i in tl.range(0, plain_tiles):
            start_m = plain_tile(full, i, shape.SPARSE_Q, shape.BLOCK_M, shape.LISTED, shape.CONTIGUOUS)
            dk_acc, dv_acc, sums = _add_queries(
                dk_acc, dv_acc, sums, k_tile, v_tile, q, dout, q_ptr, do_ptr, lse, delta, at, start_m, L, True,
                offs_n, b, h, scale, factor, captured, shape, score_mod, mask_mod, score_mod_grad, column_grads, False,
            )  # fmt: skip
        for i in tl.static_range(COLUMNS):
            tl.store(column_sums[i] + bh * S + offs_n, sums[i], mask=offs_n < stop_n)
    store_tile(
        slice_of(dk, kv_b, kv_h), dk, start_n, stop_n, dk_acc * scale, shape.BLOCK_N, shape.D, shape.BLOCK_D,
        shape.OFFSET,
    )  # fmt: skip
    store_tile(
        slice_of(dv, kv_b, kv_h), dv, start_n, stop_n, dv_acc, shape.BLOCK_N, shape.DV, shape.BLOCK_DV, shape.OFFSET
    )
