"""Loads and stores of tiles: rows of a matrix, padded to a power of two columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slice_of(matrix, b, h):
    """Pointer to the first element of one batch entry and head."""
    return matrix.ptr + b.to(tl.int64) * matrix.stride_b + h.to(tl.int64) * matrix.stride_h


@triton.jit
def load_tile(ptr, matrix, rows, stop, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BOUNDED: tl.constexpr):
    """[len(rows), BLOCK]: `rows` of a matrix with COLUMNS columns, 0 where there is no element.

    Rows from `stop` on do not exist; they are checked only if BOUNDED.
    """
    columns = tl.arange(0, BLOCK)
    at = ptr + rows[:, None] * matrix.stride_row + columns[None, :] * matrix.stride_column
    if BOUNDED:
        if COLUMNS != BLOCK:
            return tl.load(at, mask=(rows[:, None] < stop) & (columns[None, :] < COLUMNS), other=0.0)
        else:
            return tl.load(at, mask=rows[:, None] < stop, other=0.0)
    else:
        if COLUMNS != BLOCK:
            return tl.load(at, mask=columns[None, :] < COLUMNS, other=0.0)
        else:
            return tl.load(at)


@triton.jit
def store_tile(ptr, matrix, rows, stop, tile, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Write a tile, as far as it lies inside the matrix."""
    columns = tl.arange(0, BLOCK)
    at = ptr + rows[:, None] * matrix.stride_row + columns[None, :] * matrix.stride_column
    inside = (rows[:, None] < stop) & (columns[None, :] < COLUMNS)
    tl.store(at, tile.to(at.dtype.element_ty), mask=inside)
