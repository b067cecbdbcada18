"""Bounds of integer operations, as if integers never wrapped: `intervals` sees to it where they do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .bounds import Bounds, absolute, corners, limits, square
from .evaluate import EVALUATE, TORCH_DTYPE
from .ir import DType, Node, Op


def _multiply(node: Node, a: Bounds, b: Bounds) -> Bounds:
    return square(a) if node.lhs is node.rhs else corners(torch.mul, a, b)


def _unless(bad: Tensor, found: Bounds, node: Node) -> Bounds:
    low, high = limits(node.dtype)
    return Bounds(torch.where(bad, low, found.lo), torch.where(bad, high, found.hi))


def _divide(mode: str) -> Callable[[Node, Bounds, Bounds], Bounds]:
    def rule(node: Node, a: Bounds, b: Bounds) -> Bounds:
        zero = (b.lo <= 0) & (b.hi >= 0)
        safe = b.lo.where(~zero, 1)
        b = Bounds(safe, safe) if b.is_point else Bounds(safe, b.hi.where(~zero, 1))
        return _unless(zero, corners(lambda x, y: torch.div(x, y, rounding_mode=mode), a, b), node)

    return rule


def _positive_mod(a: Bounds, b: Bounds) -> Bounds:
    """a mod b for b > 0, with the sign of b."""
    one_turn = (torch.div(a.lo, b.lo, rounding_mode="floor") == torch.div(a.hi, b.lo, rounding_mode="floor")) & (
        b.lo == b.hi
    )
    unchanged = (a.lo >= 0) & (a.hi < b.lo)
    highest = torch.where(a.lo >= 0, torch.minimum(a.hi, b.hi - 1), b.hi - 1)
    low = torch.where(one_turn, torch.remainder(a.lo, b.lo), 0)
    high = torch.where(one_turn, torch.remainder(a.hi, b.lo), highest)
    return Bounds(torch.where(unchanged, a.lo, low), torch.where(unchanged, a.hi, high))


def _mod(node: Node, a: Bounds, b: Bounds) -> Bounds:
    zero, negative = (b.lo <= 0) & (b.hi >= 0), b.hi < 0
    # mod(a, b) = -mod(-a, -b)
    turned_a = Bounds(torch.where(negative, -a.hi, a.lo), torch.where(negative, -a.lo, a.hi))
    turned_b = Bounds(torch.where(negative, -b.hi, b.lo).where(~zero, 1), torch.where(negative, -b.lo, b.hi))
    turned_b = Bounds(turned_b.lo, turned_b.hi.where(~zero, 1))
    found = _positive_mod(turned_a, turned_b)
    found = Bounds(torch.where(negative, -found.hi, found.lo), torch.where(negative, -found.lo, found.hi))
    return _unless(zero, found, node)


def _fmod(node: Node, a: Bounds, b: Bounds) -> Bounds:
    zero = (b.lo <= 0) & (b.hi >= 0)
    size = absolute(b)
    largest = (size.hi - 1).clamp_min(0)
    low, high = torch.maximum(a.lo.clamp_max(0), -largest), torch.minimum(a.hi.clamp_min(0), largest)
    # Dividends of one sign: fmod is the modulus of their size.
    divisor = Bounds(size.lo.clamp_min(1), size.hi.clamp_min(1))
    above, below = _positive_mod(a, divisor), _positive_mod(Bounds(-a.hi, -a.lo), divisor)
    low = torch.where(a.lo >= 0, above.lo, torch.where(a.hi <= 0, -below.hi, low))
    high = torch.where(a.lo >= 0, above.hi, torch.where(a.hi <= 0, -below.lo, high))
    return _unless(zero, Bounds(low, high), node)


def _power(node: Node, a: Bounds, b: Bounds) -> Bounds:
    exponent = node.rhs.value if node.rhs.is_const else None
    if isinstance(exponent, int) and exponent >= 0:
        if exponent % 2 == 0:
            a = absolute(a)
        return Bounds(a.lo**exponent, a.hi**exponent)
    bad = (a.lo < 1) | (b.lo < 0)
    safe = Bounds(a.lo.where(~bad, 1), a.hi.where(~bad, 1)), Bounds(b.lo.where(~bad, 1), b.hi.where(~bad, 1))
    return _unless(bad, corners(torch.pow, *safe), node)


def _shift(node: Node, a: Bounds, b: Bounds) -> Bounds:
    bits = TORCH_DTYPE[node.dtype].itemsize * 8
    bad = (b.lo < 0) | (b.hi >= min(bits, 63))
    factor = Bounds(2 ** b.lo.where(~bad, 0).clamp_max(62), 2 ** b.hi.where(~bad, 0).clamp_max(62))
    if node.op is Op.SHL:
        found = corners(torch.mul, a, factor)
    else:
        found = corners(lambda x, y: torch.div(x, y, rounding_mode="floor"), a, factor)
    return _unless(bad, found, node)


def _fill(x: Tensor) -> Tensor:
    """The smallest 2^n - 1 that is not below x, for x >= 0."""
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | (x >> shift)
    return x


def _bits(node: Node, a: Bounds, b: Bounds) -> Bounds:
    if node.op is Op.AND and node.rhs.is_const and isinstance(node.rhs.value, int):
        mask = node.rhs.value
        if mask >= 0 and mask & (mask + 1) == 0:
            return _positive_mod(a, Bounds(t := torch.full((), mask + 1, device=a.lo.device), t))
    points = (a.lo == a.hi) & (b.lo == b.hi)
    exact = EVALUATE[node.op](a.lo, b.lo)
    not_negative = (a.lo >= 0) & (b.lo >= 0)
    if node.op is Op.AND:  # not above an operand that is not negative
        top = torch.where(not_negative, torch.minimum(a.hi, b.hi), torch.where(a.lo >= 0, a.hi, b.hi))
        bad, low = (a.lo < 0) & (b.lo < 0), torch.zeros_like(top)
    else:
        top = _fill(torch.where(not_negative, a.hi | b.hi, 0))
        bad, low = ~not_negative, torch.maximum(a.lo, b.lo) if node.op is Op.OR else torch.zeros_like(top)
    found = _unless(bad, Bounds(low, top), node)
    return Bounds(torch.where(points, exact, found.lo), torch.where(points, exact, found.hi))


def _not(node: Node, a: Bounds) -> Bounds:
    top = 255 if node.dtype is DType.UINT8 else -1
    return Bounds(top - a.hi, top - a.lo)


INTEGER: dict[Op, Callable[..., Bounds]] = {
    Op.ADD: lambda n, a, b: Bounds(a.lo + b.lo, a.hi + b.hi),
    Op.SUB: lambda n, a, b: Bounds(a.lo - b.hi, a.hi - b.lo),
    Op.MUL: _multiply,
    Op.FLOORDIV: _divide("floor"),
    Op.TRUNCDIV: _divide("trunc"),
    Op.MOD: _mod,
    Op.FMOD: _fmod,
    Op.POW: _power,
    Op.MAXIMUM: lambda n, a, b: Bounds(torch.maximum(a.lo, b.lo), torch.maximum(a.hi, b.hi)),
    Op.MINIMUM: lambda n, a, b: Bounds(torch.minimum(a.lo, b.lo), torch.minimum(a.hi, b.hi)),
    Op.NEG: lambda n, a: Bounds(-a.hi, -a.lo),
    Op.ABS: lambda n, a: absolute(a),
    Op.SIGN: lambda n, a: Bounds(torch.sign(a.lo), torch.sign(a.hi)),
    Op.AND: _bits,
    Op.OR: _bits,
    Op.XOR: _bits,
    Op.NOT: _not,
    Op.SHL: _shift,
    Op.SHR: _shift,
}
# Only these can leave the range of their operands' dtype.
GROWING = frozenset((Op.ADD, Op.SUB, Op.MUL, Op.FLOORDIV, Op.TRUNCDIV, Op.POW, Op.NEG, Op.ABS, Op.SHL))
