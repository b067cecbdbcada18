"""Algebra that never changes a value: constant folding and identities, `Node -> Node`.

A rule looks at one operation whose operands are simplified already, and returns a simpler node or None. Floating-point
rules hold for every input including nan, infinities and signed zero; `x * 0.0 -> 0.0` is therefore not among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from .ir import DType, Kind, Node, Op, const, walk
from .spec import apply, rebuild

Rule = Callable[[Node], Node | None]


def simplify(roots: Iterable[Node]) -> list[Node]:
    """Equal expressions with fewer operations."""
    roots = list(roots)
    done: dict[Node, Node] = {}
    for node in walk(*roots):
        done[node] = _rewrite(rebuild(node, tuple(done[a] for a in node.args)))
    return [done[r] for r in roots]


def _rewrite(node: Node) -> Node:
    while True:
        folded = _fold(node)
        if folded is not None:
            return folded
        better = RULES[node.op](node) if node.op in RULES else None
        if better is None or better is node:
            return node
        node = better


def _is(node: Node, value: float) -> bool:
    return node.is_const and node.value == value and math.copysign(1, float(node.value)) == math.copysign(1, value)  # type: ignore[arg-type]


def _either(node: Node, value: float) -> Node | None:
    """The other operand, if one operand is the literal `value`."""
    if _is(node.rhs, value):
        return node.lhs
    return node.rhs if _is(node.lhs, value) else None


def _add(n: Node) -> Node | None:
    return _either(n, 0) if n.dtype.is_int else _either(n, -0.0)


def _sub(n: Node) -> Node | None:
    if _is(n.rhs, 0):
        return n.lhs
    return const(0, n.dtype) if n.dtype.is_int and n.lhs is n.rhs else None


def _mul(n: Node) -> Node | None:
    other = _either(n, 1)
    if other is not None:
        return other
    return const(0, n.dtype) if n.dtype.is_int and _either(n, 0) is not None else None


def _divide_by_one(n: Node) -> Node | None:
    return n.lhs if _is(n.rhs, 1) and (n.dtype.is_int or n.op is Op.DIV) else None


def _mod(n: Node) -> Node | None:
    return const(0, n.dtype) if n.dtype.is_int and _is(n.rhs, 1) else None


def _pow(n: Node) -> Node | None:
    return n.lhs if _is(n.rhs, 1) else None


def _same_operands(n: Node) -> Node | None:
    return n.lhs if n.lhs is n.rhs else None


def _and(n: Node) -> Node | None:
    if n.dtype is DType.BOOL:
        if _either(n, False) is not None:
            return const(False, DType.BOOL)
        other = _either(n, True)
        if other is not None:
            return other
    return _same_operands(n)


def _or(n: Node) -> Node | None:
    if n.dtype is DType.BOOL:
        if _either(n, True) is not None:
            return const(True, DType.BOOL)
        other = _either(n, False)
        if other is not None:
            return other
    return _same_operands(n)


def _xor(n: Node) -> Node | None:
    if n.lhs is n.rhs:
        return const(0, n.dtype)
    return _either(n, 0)


def _not(n: Node) -> Node | None:
    x = n.lhs
    if x.op is Op.NOT:
        return x.lhs
    # For integers and booleans comparisons are total, so they negate to each other.
    if x.op in (Op.LT, Op.LE) and not x.lhs.dtype.is_float:
        return apply(Op.LE if x.op is Op.LT else Op.LT, x.rhs, x.lhs)
    if x.op in (Op.EQ, Op.NE):
        return apply(Op.NE if x.op is Op.EQ else Op.EQ, x.lhs, x.rhs)
    return None


def _neg(n: Node) -> Node | None:
    return n.lhs.lhs if n.lhs.op is Op.NEG else None


def _compare_equal(n: Node) -> Node | None:
    if n.lhs is n.rhs and not n.lhs.dtype.is_float:
        return const(n.op in (Op.LE, Op.EQ), DType.BOOL)
    return None


def _where(n: Node) -> Node | None:
    condition, a, b = n.args
    if condition.is_const:
        return a if condition.value else b
    if a is b:
        return a
    if condition.op is Op.NOT:
        return apply(Op.WHERE, condition.lhs, b, a)
    return None


def _cast(n: Node) -> Node | None:
    x = n.args[0]
    if x.dtype is n.dtype and x.kind is not Kind.WEAK:
        return x
    return None


def _detach(n: Node) -> Node | None:
    return n.lhs if n.lhs.is_const or not n.dtype.is_float else None


def _shift(n: Node) -> Node | None:
    return n.lhs if _is(n.rhs, 0) else None


RULES: dict[Op, Rule] = {
    Op.ADD: _add,
    Op.SUB: _sub,
    Op.MUL: _mul,
    Op.DIV: _divide_by_one,
    Op.FLOORDIV: _divide_by_one,
    Op.TRUNCDIV: _divide_by_one,
    Op.MOD: _mod,
    Op.POW: _pow,
    Op.MAXIMUM: _same_operands,
    Op.MINIMUM: _same_operands,
    Op.AND: _and,
    Op.OR: _or,
    Op.XOR: _xor,
    Op.NOT: _not,
    Op.NEG: _neg,
    Op.LT: _compare_equal,
    Op.LE: _compare_equal,
    Op.EQ: _compare_equal,
    Op.NE: _compare_equal,
    Op.WHERE: _where,
    Op.SHL: _shift,
    Op.SHR: _shift,
    Op.CAST: _cast,
    Op.DETACH: _detach,
}

_FOLD_INT: dict[Op, Callable[[int, int], int]] = {
    Op.ADD: lambda a, b: a + b,
    Op.SUB: lambda a, b: a - b,
    Op.MUL: lambda a, b: a * b,
    Op.FLOORDIV: lambda a, b: a // b,
    Op.MOD: lambda a, b: a % b,
    Op.MAXIMUM: max,
    Op.MINIMUM: min,
    Op.AND: lambda a, b: a & b,
    Op.OR: lambda a, b: a | b,
    Op.XOR: lambda a, b: a ^ b,
}
_FOLD_COMPARE: dict[Op, Callable[[float, float], bool]] = {
    Op.LT: lambda a, b: a < b,
    Op.LE: lambda a, b: a <= b,
    Op.EQ: lambda a, b: a == b,
    Op.NE: lambda a, b: a != b,
}
_BITS = {DType.INT8: 8, DType.INT16: 16, DType.INT32: 32, DType.INT64: 64}


def _fold(n: Node) -> Node | None:
    """The literal that an operation on literals gives. Integers wrap as the hardware's; floats are left to it."""
    if not n.args or not all(a.is_const for a in n.args):
        return None
    values = [a.value for a in n.args]
    if n.op in _FOLD_COMPARE:
        return const(_FOLD_COMPARE[n.op](values[0], values[1]), DType.BOOL)  # type: ignore[arg-type]
    if n.op is Op.NOT and n.dtype is DType.BOOL:
        return const(not values[0], DType.BOOL)
    if n.op in _FOLD_INT and n.dtype in _BITS:
        a, b = int(values[0]), int(values[1])  # type: ignore[arg-type]
        if b == 0 and n.op in (Op.FLOORDIV, Op.MOD):
            return None
        bits = _BITS[n.dtype]
        return const((_FOLD_INT[n.op](a, b) + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1), n.dtype)
    return None
