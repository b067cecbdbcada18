"""The backward pass over key tiles: dK and dV. No atomics: one program owns its keys, for all heads that share them."""

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
def _add_queries(dk, dv, k, v, q, dout, q_ptr, do_ptr, lse, delta, at, start_m, stop_m, is_full, offs_n, b, h, scale,
                 factor, captured, score_mod: tl.constexpr, mask_mod: tl.constexpr, score_mod_grad: tl.constexpr,
                 D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                 BLOCK_M: tl.constexpr, MASKED: tl.constexpr, SCALE_IN_FACTOR: tl.constexpr, PRECISION: tl.constexpr,
                 OFFSET: tl.constexpr):  # fmt: skip
    """dk (before the scale) and dv plus what the queries from `start_m` on contribute. Tiles are transposed."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q_ptr, q, start_m, stop_m, BLOCK_M, D, BLOCK_D, MASKED, OFFSET)
    do_tile = load_tile(do_ptr, dout, start_m, stop_m, BLOCK_M, DV, BLOCK_DV, MASKED, OFFSET)
    lse_i, delta_i = load_row_statistics(lse, delta, at + offs_m, offs_m, stop_m)
    # Both products before the elementwise work, which can then overlap the second.
    qkT = product_transposed(k, q_tile, PRECISION)  # [BLOCK_N, BLOCK_M]
    dpT = product_transposed(v, do_tile, PRECISION)
    q_idx, kv_idx = offs_m[None, :], offs_n[:, None]
    pT, _, dsT, _, _ = score_gradients(
        qkT, dpT, lse_i[None, :], delta_i[None, :], is_full, q_idx, stop_m, b, h, q_idx, kv_idx, scale, factor,
        captured, score_mod, mask_mod, score_mod_grad, MASKED, SCALE_IN_FACTOR,
    )  # fmt: skip
    dv = product(pT.to(do_tile.dtype), do_tile, dv, PRECISION)
    dk = product(dsT.to(q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv


@triton.jit(repr=kernel_name("attention_backward_dkdv"))
def attention_backward_dkdv(q, k, v, dout, dk, dv, lse, delta, lists, captured, L, S, heads, group_size, batches, tiles,
                            scale, score_mod: tl.constexpr, mask_mod: tl.constexpr, score_mod_grad: tl.constexpr,
                            D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPARSE_Q: tl.constexpr,
                            SPARSE_KV: tl.constexpr, LISTED: tl.constexpr, CONTIGUOUS: tl.constexpr,
                            SCALE_IN_FACTOR: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """dk = scale * dS^T q and dv = P^T dout, summed over the `group_size` query heads and the `batches` that share keys.

    Operands as those of `attention_forward`; `lists` are by key block: which query blocks attend to it.
    Grid: `tiles` of keys x Hkv x the keys' batch, in one dimension.
    """
    t = tl.program_id(0) % tiles
    kv_heads = heads // group_size
    kv_b = tl.program_id(0) // tiles // kv_heads
    kv_h = tl.program_id(0) // tiles % kv_heads
    column, start_n, stop_n = tile_of_program(t, S, SPARSE_KV, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k_tile = load_tile(slice_of(k, kv_b, kv_h), k, start_n, stop_n, BLOCK_N, D, BLOCK_D, True, OFFSET)
    v_tile = load_tile(slice_of(v, kv_b, kv_h), v, start_n, stop_n, BLOCK_N, DV, BLOCK_DV, True, OFFSET)
    factor = log2_factor(scale, SCALE_IN_FACTOR)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    for j in tl.range(0, batches * group_size):
        b = kv_b + j // group_size
        h = kv_h * group_size + j % group_size
        q_ptr = slice_of(q, b, h)
        do_ptr = slice_of(dout, b, h)
        at = (b * heads + h).to(tl.int64) * L
        if LISTED:
            partial, n_partial, full, n_full = find_row(lists, b, h, column)
        else:
            partial, n_partial, full, n_full = None, 0, None, 0
        partial_tiles, masked_tiles, plain_tiles = tile_counts(
            full, n_partial, n_full, L, SPARSE_Q, BLOCK_M, LISTED, mask_mod is not None
        )
        for i in tl.range(0, masked_tiles):
            start_m, stop_m, is_full = masked_tile(
                partial, full, i, partial_tiles, plain_tiles, L, SPARSE_Q, BLOCK_M, LISTED, CONTIGUOUS
            )
            dk_acc, dv_acc = _add_queries(
                dk_acc, dv_acc, k_tile, v_tile, q, dout, q_ptr, do_ptr, lse, delta, at, start_m, stop_m, is_full,
                offs_n, b, h, scale, factor, captured, score_mod, mask_mod, score_mod_grad, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_M, True, SCALE_IN_FACTOR, PRECISION, OFFSET,
            )  # fmt: skip
        for i in tl.range(0, plain_tiles):
            start_m = plain_tile(full, i, SPARSE_Q, BLOCK_M, LISTED, CONTIGUOUS)
            dk_acc, dv_acc = _add_queries(
                dk_acc, dv_acc, k_tile, v_tile, q, dout, q_ptr, do_ptr, lse, delta, at, start_m, L, True,
                offs_n, b, h, scale, factor, captured, score_mod, mask_mod, score_mod_grad, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_M, False, SCALE_IN_FACTOR, PRECISION, OFFSET,
            )  # fmt: skip
    store_tile(slice_of(dk, kv_b, kv_h), dk, start_n, stop_n, dk_acc * scale, BLOCK_N, D, BLOCK_D, OFFSET)
    store_tile(slice_of(dv, kv_b, kv_h), dv, start_n, stop_n, dv_acc, BLOCK_N, DV, BLOCK_DV, OFFSET)
