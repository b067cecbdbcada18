"""Which tiles a program visits: the blocks that lists name, or everything where there are no lists.

A row of blocks is walked in two phases. The *masked* phase takes the partial blocks, and what needs a bounds check: the
last block where the length is no multiple of the block, and every block where the block is none. The *plain* phase takes
the other full blocks; its inner loop has neither masks nor bounds.

SPARSE is the size of a block and TILE that of a tile, along the axis that is walked, of length `length`.
Lists are in ascending order where the length is no multiple of SPARSE, so that the last block is the last one listed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_row(lists, b, h, row, LISTED: tl.constexpr):
    """Where one row's lists begin, and how many blocks they have: partial, its count, full, its count."""
    if LISTED:
        at = b.to(tl.int64) * lists.stride_b + h * lists.stride_h + row
        partial = lists.partial_index + at * lists.partial_columns
        n_partial = tl.load(lists.partial_count + at)
        if lists.full_count is None:
            return partial, n_partial, partial, n_partial * 0
        else:
            full = lists.full_index + at * lists.full_columns
            return partial, n_partial, full, tl.load(lists.full_count + at)
    else:
        return 0, 0, 0, 0


@triton.jit
def tile_counts(full, n_partial, n_full, length, SPARSE: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr,
                MASKED: tl.constexpr):  # fmt: skip
    """How many tiles are partial, how many the masked phase has, how many the plain phase has.

    Without lists (LISTED false) everything is partial if MASKED, and full if not.
    """
    TILES: tl.constexpr = (SPARSE + TILE - 1) // TILE
    if LISTED:
        partial_tiles = n_partial * TILES
        if SPARSE % TILE != 0:
            return partial_tiles, partial_tiles + n_full * TILES, n_full * 0
        else:
            last = (length - 1) // SPARSE
            ragged = length % SPARSE != 0
            listed_last = tl.load(full + n_full - 1, mask=(n_full > 0) & ragged, other=-1)
            edge = (listed_last == last).to(tl.int32)
            return partial_tiles, partial_tiles + edge * TILES, (n_full - edge) * TILES
    else:
        whole = length // TILE
        ragged = (length + TILE - 1) // TILE - whole
        if MASKED:
            return whole + ragged, whole + ragged, whole * 0
        else:
            return whole * 0, ragged, whole


@triton.jit
def masked_tile(partial, full, i, partial_tiles, plain_tiles, length, SPARSE: tl.constexpr, TILE: tl.constexpr,
                LISTED: tl.constexpr):  # fmt: skip
    """Tile `i` of the masked phase: its first index, the index it ends before, whether its block is full."""
    TILES: tl.constexpr = (SPARSE + TILE - 1) // TILE
    is_full = i >= partial_tiles
    if LISTED:
        block = tl.load(partial + i // TILES, mask=is_full == 0, other=0)
        # Full blocks come here all, in order, or only the last one, after the tiles of the plain phase.
        listed = tl.load(full + (i - partial_tiles + plain_tiles) // TILES, mask=is_full, other=0)
        block = tl.where(is_full, listed, block)
        start = block * SPARSE + (i % TILES) * TILE
        return start, tl.minimum(length, (block + 1) * SPARSE), is_full
    else:
        return tl.where(is_full, plain_tiles, i) * TILE, length, is_full


@triton.jit
def first_tile(partial, full, partial_tiles, masked_tiles, plain_tiles, length, SPARSE: tl.constexpr, TILE: tl.constexpr,
               LISTED: tl.constexpr):  # fmt: skip
    """The first tile of the walk, of either phase, as `masked_tile` gives it; if there is none, one beyond the end."""
    exists = masked_tiles + plain_tiles > 0
    is_full = partial_tiles == 0
    start, stop = length, length
    if LISTED:
        # The masked phase begins with a full block only if that is the last one listed.
        at = tl.where(masked_tiles > 0, plain_tiles // (SPARSE // TILE), 0)
        block = tl.load(partial, mask=is_full == 0, other=0)
        block = tl.where(is_full, tl.load(full + at, mask=is_full & exists, other=0), block)
        start, stop = block * SPARSE, tl.minimum(length, (block + 1) * SPARSE)
    else:
        start = tl.where(is_full & (masked_tiles > 0), plain_tiles * TILE, 0)
    return tl.where(exists, start, length), stop, is_full


@triton.jit
def plain_tile(full, i, SPARSE: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """The first index of tile `i` of the plain phase. CONTIGUOUS: full blocks are adjacent, and counted, not read."""
    TILES: tl.constexpr = SPARSE // TILE
    if LISTED:
        if CONTIGUOUS:
            return tl.load(full) * SPARSE + i * TILE
        else:
            return tl.load(full + i // TILES) * SPARSE + (i % TILES) * TILE
    else:
        return i * TILE


@triton.jit
def tile_bounds(t, length, SPARSE: tl.constexpr, TILE: tl.constexpr):
    """Tile `t` of the axis that programs divide: its block, its first index, the index it ends before."""
    TILES: tl.constexpr = (SPARSE + TILE - 1) // TILE
    block = t // TILES
    start = block * SPARSE + (t % TILES) * TILE
    return block, start, tl.minimum(length, (block + 1) * SPARSE)
