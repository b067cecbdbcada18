"""Loads and stores of tiles: rows of a matrix, as pieces of columns, each padded to a power of two.

One piece, or two where that wastes less: 80 columns as 64 and 16. Functions take and give tuples of pieces.

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
def rows_of(matrix, descriptor, rest, b, h):
    """One batch entry and head, as `load_tile` takes it: a pointer, or the first two indices of descriptors, and these.

    `descriptor` reads the first piece of columns, and `rest` the second, if there is one. What there is not is left out:
    Triton 3.6 has no None among results.
    """
    if descriptor is None:
        return (slice_of(matrix, b, h),)
    else:
        # An axis that is shared has one entry in the descriptor.
        at_b, at_h = tl.where(matrix.stride_b == 0, 0, b), tl.where(matrix.stride_h == 0, 0, h)
        if rest is None:
            return at_b, at_h, descriptor
        else:
            return at_b, at_h, descriptor, rest


@triton.jit
def load_tile(source, matrix, start, stop, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
              REST: tl.constexpr, BOUNDED: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """Pieces [ROWS, WIDTH] and, unless REST is 0, [ROWS, REST]: rows from `start` on of a matrix with COLUMNS columns, 0
    where there is no element.

    `source` is what `rows_of` gave. Rows from `stop` on do not exist; they are checked only if BOUNDED. A descriptor goes
    by the matrix's end instead. OFFSET is the type of offsets inside a tile.
    """
    if REST == 0:
        return (_load_piece(source, 2, matrix, start, stop, ROWS, COLUMNS, WIDTH, 0, BOUNDED, OFFSET),)
    else:
        return (
            _load_piece(source, 2, matrix, start, stop, ROWS, COLUMNS, WIDTH, 0, BOUNDED, OFFSET),
            _load_piece(source, 3, matrix, start, stop, ROWS, COLUMNS, REST, WIDTH, BOUNDED, OFFSET),
        )


@triton.jit
def _load_piece(source, PLACE: tl.constexpr, matrix, start, stop, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                WIDTH: tl.constexpr, FIRST: tl.constexpr, BOUNDED: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """The columns from FIRST on, which are WIDTH; PLACE is that of their descriptor, if there are any."""
    if len(source) > 1:
        return source[PLACE].load([source[0], source[1], start, FIRST]).reshape([ROWS, WIDTH])
    else:
        rows, columns = tl.arange(0, ROWS), FIRST + tl.arange(0, WIDTH)
        # One 64-bit scalar that changes with the tile, and offsets that a loop can keep.
        at = (source[0] + start.to(tl.int64) * matrix.stride_row) + _offsets(rows, columns, matrix, OFFSET)
        if BOUNDED:
            if FIRST + WIDTH > COLUMNS:
                return tl.load(at, mask=(start + rows[:, None] < stop) & (columns[None, :] < COLUMNS), other=0.0)
            else:
                return tl.load(at, mask=start + rows[:, None] < stop, other=0.0)
        else:
            if FIRST + WIDTH > COLUMNS:
                return tl.load(at, mask=columns[None, :] < COLUMNS, other=0.0)
            else:
                return tl.load(at)


@triton.jit
def store_tile(ptr, matrix, start, stop, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
               REST: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """Write the pieces of a tile, as far as it lies inside the matrix."""
    _store_piece(ptr, matrix, start, stop, tile[0], ROWS, COLUMNS, WIDTH, 0, OFFSET)
    if REST != 0:
        _store_piece(ptr, matrix, start, stop, tile[1], ROWS, COLUMNS, REST, WIDTH, OFFSET)


@triton.jit
def _store_piece(ptr, matrix, start, stop, piece, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
                 FIRST: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), FIRST + tl.arange(0, WIDTH)
    at = (ptr + start.to(tl.int64) * matrix.stride_row) + _offsets(rows, columns, matrix, OFFSET)
    inside = (start + rows[:, None] < stop) & (columns[None, :] < COLUMNS)
    tl.store(at, piece.to(at.dtype.element_ty), mask=inside)


@triton.jit
def add_rows(ptr, descriptor, rest, start, tile, WIDTH: tl.constexpr, REST: tl.constexpr):
    """Add the pieces of a tile to rows from `start` on of a contiguous matrix [., WIDTH + REST], atomically; all exist."""
    _add_piece(ptr, descriptor, start, tile[0], WIDTH, 0, WIDTH + REST)
    if REST != 0:
        _add_piece(ptr, rest, start, tile[1], REST, WIDTH, WIDTH + REST)


@triton.jit
def _add_piece(ptr, descriptor, start, piece, WIDTH: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    if descriptor is None:
        at = tl.arange(0, piece.shape[0])[:, None] * COLUMNS + FIRST + tl.arange(0, WIDTH)[None, :]
        tl.atomic_add(ptr + start.to(tl.int64) * COLUMNS + at, piece, sem="relaxed")
    else:
        descriptor.atomic_add([start.to(tl.int32), FIRST], piece)


@triton.jit
def _offsets(rows, columns, matrix, OFFSET: tl.constexpr):
    return rows.to(OFFSET)[:, None] * matrix.stride_row + columns.to(OFFSET)[None, :] * matrix.stride_column
