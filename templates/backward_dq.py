"""The backward pass over query tiles: dQ, and the gradients of captured tensors."""

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
def _add_keys(dq, q, do, lse_i, delta_i, k, v, k_ptr, v_ptr, start_n, stop_n, is_full, offs_m, stop_m, b, h, scale,
              factor, captured, dcaptured, score_mod: tl.constexpr, mask_mod: tl.constexpr,
              score_mod_grad: tl.constexpr, captured_grads: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
              SCALE_IN_FACTOR: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """dq plus what the keys from `start_n` on contribute, before the scale."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k_ptr, k, start_n, stop_n, BLOCK_N, D, BLOCK_D, MASKED, OFFSET)
    v_tile = load_tile(v_ptr, v, start_n, stop_n, BLOCK_N, DV, BLOCK_DV, MASKED, OFFSET)
    # Both products before the elementwise work, which can then overlap the second.
    qk = product_transposed(q, k_tile, PRECISION)  # [BLOCK_M, BLOCK_N]
    dp = product_transposed(do, v_tile, PRECISION)
    q_idx, kv_idx = offs_m[:, None], offs_n[None, :]
    _, dmodified, ds, raw, keep = score_gradients(
        qk, dp, lse_i[:, None], delta_i[:, None], is_full, kv_idx, stop_n, b, h, q_idx, kv_idx, scale, factor, captured,
        score_mod, mask_mod, score_mod_grad, MASKED, SCALE_IN_FACTOR,
    )  # fmt: skip
    if captured_grads is not None:
        counted = tl.broadcast_to(q_idx < stop_m, qk.shape) & keep
        captured_grads(dmodified, raw, b, h, q_idx, kv_idx, counted, captured, dcaptured, 0)
    return product(ds.to(k_tile.dtype), k_tile, dq, PRECISION)


@triton.jit(repr=kernel_name("attention_backward_dq"))
def attention_backward_dq(q, k, v, dout, dq, lse, delta, lists, captured, dcaptured, L, S, heads, group_size,
                          tiles, scale, score_mod: tl.constexpr, mask_mod: tl.constexpr, score_mod_grad: tl.constexpr,
                          captured_grads: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                          BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPARSE_Q: tl.constexpr,
                          SPARSE_KV: tl.constexpr, LISTED: tl.constexpr, CONTIGUOUS: tl.constexpr,
                          SCALE_IN_FACTOR: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """dq = scale * dS k, and dcaptured += the gradient of every load of the attended elements.

    Operands and grid as those of `attention_forward`; lse and delta [B, Hq, L], contiguous float32.
    """
    t = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    b = bh // heads
    h = bh % heads
    kv_h = h // group_size
    row, start_m, stop_m = tile_of_program(t, L, SPARSE_Q, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    k_ptr = slice_of(k, b, kv_h)
    v_ptr = slice_of(v, b, kv_h)
    q_tile = load_tile(slice_of(q, b, h), q, start_m, stop_m, BLOCK_M, D, BLOCK_D, True, OFFSET)
    do_tile = load_tile(slice_of(dout, b, h), dout, start_m, stop_m, BLOCK_M, DV, BLOCK_DV, True, OFFSET)
    lse_i, delta_i = load_row_statistics(lse, delta, bh.to(tl.int64) * L + offs_m, offs_m, stop_m)
    factor = log2_factor(scale, SCALE_IN_FACTOR)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if LISTED:
        partial, n_partial, full, n_full = find_row(lists, b, h, row)
    else:
        partial, n_partial, full, n_full = None, 0, None, 0
    partial_tiles, masked_tiles, plain_tiles = tile_counts(
        full, n_partial, n_full, S, SPARSE_KV, BLOCK_N, LISTED, mask_mod is not None
    )
    for i in tl.range(0, masked_tiles):
        start_n, stop_n, is_full = masked_tile(
            partial, full, i, partial_tiles, plain_tiles, S, SPARSE_KV, BLOCK_N, LISTED, CONTIGUOUS
        )
        acc = _add_keys(
            acc, q_tile, do_tile, lse_i, delta_i, k, v, k_ptr, v_ptr, start_n, stop_n, is_full, offs_m, stop_m, b, h,
            scale, factor, captured, dcaptured, score_mod, mask_mod, score_mod_grad, captured_grads, D, DV, BLOCK_D,
            BLOCK_DV, BLOCK_N, True, SCALE_IN_FACTOR, PRECISION, OFFSET,
        )  # fmt: skip
    for i in tl.range(0, plain_tiles):
        start_n = plain_tile(full, i, SPARSE_KV, BLOCK_N, LISTED, CONTIGUOUS)
        acc = _add_keys(
            acc, q_tile, do_tile, lse_i, delta_i, k, v, k_ptr, v_ptr, start_n, S, True, offs_m, stop_m, b, h,
            scale, factor, captured, dcaptured, score_mod, mask_mod, score_mod_grad, captured_grads, D, DV, BLOCK_D,
            BLOCK_DV, BLOCK_N, False, SCALE_IN_FACTOR, PRECISION, OFFSET,
        )  # fmt: skip
    store_tile(slice_of(dq, b, h), dq, start_m, stop_m, acc * scale, BLOCK_M, D, BLOCK_D, OFFSET)
