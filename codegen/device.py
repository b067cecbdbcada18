"""Device functions that generated code calls where Triton has no operation with torch's meaning.

Written in Triton's own operations, so that the compiler, for any target, and the interpreter compute the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HALF_PI = tl.constexpr(1.5707963267948966)
QUARTER_PI = tl.constexpr(0.7853981633974483)
ROUNDING = tl.constexpr(8388608.0)  # 2**23: float32 has no fractions from here on
ROUNDING_FLOAT64 = tl.constexpr(4503599627370496.0)  # 2**52


@triton.jit
def wrap_index(index, size):
    """`index` as torch reads it, -1 being the last element; out of range, the nearest element that exists."""
    index = tl.where(index < 0, index + size, index)
    return tl.minimum(tl.maximum(index, 0), size - 1)


@triton.jit
def bound_index(index, size):
    """`wrap_index` of an index that is never negative."""
    return tl.minimum(index, size - 1)


@triton.jit
def floor_divide(x, y):
    """Integer division that rounds down; Triton's own rounds towards zero."""
    quotient = x // y
    remainder = x - quotient * y
    return tl.where((remainder != 0) & ((remainder < 0) != (y < 0)), quotient - 1, quotient)


@triton.jit
def remainder(x, y):
    """Integer remainder with the sign of the divisor; Triton's own has that of the dividend."""
    result = x % y
    return tl.where((result != 0) & ((result < 0) != (y < 0)), result + y, result)


@triton.jit
def truncate(x):
    """The integer next to `x` towards zero."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def fmod(x, y):
    """Remainder of floats with the sign of the dividend; in float64, where the quotient of two float32 is not rounded up."""
    wide, by = x.to(tl.float64), y.to(tl.float64)
    finite = wide - truncate(wide / by) * by
    return tl.where(tl.abs(by) == float("inf"), wide + (wide - wide), finite).to(x.dtype)


@triton.jit
def float_remainder(x, y):
    """Remainder of floats with the sign of the divisor, as `fmod`."""
    wide, by = x.to(tl.float64), y.to(tl.float64)
    finite = wide - tl.floor(wide / by) * by
    infinite = tl.where((wide != 0) & ((wide < 0) != (by < 0)), by, wide) + (wide - wide)
    return tl.where(tl.abs(by) == float("inf"), infinite, finite).to(x.dtype)


@triton.jit
def float_floor_divide(x, y):
    """Quotient of floats, rounded down, as `fmod`."""
    wide, by = x.to(tl.float64), y.to(tl.float64)
    quotient = tl.floor(wide / by)
    below = (tl.abs(by) == float("inf")) & (wide != 0) & ((wide < 0) != (by < 0))  # a quotient of -0, rounded down
    return tl.where(below & (quotient == 0), -1.0, quotient).to(x.dtype)


@triton.jit
def round_even(x):
    """The nearest integer, ties to even."""
    whole: tl.constexpr = ROUNDING_FLOAT64 if x.dtype == tl.float64 else ROUNDING
    magnitude = tl.abs(x)
    rounded = (magnitude + whole) - whole
    return tl.where(magnitude < whole, tl.where(x < 0, -rounded, rounded), x)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for nan."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def shift_left(x, y, BITS: tl.constexpr):
    """`x << y`, and 0 for a shift that is negative or as wide as the type."""
    inside = (y >= 0) & (y < BITS)
    return tl.where(inside, x << tl.where(inside, y, 0), 0)


@triton.jit
def shift_right(x, y, BITS: tl.constexpr):
    """`x >> y`; shifted out entirely for a shift that is negative or as wide as the type."""
    inside = (y >= 0) & (y < BITS)
    return x >> tl.where(inside, y, BITS - 1)


@triton.jit
def store_diagonals(sums, firsts, x, first, tile):
    """Store the sums along the diagonals of a tile [M, N] as number `tile` of a workspace, and what diagonal is the `first`.

    Entry (WRAPS - 1 - w) * N + c, in order, is the sum of all x[i, j] with j - i = c - w * N; WRAPS is as many multiples of N
    as hold M + N - 1 entries. `first` is kv_idx - q_idx of x[0, 0].
    """
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    WRAPS: tl.constexpr = (M + 2 * N - 2) // N
    column = tl.arange(0, N)
    along = tl.arange(0, M)[:, None] + column[None, :]  # i + c, which is j + w * N
    skewed = tl.gather(x, along % N, 1)
    at = sums + tile * (WRAPS * N) + column
    for w in tl.static_range(WRAPS):
        tl.store(at + (WRAPS - 1 - w) * N, tl.sum(tl.where(along // N == w, skewed, 0.0), 0))
    tl.store(firsts + tile, first - (WRAPS - 1) * N)


@triton.jit
def store_elements(values, entries, x, entry, tile):
    """Store a tile [M, N], and the entry that each element belongs to, as number `tile` of two workspaces."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    at = tile * (M * N) + (tl.arange(0, M) * N)[:, None] + tl.arange(0, N)[None, :]
    tl.store(values + at, x)
    tl.store(entries + at, tl.broadcast_to(entry, x.shape))


@triton.jit
def tanh(x):
    """Hyperbolic tangent, to a few roundings relative to the result."""
    t = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    large = (1 - t) / (1 + t)
    s = x * x
    # Taylor series: below 0.25 the terms left out are smaller than a rounding.
    series = s * (-0.3333333333333 + s * (0.1333333333333 + s * (-0.0539682539683 + s * 0.0218694885362)))
    return tl.where(tl.abs(x) < 0.25, x + x * series, tl.where(x < 0, -large, large))


@triton.jit
def fast_tanh(x):
    """Hyperbolic tangent of float32 by the one instruction that NVIDIA's GPUs have: a relative error of 2^-11 (PTX manual)."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x.to(tl.float32)], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation near zero."""
    t = tanh(x * 0.5)
    return tl.where(tl.abs(x) < 0.5, 2 * t / (1 - t), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """log(1 + x) without cancellation near zero: the rounding error of 1 + x is divided out (Kahan)."""
    u = 1 + x
    exact = (u == 1) | (u == float("inf"))
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + tl.exp2(x * -LOG2E))


@triton.jit
def atan(x):
    """Inverse tangent: argument brought below tan(pi/8), then the polynomial of Cephes' atanf (Moshier)."""
    a = tl.abs(x)
    far = a > 2.414213562373095
    near = a < 0.4142135623730950
    z = tl.where(far, -1 / a, tl.where(near, a, (a - 1) / (a + 1)))
    s = z * z
    series = s * (-3.33329491539e-1 + s * (1.99777106478e-1 + s * (-1.38776856032e-1 + s * 8.05374449538e-2)))
    result = z + z * series + tl.where(far, HALF_PI, tl.where(near, 0.0, QUARTER_PI))
    return tl.where(x < 0, -result, result)


@triton.jit
def power(x, y):
    """x ** y for floats, with torch's values at zero and for negative bases."""
    magnitude = tl.where((tl.abs(x) == 1) & (y == y), 1.0, tl.exp2(y * tl.log2(tl.abs(x))))
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2 != y)
    signed = tl.where(odd & (x < 0), -magnitude, magnitude)
    result = tl.where((x < 0) & (whole == 0), float("nan"), signed)
    return tl.where((y == 0) | (x == 1), 1.0, result)


@triton.jit
def integer_power(x, y, BITS: tl.constexpr):
    """x ** y for integers, by repeated squaring, where y has so many `BITS`; a reciprocal is rounded to 0."""
    x = x + 0 * y  # either may be a literal
    y = y + 0 * x
    base, exponent, result = x, y, x * 0 + 1
    for _ in tl.static_range(BITS):
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    unit = tl.where(x == 1, 1, tl.where(x == -1, 1 - 2 * (y & 1), 0))
    return tl.where(y < 0, unit, result).to(x.dtype)
