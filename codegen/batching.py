"""A program whose batch entries, or heads, are those of another: part of them, or several batches laid one after the other.

The result is again a program text, so every backend can run it; the numbers that were added are run-time integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .ir import DType, Kind, Node, Op, input_node, walk
from .program import parse, print_program
from .spec import apply, load, substitute


def folded(text: str, batched: Sequence[bool]) -> str:
    """The program for N batches of B entries in one: entry `b` stands for entry `b % B` of batch `b // B`.

    `batched` says which captured tensors differ between the N; they have a new first dimension of size N. B is a new
    run-time integer, the last one, if the text changes.
    """
    b = input_node("b", DType.INT32)
    size = _new_int(text)
    entry, number = apply(Op.MOD, b, size), apply(Op.FLOORDIV, b, size)

    def change(roots: list[Node]) -> list[Node]:
        done = {b: entry}
        for node in walk(*roots):  # from the inside out: the index of a load may hold another one
            if node.op is not Op.LOAD:
                continue
            position, rank = _tensor(node)
            if batched[position]:
                base = Node(Op.CAPTURED, (), node.dtype, Kind.ELEMENT, (position, rank + 1))
                done[node] = load(base, number, *substitute(node.args[1:], done))
        return substitute(roots, done)

    return _changed(text, change)


def shifted(text: str, axis: str, kept: Mapping[int, int] | None = None) -> str:
    """The program for part of the batch entries ("b"), heads ("h") or queries ("q_idx"): index `i` stands for `i + n`.

    n is a new run-time integer, the last one, if the text changes. `kept` maps captured tensors of which only that part is
    at hand to the dimension that it is part of, one of `plain_dimensions`: there `i` remains `i`.
    """
    index = input_node(axis, DType.INT32)
    moved = {index: apply(Op.ADD, index, _new_int(text))}

    def change(roots: list[Node]) -> list[Node]:
        done = dict(moved)
        for node in walk(*roots):
            if kept and node.op is Op.LOAD and _tensor(node)[0] in kept:
                places = substitute(list(node.args[1:]), done)
                places[kept[_tensor(node)[0]]] = index
                done[node] = load(node.args[0], *places)
        return substitute(roots, done)

    return _changed(text, change)


def plain_dimensions(text: str, axis: str) -> dict[int, int]:
    """For captured tensors, by number, that are read at the index `axis` itself in every load: in which dimension."""
    parsed = parse(text)
    index = input_node(axis, DType.INT32)
    found: dict[int, set[int]] = {}
    for node in walk(*[parsed.score] if parsed.mask is None else [parsed.score, parsed.mask]):
        if node.op is Op.LOAD:
            at = {d for d, place in enumerate(node.args[1:]) if place is index}
            found[_tensor(node)[0]] = found.get(_tensor(node)[0], at) & at
    return {number: min(at) for number, at in found.items() if at}


def _changed(text: str, change: Callable[[list[Node]], list[Node]]) -> str:
    parsed = parse(text)
    roots = [parsed.score] if parsed.mask is None else [parsed.score, parsed.mask]
    score, *mask = change(roots)
    return print_program(score, mask[0] if mask else None, parsed.score_dtype).text


def _tensor(load: Node) -> tuple[int, int]:
    """The number and the rank of the captured tensor that is loaded from."""
    value = load.args[0].value
    assert isinstance(value, tuple)
    return value


def _new_int(text: str) -> Node:
    number = Node(Op.INT, (), DType.INT64, Kind.WEAK, parse(text).n_ints)
    return Node(Op.CAST, (number,), DType.INT32, Kind.SCALAR)
