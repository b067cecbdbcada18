"""What a placeholder stands for: one scalar, a short vector of scalars, or a part of a captured tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .ir import Node


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
    def free(self) -> list[int]:
        return [d for d, slot in enumerate(self.slots) if slot is None]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape[d] for d in self.free)

    def transposed(self) -> View:
        """With its last two dimensions exchanged, where it has two."""
        return self if len(self.free) < 2 else View(self.base.transpose(*self.free[-2:]), self.slots)


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
