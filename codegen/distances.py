"""Distances of positions as floats: the positions are converted, a row and a column, instead of every distance.

`float(kv_idx - q_idx)` of a tile is a subtraction and a conversion for every element, and GPUs convert at half the rate of
their additions or less. `float(kv_idx) - float(q_idx)` is the same number wherever all three are integers that the float holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from .ir import DType, Node, Op, walk
from .spec import apply, substitute

NEAR = 1 << 22  # positions below this, and constants; sums of a few of them fit the 24 bits of a float32
_TERMS = 3
_EXACT = (DType.FLOAT32, DType.FLOAT64)


def converted_apart(roots: Sequence[Node]) -> list[Node]:
    """The same graphs, for positions below `NEAR`, with sums and differences of positions converted term by term."""
    rewrite = {node: _apart(node.lhs, node.dtype) for node in walk(*roots) if _is_distance(node)}
    return substitute(list(roots), rewrite) if rewrite else list(roots)


def _is_distance(node: Node) -> bool:
    if node.op is not Op.CAST or node.dtype not in _EXACT or node.lhs.op not in (Op.ADD, Op.SUB):
        return False
    terms = _terms(node.lhs)
    return 0 < terms <= _TERMS and {"q_idx", "kv_idx"} <= node.axes and _separates(node.lhs)


def _terms(node: Node) -> int:
    """How many positions and constants a sum of them has; 0 for anything else."""
    if not node.dtype.is_int:
        return 0
    if node.op is Op.INPUT:
        return 1
    if node.op is Op.CONST:
        return int(isinstance(node.value, int) and abs(node.value) < NEAR)
    if node.op in (Op.ADD, Op.SUB):
        left, right = _terms(node.lhs), _terms(node.rhs)
        return left + right if left and right else 0
    return 0


def _separates(node: Node) -> bool:
    """Whether the outermost operands lie along one axis each, so that converting them costs next to nothing."""
    return all(len(a.axes & {"q_idx", "kv_idx"}) <= 1 or _separates(a) for a in node.args)


def _apart(node: Node, dtype: DType) -> Node:
    if node.op in (Op.ADD, Op.SUB) and {"q_idx", "kv_idx"} <= node.axes:
        return apply(node.op, *(_apart(a, dtype) for a in node.args))
    return Node(Op.CAST, (node,), dtype, node.kind)
