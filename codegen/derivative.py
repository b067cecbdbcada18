"""Reverse-mode differentiation: the graph of a modified score in, the graphs of its derivatives out.

`grad` stands for dL/d(modified score) of one element. The result holds dL/d(score) and, for every load from a captured
floating-point tensor, that element's contribution to the gradient of the loaded entry. Rules follow torch's formulas,
also where a function has a kink (ties of `maximum`, `abs` at zero).

Gradients have the score's dtype, or the value's where that is wider: what a 16-bit value receives is rounded once, after
the sum over all elements, and not element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .ir import DType, Kind, Node, Op, const, input_node, walk
from .simplify import simplify
from .spec import apply

Partials = tuple[Node | None, ...]
Rule = Callable[[Node, Node], Partials]


class Derivative(NamedTuple):
    """Gradients of one element; None where the modified score does not depend on the raw score."""

    score: Node | None
    loads: tuple[tuple[Node, Node], ...]  # (LOAD node, gradient of the loaded value, at least as wide as the score)


def _mul(a: Node, b: Node) -> Node:
    return apply(Op.MUL, a, b)


def _div(a: Node, b: Node) -> Node:
    return apply(Op.DIV, a, b)


def _sub(a: Node, b: Node) -> Node:
    return apply(Op.SUB, a, b)


def _neg(a: Node) -> Node:
    return apply(Op.NEG, a)


def _like(value: float, node: Node) -> Node:
    return const(value, node.dtype, Kind.SCALAR)


def _where(condition: Node, a: Node, b: Node) -> Node:
    return apply(Op.WHERE, condition, a, b)


def _extremum(node: Node, grad: Node) -> Partials:
    """Gradient of maximum and minimum: all of it to the operand that is the result, half to each at a tie."""
    a, b = node.args
    is_b = apply(Op.LT, a, b) if node.op is Op.MAXIMUM else apply(Op.LT, b, a)
    tie = apply(Op.EQ, a, b)
    half, zero = _mul(grad, _like(0.5, grad)), _like(0.0, grad)
    return _where(tie, half, _where(is_b, zero, grad)), _where(tie, half, _where(is_b, grad, zero))


def _power(node: Node, grad: Node) -> Partials:
    x, p = node.args
    zero = _like(0.0, x)
    slope = _mul(p, apply(Op.POW, x, _sub(p, _like(1.0, p))))
    to_x = _where(apply(Op.EQ, p, zero), zero, _mul(grad, slope))
    at_zero = apply(Op.AND, apply(Op.EQ, x, zero), apply(Op.LE, zero, p))
    to_p = _mul(grad, _where(at_zero, zero, _mul(node, apply(Op.LOG, x))))
    return to_x, to_p


def _divide(node: Node, grad: Node) -> Partials:
    return _div(grad, node.rhs), _neg(_mul(grad, _div(node, node.rhs)))


def _modulo(rounded: Op) -> Rule:
    return lambda n, g: (g, _neg(_mul(g, apply(rounded, _div(n.lhs, n.rhs)))))


DERIVATIVES: dict[Op, Rule] = {
    Op.ADD: lambda n, g: (g, g),
    Op.SUB: lambda n, g: (g, _neg(g)),
    Op.MUL: lambda n, g: (_mul(g, n.rhs), _mul(g, n.lhs)),
    Op.DIV: _divide,
    Op.MOD: _modulo(Op.FLOOR),
    Op.FMOD: _modulo(Op.TRUNC),
    Op.POW: _power,
    Op.MAXIMUM: _extremum,
    Op.MINIMUM: _extremum,
    Op.NEG: lambda n, g: (_neg(g),),
    Op.ABS: lambda n, g: (_mul(g, apply(Op.SIGN, n.lhs)),),
    Op.WHERE: lambda n, g: (None, _where(n.args[0], g, _like(0.0, g)), _where(n.args[0], _like(0.0, g), g)),
    Op.CAST: lambda n, g: (g,),
    Op.EXP: lambda n, g: (_mul(g, n),),
    Op.EXP2: lambda n, g: (_mul(_mul(g, n), _like(math.log(2), g)),),
    Op.EXPM1: lambda n, g: (_mul(g, apply(Op.ADD, n, _like(1.0, n))),),
    Op.LOG: lambda n, g: (_div(g, n.lhs),),
    Op.LOG2: lambda n, g: (_div(g, _mul(n.lhs, _like(math.log(2), g))),),
    Op.LOG1P: lambda n, g: (_div(g, apply(Op.ADD, n.lhs, _like(1.0, n))),),
    Op.SQRT: lambda n, g: (_div(g, _mul(n, _like(2.0, n))),),
    Op.RSQRT: lambda n, g: (_mul(_mul(g, _like(-0.5, g)), _mul(n, _mul(n, n))),),
    Op.SIN: lambda n, g: (_mul(g, apply(Op.COS, n.lhs)),),
    Op.COS: lambda n, g: (_neg(_mul(g, apply(Op.SIN, n.lhs))),),
    Op.ATAN: lambda n, g: (_div(g, apply(Op.ADD, _mul(n.lhs, n.lhs), _like(1.0, n))),),
    Op.TANH: lambda n, g: (_mul(g, _sub(_like(1.0, n), _mul(n, n))),),
    Op.SIGMOID: lambda n, g: (_mul(g, _mul(n, _sub(_like(1.0, n), n))),),
    Op.ERF: lambda n, g: (_mul(g, _mul(_like(2 / math.sqrt(math.pi), n), apply(Op.EXP, _neg(_mul(n.lhs, n.lhs))))),),
}

# Piecewise constant, or cut off on purpose.
ZERO_DERIVATIVE = frozenset(
    (Op.FLOORDIV, Op.TRUNCDIV, Op.SIGN, Op.FLOOR, Op.CEIL, Op.ROUND, Op.TRUNC, Op.DETACH, Op.LT, Op.LE, Op.EQ, Op.NE)
)


class Step(NamedTuple):
    """What one operation passes on: the gradient `partial` into its operand `arg`, from its own gradient `grad`."""

    node: Node
    grad: Node
    arg: Node
    partial: Node


def derivative(score: Node) -> Derivative:
    """The gradients of the graph `score`, simplified."""
    raw = input_node("score", score.dtype)
    adjoints: dict[Node, Node] = {score: input_node("grad", score.dtype)}
    for _ in _steps(score, adjoints):
        pass
    loads = [n for n in walk(score) if n.op is Op.LOAD and n in adjoints]
    roots = ([adjoints[raw]] if raw in adjoints else []) + [adjoints[n] for n in loads]
    simple = simplify(roots)
    to_score = simple.pop(0) if raw in adjoints else None
    return Derivative(to_score, tuple(zip(loads, simple, strict=True)))


def steps(score: Node) -> list[Step]:
    """Every step of the way back from the graph `score`, as it is gone, not simplified: to say where something happens."""
    return list(_steps(score, {score: input_node("grad", score.dtype)}))


def _steps(score: Node, adjoints: dict[Node, Node]) -> Iterator[Step]:
    """The way back; `adjoints` gathers the gradient of each node."""
    for node in reversed(list(walk(score))):
        grad = adjoints.get(node)
        if grad is None or not node.dtype.is_float or node.op not in DERIVATIVES:
            continue
        for arg, partial in zip(node.args, DERIVATIVES[node.op](_widened(node, grad.dtype), grad), strict=True):
            if partial is None or not arg.dtype.is_float or not _differentiable(arg):
                continue
            partial = _cast(partial, arg.dtype if arg.dtype is DType.FLOAT64 else score.dtype)
            adjoints[arg] = apply(Op.ADD, adjoints[arg], partial) if arg in adjoints else partial
            yield Step(node, grad, arg, partial)


def _cast(node: Node, dtype: DType) -> Node:
    return node if node.dtype is dtype or not node.dtype.is_float else Node(Op.CAST, (node,), dtype, node.kind)


def _widened(node: Node, dtype: DType) -> Node:
    """An operation on operands of `dtype`, which is that of its gradient, in the order they have."""
    args = tuple(_cast(a, dtype) for a in node.args)
    if node.op is Op.CAST or args == node.args:
        return node
    return Node(node.op, args, dtype, node.kind, node.value)


def _differentiable(node: Node) -> bool:
    """Whether a gradient into `node` can go anywhere."""
    return "score" in node.axes or any(n.op is Op.LOAD and n.dtype.is_float for n in walk(node))
