"""Comparisons that are linear in the key, solved without sympy: what most masks are made of, in microseconds."""

from __future__ import annotations

from collections import Counter
from functools import reduce
from typing import NamedTuple

from .ir import DType, Node, Op, const
from .promotion import cast
from .spec import apply


class Limits(NamedTuple):
    """`lo <= kv_idx <= hi`; None: no bound. Nodes are int64 and do not depend on the key."""

    lo: Node | None
    hi: Node | None


def linear_limits(comparison: Node) -> Limits | None:
    """What a comparison says of a key that it has once, plus or minus; None for any other."""
    if comparison.op not in (Op.LT, Op.LE, Op.EQ):
        return None
    terms, above = collect(comparison.lhs)
    others, below = collect(comparison.rhs)
    terms.subtract(others)
    constant = above - below + (comparison.op is Op.LT)
    keys = [n for n in terms if "kv_idx" in n.axes and terms[n]]
    if len(keys) != 1 or keys[0].op is not Op.INPUT or abs(terms[keys[0]]) != 1:
        return None
    sign = terms.pop(keys[0])  # sign * key + terms + constant <= 0, or == 0
    limit = total({n: -sign * times for n, times in terms.items() if times}, -sign * constant)
    if comparison.op is Op.EQ:
        return Limits(limit, limit)
    return Limits(None, limit) if sign > 0 else Limits(limit, None)


def collect(node: Node) -> tuple[Counter[Node], int]:
    """An integer node as a sum: its terms, how often each is in it, and its constant part.

    What is no sum is a term. True modulo the range of the node's dtype, as the node itself is.
    """
    terms: Counter[Node] = Counter()
    return terms, _collect(node, 1, terms)


def _collect(node: Node, times: int, terms: Counter[Node]) -> int:
    op, args = node.op, node.args
    if node.dtype.is_int:
        if op is Op.CONST:
            return times * int(node.value)  # type: ignore[arg-type]
        if op is Op.NEG:
            return _collect(args[0], -times, terms)
        if op in (Op.ADD, Op.SUB):
            return _collect(args[0], times, terms) + _collect(args[1], times if op is Op.ADD else -times, terms)
        if op is Op.CAST and node.dtype is DType.INT64 and args[0].op is Op.INPUT:  # an index, which fits
            return _collect(args[0], times, terms)
    terms[node] += times
    return 0


def total(terms: dict[Node, int], constant: int) -> Node:
    """Terms times their factors, plus a constant, as an int64 node."""
    parts: list[tuple[int, Node]] = []
    for node, times in sorted(terms.items(), key=lambda item: (item[1] < 0, item[0].order)):
        wide = cast(node, DType.INT64)
        parts.append((times, wide if abs(times) == 1 else apply(Op.MUL, wide, const(abs(times), DType.INT64))))
    if constant or not parts:
        parts.append((constant, const(abs(constant), DType.INT64)))
    (sign, first), *rest = parts
    first = apply(Op.NEG, first) if sign < 0 else first
    return reduce(lambda a, part: apply(Op.ADD if part[0] > 0 else Op.SUB, a, part[1]), rest, first)
