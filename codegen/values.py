"""What a placeholder stands for: one scalar, a short vector of scalars, or a part of a captured tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .calls import FUNCTIONS, weak
from .ir import DType, Node, Op
from .promotion import build, cast


class Value(NamedTuple):
    """Scalars in row-major order; `shape` is () for one."""

    shape: tuple[int, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class View:
    """A captured tensor, partly indexed: one slot a dimension, None where it is still whole."""

    base: Tensor
    slots: tuple[Node | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(n for n, slot in zip(self.base.shape, self.slots, strict=True) if slot is None)


def pick(value: Value, position: tuple[int, ...]) -> Node:
    """The element of a value that broadcasting puts at `position`."""
    if not value.shape:
        return value.nodes[0]
    flat = 0
    for size, i in zip(value.shape, position[len(position) - len(value.shape) :], strict=True):
        flat = flat * size + (i if size > 1 else 0)
    return value.nodes[flat]


def known(slots: Sequence[Node | None]) -> list[Node]:
    return [s for s in slots if s is not None]


def number_of(item: Any, seen: list[Any]) -> int:
    for number, other in enumerate(seen):
        if other is item:
            return number
    seen.append(item)
    return len(seen) - 1


def fold(name: str, value: Value) -> Value:
    """The scalar that a reduction (sum, mean, prod, amax, amin, any, all) of a vector gives, unrolled."""
    function = {"mean": "add", "sum": "add", "prod": "mul", "amax": "maximum", "amin": "minimum"}.get(name)
    nodes = list(value.nodes)
    if name in ("sum", "prod") and not nodes[0].dtype.is_float:
        nodes = [cast(n, DType.INT64) for n in nodes]
    if name in ("any", "all"):
        function = "logical_or" if name == "any" else "logical_and"
        nodes = [FUNCTIONS["bool"](n) for n in nodes]
    assert function is not None
    total = nodes[0]
    for node in nodes[1:]:
        total = FUNCTIONS[function](total, node)
    return Value((), (build(Op.DIV, total, weak(len(nodes))) if name == "mean" else total,))
