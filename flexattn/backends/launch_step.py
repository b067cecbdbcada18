"""A kernel launch as a step that can be done again: arguments by name of their tensors, with addresses to be filled in.

Arguments are constants, tensors, descriptors of tensors, and tuples of them. They are picked out of a *pool*: the
constants, then the addresses of tensors, then the tensors of descriptors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Values = list[Any]  # by slot: a tensor, or None where it is not needed any more
Step = Callable[[Values], None]  # adds what it makes

_CONSTANTS = (int, float, bool, str, type(None), triton.language.constexpr, triton.language.dtype, triton.JITFunction)
_address = Tensor.data_ptr


class _Place(NamedTuple):
    """A leaf: the number of a constant, an address, or a tensor."""

    kind: str
    number: int


class _Descriptor(NamedTuple):
    """A descriptor without its tensor."""

    bare: TensorDescriptor
    base: _Place


class _Pool:
    """What the arguments of a launch are picked from."""

    def __init__(self, slot_of: Callable[[Tensor], int]) -> None:
        self.constants: list[Any] = []
        self.addressed: list[int] = []
        self.based: list[int] = []
        self._slot_of = slot_of

    def tree(self, value: Any) -> Any:
        """An argument with places for its leaves. Raises `TypeError` for what is no argument."""
        if isinstance(value, Tensor):
            self.addressed.append(self._slot_of(value))
            return _Place("address", len(self.addressed) - 1)
        if isinstance(value, tuple):
            before = len(self.constants)
            items = [self.tree(item) for item in value]
            if any(not isinstance(item, _Place) or item.kind != "constant" for item in items):
                return items
            del self.constants[before:]
        elif type(value) is TensorDescriptor:
            self.based.append(self._slot_of(value.base))
            bare = copy.copy(value)
            bare.base = None
            return _Descriptor(bare, _Place("base", len(self.based) - 1))
        elif not isinstance(value, _CONSTANTS):
            raise TypeError(f"a kernel's argument is a {type(value).__name__}")
        self.constants.append(value)
        return _Place("constant", len(self.constants) - 1)

    def getter(self, tree: Any) -> Callable[[tuple[Any, ...]], Any]:
        """From the pool to an argument."""
        if isinstance(tree, _Place):
            return itemgetter(self._at(tree))
        if isinstance(tree, _Descriptor):
            bare, at = tree.bare, self._at(tree.base)

            def described(pool: tuple[Any, ...]) -> TensorDescriptor:
                made = copy.copy(bare)
                made.base = pool[at]
                return made

            return described
        if len(tree) > 1 and all(isinstance(item, _Place) for item in tree):
            return itemgetter(*map(self._at, tree))
        inner = [self.getter(item) for item in tree]
        return lambda pool: tuple([get(pool) for get in inner])

    def _at(self, place: _Place) -> int:
        constants, addresses = len(self.constants), len(self.addressed)
        return place.number + {"constant": 0, "address": constants, "base": constants + addresses}[place.kind]


def launch_step(
    compiled: Any, grid: int, arguments: Sequence[Any], slot_of: Callable[[Tensor], int]
) -> tuple[Step, set[int]]:
    """A launch of a compiled kernel for the tensors in the slots that `slot_of` names, and these slots.

    Raises `TypeError` for an argument that is not understood.
    """
    pool = _Pool(slot_of)
    trees = [pool.tree(value) for value in arguments]
    getters = tuple(pool.getter(tree) for tree in trees)
    held, addressed, based = tuple(pool.constants), picker(pool.addressed), picker(pool.based)
    launcher, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    driver = triton.runtime.driver.active
    device, get_stream = driver.get_current_device(), driver.get_current_stream

    def step(values: Values) -> None:
        pool = (*held, *map(_address, addressed(values)), *based(values))
        launcher(grid, 1, 1, get_stream(device), function, metadata, None, None, None, *[get(pool) for get in getters])

    return step, {*pool.addressed, *pool.based}


def picker(slots: Sequence[int]) -> Callable[[Values], tuple[Any, ...]]:
    """Some values as a tuple."""
    if len(slots) > 1:
        return itemgetter(*slots)
    return lambda values: tuple([values[slot] for slot in slots])
