"""Bounds of comparisons and logic: `lo` is certainly true, `hi` possibly true."""

from __future__ import annotations

from collections.abc import Callable

from .bounds import Bounds
from .ir import Op


def _equal(a: Bounds, b: Bounds) -> Bounds:
    return Bounds((a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo), (a.lo <= b.hi) & (b.lo <= a.hi))


def _negated(a: Bounds) -> Bounds:
    return Bounds(~a.hi, ~a.lo)


def _exclusive(a: Bounds, b: Bounds) -> Bounds:
    return Bounds((a.lo & ~b.hi) | (~a.hi & b.lo), ~((a.lo & b.lo) | ~(a.hi | b.hi)))


COMPARE: dict[Op, Callable[[Bounds, Bounds], Bounds]] = {
    Op.LT: lambda a, b: Bounds(a.hi < b.lo, a.lo < b.hi),
    Op.LE: lambda a, b: Bounds(a.hi <= b.lo, a.lo <= b.hi),
    Op.EQ: _equal,
    Op.NE: lambda a, b: _negated(_equal(a, b)),
}
BOOL: dict[Op, Callable[..., Bounds]] = {
    **COMPARE,
    Op.AND: lambda a, b: Bounds(a.lo & b.lo, a.hi & b.hi),
    Op.OR: lambda a, b: Bounds(a.lo | b.lo, a.hi | b.hi),
    Op.XOR: _exclusive,
    Op.NOT: _negated,
}
