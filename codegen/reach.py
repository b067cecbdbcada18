"""Which elements of captured tensors a mask reads for certain, before it is evaluated.

A kernel clamps what lies beyond a tensor, so that ids that are one too short would be a wrong mask and no error.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from torch import Tensor

from .formula import inline
from .ir import Node, Op, walk

_Span = tuple[int, int]


class OutOfReach(IndexError):
    """A mask reads element `end` of dimension `dim` of a captured tensor, which has fewer."""

    def __init__(self, load: Node, dim: int, shape: tuple[int, ...], end: int) -> None:
        self.load, self.dim, self.shape, self.end = load, dim, shape, end
        super().__init__(self.told({}))

    def told(self, names: Mapping[str, str]) -> str:
        """The message, with the user's names of what was captured."""
        index, n = self.load.args[1 + self.dim], self.shape[self.dim]
        text = inline(index, names)
        name = text if index.op is Op.INPUT else f"({text})"
        return (
            f"the mask reads a captured tensor of shape {list(self.shape)} at {inline(self.load, names)}, where {text} goes to "
            f"{self.end}, beyond dimension {self.dim} of size {n}. Give the tensor an entry for every position, or keep the "
            f"index within it, e.g. {name}.clamp(0, {max(n - 1, 0)})"
        )


def check_reach(mask: Node, captured: Sequence[Tensor], ints: Sequence[int], sizes: Mapping[str, int]) -> None:
    """Raise `OutOfReach` for an index of a captured tensor that goes beyond it. `sizes`: of b, h, q_idx and kv_idx.

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
            raise OutOfReach(load, dim, tuple(tensor.shape), span[1] if span[1] >= n else span[0])


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
