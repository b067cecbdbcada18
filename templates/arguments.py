"""What kernels take as arguments: groups of pointers and strides under one name."""

from __future__ import annotations

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """A tensor [B, H, rows, columns]: pointer, and strides in elements."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_row: Any
    stride_column: Any


class Lists(NamedTuple):
    """Block lists of every row of blocks: counts [B, H, rows] and indices [B, H, rows, columns], contiguous int32.

    `stride_b` and `stride_h` are those of the counts, 0 where the lists are shared; without full blocks their two
    pointers are None.
    """

    partial_count: Any
    partial_index: Any
    partial_columns: Any
    full_count: Any
    full_index: Any
    full_columns: Any
    stride_b: Any
    stride_h: Any


class Order(NamedTuple):
    """The order in which tiles are started: a permutation [tiles] of int32 for every row of block lists."""

    ptr: Any
    stride_b: Any
    stride_h: Any


class Shape(NamedTuple):
    """What a kernel is compiled for; every member is a `tl.constexpr`.

    D, DV: columns of query and key, and of value. BLOCK_D, BLOCK_DV: their widths in a tile, powers of two; REST_D, REST_DV:
    the widths of second pieces, or 0.
    BLOCK_M, BLOCK_N: queries and keys of a tile. SPARSE_Q, SPARSE_KV: those of a block of the mask.
    LISTED: whether there are block lists. CONTIGUOUS: whether the full blocks of each are adjacent, in order.
    SCALE_IN_FACTOR: whether the scale is part of the exponent, see `scores`. PRECISION: see `product`.
    OFFSET: the type of offsets inside a tile. OVERLAP: whether values are added one tile late, see `forward`.
    UPRIGHT: whether tiles of the dK/dV kernel have queries as rows.
    """

    D: Any
    DV: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    REST_D: Any
    REST_DV: Any
    BLOCK_M: Any
    BLOCK_N: Any
    SPARSE_Q: Any
    SPARSE_KV: Any
    LISTED: Any
    CONTIGUOUS: Any
    SCALE_IN_FACTOR: Any
    PRECISION: Any
    OFFSET: Any
    OVERLAP: Any
    UPRIGHT: Any
