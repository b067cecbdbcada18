"""How each load from a captured tensor depends on the indices: what decides how its gradient is added up.

An element (b, h, q, kv) contributes to the entry that it read. Where many elements of a tile read one entry, their sum is
all that memory needs to see; where each reads an entry of its own, nothing needs to be added at all. Both are facts of the
index expressions, proven here from their form; what is not proven is `INDIRECT`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from functools import lru_cache
from typing import Literal, NamedTuple

from .ir import Node, Op, walk
from .linear import collect, total

_POSITIONS = frozenset(("q_idx", "kv_idx"))


class Pattern(Enum):
    """The form of a load's index. Any of them may depend on b and h besides."""

    HEAD = "head"  # on nothing else: all elements of a head read one entry
    ROW = "row"  # on q_idx
    COLUMN = "column"  # on kv_idx
    DIAGONAL = "diagonal"  # on kv_idx - q_idx
    DENSE = "dense"  # one dimension is q_idx + constant, another kv_idx + constant, and the others are like HEAD
    INDIRECT = "indirect"  # anything else

    __hash__ = object.__hash__


# How kernels collect the gradient of a load: summed over the keys; summed over the queries; summed along the diagonals of
# a tile; each element stored to its entry; each stored to a workspace; to one with its entry's number, by which they are then
# sorted; each added to its entry by an atomic.
Method = Literal["row", "column", "diagonal", "store", "workspace", "sorted", "atomic"]
USUAL: dict[Pattern, Method] = {
    Pattern.HEAD: "row",
    Pattern.ROW: "row",
    Pattern.COLUMN: "column",
    Pattern.DIAGONAL: "diagonal",
    Pattern.DENSE: "store",
    Pattern.INDIRECT: "atomic",
}


Methods = tuple[Method | None, ...]
WORKSPACES: dict[Method, int] = {"diagonal": 2, "workspace": 1, "sorted": 2}  # that a load has; the others have none


class Axis(NamedTuple):
    """The dimension of a DENSE tensor along which a position runs, and what is added to it: a graph of run-time ints."""

    dim: int
    offset: Node


class Access(NamedTuple):
    """A load [captured tensor `number`], its pattern, the inputs its index depends on, and for DENSE its two axes."""

    load: Node
    number: int
    pattern: Pattern
    axes: frozenset[str]
    q: Axis | None = None
    kv: Axis | None = None

    @property
    def indices(self) -> tuple[Node, ...]:
        """One graph for each dimension of the tensor."""
        return self.load.args[1:]


@lru_cache(maxsize=4096)
def access(load: Node) -> Access:
    """The access pattern of a LOAD."""
    base, *index = load.args
    assert isinstance(base.value, tuple)
    number, axes = base.value[0], frozenset[str]().union(*(i.axes for i in index))
    if "score" in axes:
        return Access(load, number, Pattern.INDIRECT, axes)
    if not axes & _POSITIONS:
        return Access(load, number, Pattern.HEAD, axes)
    if "kv_idx" not in axes:
        return Access(load, number, Pattern.ROW, axes)
    if "q_idx" not in axes:
        return Access(load, number, Pattern.COLUMN, axes)
    if all(_is_diagonal(i) for i in index):
        return Access(load, number, Pattern.DIAGONAL, axes)
    q, kv = _axis("q_idx", index), _axis("kv_idx", index)
    if q is not None and kv is not None:
        return Access(load, number, Pattern.DENSE, axes, q, kv)
    return Access(load, number, Pattern.INDIRECT, axes)


def usual_methods(loads: Sequence[tuple[Node, Node]], wanted: Collection[int], deterministic: bool = False) -> Methods:
    """How the gradients of loads, as in `Derivative.loads`, are collected by their patterns alone.

    None for a load from a tensor that is not among the `wanted` ones, or that the loss does not depend on. `deterministic`:
    without atomics, whose order varies from run to run.
    """
    usual = USUAL | ({Pattern.INDIRECT: "sorted"} if deterministic else {})
    found = [(access(load), "grad" in gradient.axes) for load, gradient in loads]
    return tuple(usual[to.pattern] if depends and to.number in wanted else None for to, depends in found)


@lru_cache(maxsize=4096)
def _is_diagonal(node: Node) -> bool:
    """Whether a value is the same wherever b, h and kv_idx - q_idx are."""
    if not node.axes & _POSITIONS:
        return True
    if node.op is Op.INPUT:
        return False
    terms, _ = collect(node)
    if set(terms) == {node}:  # no sum: a function of its operands
        return all(_is_diagonal(a) for a in node.args if a.op is not Op.CAPTURED)
    factor = {str(n.value): times for n, times in terms.items() if n.op is Op.INPUT and n.value in _POSITIONS}
    others = [n for n, times in terms.items() if times and not (n.op is Op.INPUT and n.value in _POSITIONS)]
    return sum(factor.values()) == 0 and all(map(_is_diagonal, others))


def _axis(position: str, index: list[Node]) -> Axis | None:
    """The only dimension that depends on a position, if it is that position plus a constant."""
    found = [d for d, i in enumerate(index) if position in i.axes]
    if len(found) != 1:
        return None
    terms, constant = collect(index[found[0]])
    (own,) = [n for n in terms if n.op is Op.INPUT and n.value == position] or (None,)
    if own is None or terms.pop(own) != 1:
        return None
    if any(n.axes or any(below.op is Op.LOAD for below in walk(n)) for n, times in terms.items() if times):
        return None
    return Axis(found[0], total({n: times for n, times in terms.items() if times}, constant))
