"""Loads and stores of tiles: rows of a matrix, padded to a power of two columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slice_of(matrix, b, h):
    """Pointer to the first element of one batch entry and head."""
    return matrix.ptr + b.to(tl.int64) * matrix.stride_b + h.to(tl.int64) * matrix.stride_h


@triton.jit
def load_tile(ptr, matrix, start, stop, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
              BOUNDED: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """[ROWS, WIDTH]: rows from `start` on of a matrix with COLUMNS columns, 0 where there is no element.

    Rows from `stop` on do not exist; they are checked only if BOUNDED. OFFSET is the type of offsets inside a tile.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    # One 64-bit scalar that changes with the tile, and offsets that a loop can keep.
    at = (ptr + start.to(tl.int64) * matrix.stride_row) + _offsets(rows, columns, matrix, OFFSET)
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
def _offsets(rows, columns, matrix, OFFSET: tl.constexpr):
    return rows.to(OFFSET)[:, None] * matrix.stride_row + columns.to(OFFSET)[None, :] * matrix.stride_column
