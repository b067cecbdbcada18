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
