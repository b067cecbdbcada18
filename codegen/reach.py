"""Which elements of captured tensors a mask reads for certain, before it is evaluated.

A kernel clamps what lies beyond a tensor, so that ids that are one too short would be a wrong mask and no error.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from torch import Tensor

from .errors import ReachError
from .ir import Node, Op, walk

_Span = tuple[int, int]


def check_reach(mask: Node, captured: Sequence[Tensor], ints: Sequence[int], sizes: Mapping[str, int]) -> None:
    """Raise `ReachError` for an index of a captured tensor that goes beyond it. `sizes`: of b, h, q_idx and kv_idx.

    Only indices that are sums and differences of different inputs are known to take the values at their ends; others are
    left to debug mode.
    """
    for load in walk(mask):
        if load.op is not Op.LOAD:
            continue
        base = load.args[0]
        assert isinstance(base.value, tuple)
        tensor = captured[base.value[0]]
        for dim, (index, n) in enumerate(zip(load.args[1:], tensor.shape, strict=True)):
            span = _span(index, ints, sizes)
            if span is None or (span[1] < n and span[0] >= -n):
                continue
            raise ReachError(load, tensor, dim, span[1] if span[1] >= n else span[0])


def _span(node: Node, ints: Sequence[int], sizes: Mapping[str, int]) -> _Span | None:
    """The lowest and highest value of a node, both of which occur; None if that is not known."""
    op, args = node.op, node.args
    if op is Op.INPUT:
        return 0, sizes[str(node.value)] - 1
    if op is Op.CONST and isinstance(node.value, int):
        return node.value, node.value
    if op is Op.INT:
        value = int(ints[operator.index(node.value)])  # type: ignore[arg-type]
        return value, value
    if op not in (Op.ADD, Op.SUB, Op.NEG, Op.CAST) or not all(a.dtype.is_int for a in args):
        return None
    spans = [_span(a, ints, sizes) for a in args]
    if None in spans or (len(args) == 2 and args[0].axes & args[1].axes):
        return None
    one, *two = (s for s in spans if s is not None)
    if op is Op.CAST:
        return one
    if op is Op.NEG:
        return -one[1], -one[0]
    return (one[0] + two[0][0], one[1] + two[0][1]) if op is Op.ADD else (one[0] - two[0][1], one[1] - two[0][0])
