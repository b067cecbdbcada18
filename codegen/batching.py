"""A program whose batch entries, or heads, are those of another: part of them, or several batches laid one after the other.

The result is again a program text, so every backend can run it; the numbers that were added are run-time integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .ir import DType, Kind, Node, Op, input_node, walk
from .program import parse, print_program
from .spec import apply, load, substitute


def folded(text: str, batched: Sequence[bool]) -> str:
    """The program for N batches of B entries in one: entry `b` stands for entry `b % B` of batch `b // B`.

    `batched` says which captured tensors, and after them run-time floats, differ between the N; they have a new first
    dimension of size N. B is a new run-time integer, the last one, if the text changes.
    """
    parsed = parse(text)
    b = input_node("b", DType.INT32)
    size = _new_int(parsed.n_ints)
    n_tensors = len(parsed.captured)
    if any(batched[n_tensors:]):
        raise ValueError("run-time floats are Python numbers, so they are the same for all batches")
    rewrite = {b: apply(Op.MOD, b, size)}
    number = apply(Op.FLOORDIV, b, size)

    def visit(roots: list[Node]) -> list[Node]:
        # Loads from the inside out: the index of one may hold another.
        done = dict(rewrite)
        for node in walk(*roots):
            if node.op is Op.LOAD and batched[_captured(node)[0]]:
                position, rank = _captured(node)
                base = Node(Op.CAPTURED, (), node.dtype, Kind.ELEMENT, (position, rank + 1))
                index = substitute(list(node.args[1:]), done)
                done[node] = load(base, number, *index)
        return substitute(roots, done)

    return _printed(text, visit)


def shifted(text: str, axis: str) -> str:
    """The program for part of the batch entries ("b") or heads ("h"): index `i` stands for `i + n`.

    n is a new run-time integer, the last one, if the text changes.
    """
    index = input_node(axis, DType.INT32)
    moved = {index: apply(Op.ADD, index, _new_int(parse(text).n_ints))}
    return _printed(text, lambda roots: substitute(roots, moved))


def _printed(text: str, change: Callable[[list[Node]], list[Node]]) -> str:
    parsed = parse(text)
    roots = [parsed.score] if parsed.mask is None else [parsed.score, parsed.mask]
    score, *mask = change(roots)
    return print_program(score, mask[0] if mask else None, parsed.score_dtype).text


def _captured(load: Node) -> tuple[int, int]:
    """Number and rank of the tensor that is read."""
    value = load.args[0].value
    assert isinstance(value, tuple)
    return value


def _new_int(number: int) -> Node:
    return Node(Op.CAST, (Node(Op.INT, (), DType.INT64, Kind.WEAK, number),), DType.INT32, Kind.SCALAR)
