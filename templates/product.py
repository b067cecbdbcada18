"""Products of tiles on the matrix units, accumulated in float32. Tiles that have head dimensions come in pieces of columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b. PRECISION is how float32 is multiplied, "ieee" or "tf32".

    "raised" multiplies operands of any type as float32: Triton's interpreter (3.7) takes bfloat16 for integers.
    """
    if PRECISION == "raised":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, for the pieces of b."""
    if len(b) == 1:
        return (_dot(a, b[0], acc[0], PRECISION),)
    else:
        return _dot(a, b[0], acc[0], PRECISION), _dot(a, b[1], acc[1], PRECISION)


@triton.jit
def transposed_product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a^T @ b, for the pieces of b."""
    return product(tl.trans(a), b, acc, PRECISION)


@triton.jit
def product_transposed(a, b, PRECISION: tl.constexpr):
    """a @ b^T, summed over the pieces of both."""
    qk = _dot(a[0], tl.trans(b[0]), None, PRECISION)
    if len(a) == 2:
        qk = _dot(a[1], tl.trans(b[1]), qk, PRECISION)
    return qk


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    """Pieces to accumulate in."""
    if REST == 0:
        return (tl.zeros([ROWS, WIDTH], tl.float32),)
    else:
        return tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, REST], tl.float32)


@triton.jit
def scaled(tile, factor):
    """tile * factor, for its pieces; the factor is a number, or one for each row, [ROWS, 1]."""
    if len(tile) == 1:
        return (tile[0] * factor,)
    else:
        return tile[0] * factor, tile[1] * factor
