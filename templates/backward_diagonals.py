"""The last backward kernel, where a captured tensor is read along diagonals: the sums of tiles become those of heads."""

from __future__ import annotations

import triton
import triton.language as tl

from .block_walk import tile_of_program
from .names import kernel_name


@triton.jit(repr=kernel_name("attention_diagonals"))
def attention_diagonals(workspace, sums, part, programs, L, S, tiles, first_head, blocks, shape, SIZE: tl.constexpr):
    """sums += those of the `programs` of a part. sums [B * Hq, L + S - 1], contiguous float32: by kv_idx - q_idx + L - 1.

    `workspace` holds what `store_diagonals` wrote, `tiles` query tiles a head. Grid: `blocks` of SIZE diagonals x the heads
    of the part, of which `first_head` is the first.
    """
    M: tl.constexpr = shape.BLOCK_M
    N: tl.constexpr = shape.BLOCK_N
    TILES: tl.constexpr = (shape.SPARSE_KV + N - 1) // N  # of a block of keys
    WRAPS: tl.constexpr = (M + 2 * N - 2) // N
    head = first_head + tl.program_id(0) // blocks
    lowest = tl.program_id(0) % blocks * SIZE - (L - 1)
    diagonal = lowest + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    begin = tl.maximum(part.first, head * tiles)
    end = tl.minimum(part.first + programs, (head + 1) * tiles)
    for program in tl.range(begin, end):
        _, start_m, _ = tile_of_program(program - head * tiles, L, shape.SPARSE_Q, M)
        row = workspace + (program - part.first).to(tl.int64) * part.slots * (WRAPS * N)
        for w in tl.static_range(WRAPS):
            # Diagonals of key tiles that begin at start_n stand at diagonal + start_m + w * N - start_n, below N.
            reach = lowest + start_m + w * N
            block = tl.maximum(reach - TILES * N, 0) // shape.SPARSE_KV
            last = tl.maximum(reach + SIZE - 1, 0) // shape.SPARSE_KV
            for slot in tl.range(block * TILES, tl.minimum((last + 1) * TILES, part.slots)):
                start_n = slot // TILES * shape.SPARSE_KV + slot % TILES * N
                at = diagonal + start_m + w * N - start_n
                inside = (at >= 0) & (at < N)
                total += tl.load(row + slot * (WRAPS * N) + w * N + at, mask=inside, other=0.0)
    offsets = head.to(tl.int64) * (L + S - 1) + diagonal + L - 1
    exists = diagonal < S
    tl.store(sums + offsets, tl.load(sums + offsets, mask=exists, other=0.0) + total, mask=exists)
