"""Bounds of floating-point operations.

Arithmetic is bounded by the same operations that compute it, which round monotonically; elementary functions get a
margin, for no library rounds them correctly. Where nan may come of it, the bounds say so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .bounds import Bounds, absolute, corners, either, float_bounds, may_be_nan, square
from .bounds_of_booleans import COMPARE
from .bounds_of_integers import INTEGER
from .evaluate import EVALUATE, TORCH_DTYPE
from .ir import Node, Op


def _nan_from(*operands: Bounds) -> Tensor:
    """Operands that are nan, or infinite, of which arithmetic makes nan."""
    flags = may_be_nan(operands[0])
    for a in operands:
        flags = flags | may_be_nan(a) | a.lo.isinf() | a.hi.isinf()
    return flags


def _float_rule(rule: Callable[..., Bounds]) -> Callable[..., Bounds]:
    """An operation of numbers whose result is nan only for operands that are nan or infinite."""

    def with_nan(node: Node, *args: Bounds) -> Bounds:
        found = rule(node, *args)
        return float_bounds(found.lo, found.hi, _nan_from(*args))

    return with_nan


def _float_divide(node: Node, a: Bounds, b: Bounds) -> Bounds:
    zero = (b.lo <= 0) & (b.hi >= 0)
    found = corners(torch.true_divide, a, b)
    if node.op in (Op.FLOORDIV, Op.TRUNCDIV):  # computed by way of a remainder, so off by one at worst
        found = Bounds(found.lo.floor() - 1, found.hi.ceil() + 1)
    return float_bounds(found.lo.where(~zero, -torch.inf), found.hi.where(~zero, torch.inf), _nan_from(a, b) | zero)


def _float_mod(node: Node, a: Bounds, b: Bounds) -> Bounds:
    if node.op is Op.MOD:
        low, high = b.lo.clamp_max(0), b.hi.clamp_min(0)
    else:
        size = torch.maximum(b.lo.abs(), b.hi.abs())
        low, high = torch.maximum(a.lo.clamp_max(0), -size), torch.minimum(a.hi.clamp_min(0), size)
    return float_bounds(low, high, _nan_from(a, b) | ((b.lo <= 0) & (b.hi >= 0)))


def _float_power(node: Node, a: Bounds, b: Bounds) -> Bounds:
    if node.rhs.is_const and node.rhs.value == 2:
        return _widened(node, square(a), _nan_from(a))
    bad = ~(a.lo > 0)
    found = corners(torch.pow, Bounds(a.lo.where(~bad, 1), a.hi.where(~bad, 1)), b)
    found = Bounds(found.lo.where(~bad, -torch.inf), found.hi.where(~bad, torch.inf))
    return _widened(node, found, _nan_from(a, b) | bad)


def _widened(node: Node, found: Bounds, nan: Tensor | None) -> Bounds:
    """With a margin for libraries and kernels that do not round elementary functions correctly."""
    margin = 64 * torch.finfo(TORCH_DTYPE[node.dtype]).eps
    return float_bounds(
        found.lo - (found.lo.abs() * margin + margin), found.hi + (found.hi.abs() * margin + margin), nan
    )


def _increasing(node: Node, a: Bounds) -> Bounds:
    f, undefined_below = EVALUATE[node.op], _DOMAIN.get(node.op)
    nan = may_be_nan(a)
    if undefined_below is not None:
        nan = nan | (a.lo < undefined_below)
        a = Bounds(a.lo.clamp_min(undefined_below), a.hi.clamp_min(undefined_below))
    return _widened(node, Bounds(f(a.lo), f(a.hi)), nan)


def _reciprocal_root(node: Node, a: Bounds) -> Bounds:
    high = torch.rsqrt(a.lo.clamp_min(0))  # of zero, infinity
    return _widened(node, Bounds(torch.rsqrt(a.hi.clamp_min(0)), high), may_be_nan(a) | (a.lo < 0))


def _wave(node: Node, a: Bounds) -> Bounds:
    one = torch.ones_like(a.lo)
    return _widened(node, Bounds(-one, one), _nan_from(a))


def _stepwise(node: Node, a: Bounds) -> Bounds:
    return Bounds(EVALUATE[node.op](a.lo), EVALUATE[node.op](a.hi), a.nan)


def _sign(node: Node, a: Bounds) -> Bounds:
    unknown = may_be_nan(a)
    return Bounds(torch.where(unknown, -1, a.lo.sign()), torch.where(unknown, 1, a.hi.sign()), a.nan)


def _float_compare(node: Node, a: Bounds, b: Bounds) -> Bounds:
    found, nan = COMPARE[node.op](a, b), may_be_nan(a) | may_be_nan(b)
    # A comparison with nan is false, except !=.
    return Bounds(found.lo, found.hi | nan) if node.op is Op.NE else Bounds(found.lo & ~nan, found.hi)


_DOMAIN = {Op.LOG: 0.0, Op.LOG2: 0.0, Op.LOG1P: -1.0, Op.SQRT: 0.0}
FLOAT: dict[Op, Callable[..., Bounds]] = {
    **{op: _float_rule(INTEGER[op]) for op in (Op.ADD, Op.SUB, Op.MUL)},
    **{op: _float_divide for op in (Op.DIV, Op.FLOORDIV, Op.TRUNCDIV)},
    **{op: _float_mod for op in (Op.MOD, Op.FMOD)},
    Op.POW: _float_power,
    Op.MAXIMUM: lambda n, a, b: float_bounds(
        torch.maximum(a.lo, b.lo), torch.maximum(a.hi, b.hi), either(a.nan, b.nan)
    ),
    Op.MINIMUM: lambda n, a, b: float_bounds(
        torch.minimum(a.lo, b.lo), torch.minimum(a.hi, b.hi), either(a.nan, b.nan)
    ),
    Op.NEG: lambda n, a: Bounds(-a.hi, -a.lo, a.nan),
    Op.ABS: lambda n, a: Bounds(*absolute(a)[:2], a.nan),
    Op.SIGN: lambda n, a: Bounds(
        torch.where(may_be_nan(a), -1, a.lo.sign()), torch.where(may_be_nan(a), 1, a.hi.sign()), a.nan
    ),
    **{op: _float_compare for op in COMPARE},
    **{
        op: _increasing
        for op in (
            *(Op.EXP, Op.EXP2, Op.EXPM1, Op.LOG, Op.LOG2, Op.LOG1P, Op.SQRT),
            *(Op.ATAN, Op.TANH, Op.SIGMOID, Op.ERF),
        )
    },
    Op.RSQRT: _reciprocal_root,
    Op.SIN: _wave,
    Op.COS: _wave,
    **{op: _stepwise for op in (Op.FLOOR, Op.CEIL, Op.ROUND, Op.TRUNC)},
}
