"""Loads and stores of tiles: rows of a matrix, padded to a power of two columns.

Rows are read through pointers, or by the tensor memory accelerator (TMA), given a descriptor: then there are no addresses
to compute, and what lies outside the matrix reads as zero by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slice_of(matrix, b, h):
    """Pointer to the first element of one batch entry and head."""
    return matrix.ptr + b.to(tl.int64) * matrix.stride_b + h.to(tl.int64) * matrix.stride_h


@triton.jit
def rows_of(matrix, descriptor, b, h):
    """One batch entry and head, as `load_tile` takes it: a pointer, or a descriptor and the first two of its indices."""
    if descriptor is None:
        return slice_of(matrix, b, h), None, 0, 0
    else:
        # An axis that is shared has one entry in the descriptor.
        return matrix.ptr, descriptor, tl.where(matrix.stride_b == 0, 0, b), tl.where(matrix.stride_h == 0, 0, h)


@triton.jit
def load_tile(source, matrix, start, stop, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
              BOUNDED: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """[ROWS, WIDTH]: rows from `start` on of a matrix with COLUMNS columns, 0 where there is no element.

    `source` is what `rows_of` gave. Rows from `stop` on do not exist; they are checked only if BOUNDED. A descriptor goes
    by the matrix's end instead. OFFSET is the type of offsets inside a tile.
    """
    if source[1] is not None:
        return source[1].load([source[2], source[3], start, 0]).reshape([ROWS, WIDTH])
    else:
        rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        # One 64-bit scalar that changes with the tile, and offsets that a loop can keep.
        at = (source[0] + start.to(tl.int64) * matrix.stride_row) + _offsets(rows, columns, matrix, OFFSET)
        if BOUNDED:
            if COLUMNS != WIDTH:
                return tl.load(at, mask=(start + rows[:, None] < stop) & (columns[None, :] < COLUMNS), other=0.0)
            else:
                return tl.load(at, mask=start + rows[:, None] < stop, other=0.0)
        else:
            if COLUMNS != WIDTH:
                return tl.load(at, mask=columns[None, :] < COLUMNS, other=0.0)
            else:
                return tl.load(at)


@triton.jit
def store_tile(ptr, matrix, start, stop, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
               OFFSET: tl.constexpr):  # fmt: skip
    """Write a tile, as far as it lies inside the matrix."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = (ptr + start.to(tl.int64) * matrix.stride_row) + _offsets(rows, columns, matrix, OFFSET)
    inside = (start + rows[:, None] < stop) & (columns[None, :] < COLUMNS)
    tl.store(at, tile.to(at.dtype.element_ty), mask=inside)


@triton.jit
def add_rows(ptr, descriptor, start, tile, WIDTH: tl.constexpr):
    """Add a tile to rows from `start` on of a contiguous matrix [., WIDTH], atomically; all of them exist."""
    if descriptor is None:
        at = tl.arange(0, tile.shape[0])[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.atomic_add(ptr + start.to(tl.int64) * WIDTH + at, tile, sem="relaxed")
    else:
        descriptor.atomic_add([start.to(tl.int32), 0], tile)


@triton.jit
def _offsets(rows, columns, matrix, OFFSET: tl.constexpr):
    return rows.to(OFFSET)[:, None] * matrix.stride_row + columns.to(OFFSET)[None, :] * matrix.stride_column
