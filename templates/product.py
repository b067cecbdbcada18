"""Products of tiles on the matrix units, accumulated in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b. PRECISION is how float32 is multiplied, "ieee" or "tf32".

    "raised" multiplies operands of any type as float32: Triton's interpreter (3.7) takes bfloat16 for integers.
    """
    if PRECISION == "raised":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product_transposed(a, b, PRECISION: tl.constexpr):
    """a @ b^T."""
    if PRECISION == "raised":
        return tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), input_precision="ieee")
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def transposed_product(a, b, PRECISION: tl.constexpr):
    """a^T @ b."""
    if PRECISION == "raised":
        return tl.dot(tl.trans(a.to(tl.float32)), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(tl.trans(a), b, input_precision=PRECISION)
