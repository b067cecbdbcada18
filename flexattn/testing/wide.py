"""A problem in float64: the same program and tensors, whose values and gradients are not rounded on the way.

In: a `Problem` of any dtype. Out: one of float64, whose captured floating-point tensors are float64 leaves.

What depends on the raw score or on a captured floating-point tensor is widened. Numbers of the indices alone keep their dtype:
in which bucket `log(distance)` falls a kernel decides in float32, so the truth does, too. The same holds for the mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..codegen.ir import DType, Node, Op, const, walk
from ..codegen.pipeline import variant
from ..codegen.program import parse, print_program
from ..codegen.spec import apply
from ..problem import Problem


class Wide(NamedTuple):
    """A problem in float64; `leaves` are its captured floating-point tensors by the numbers they have in the original one."""

    problem: Problem
    leaves: dict[int, Tensor]


def widened(problem: Problem) -> Wide:
    """`problem` in float64. Query, key and value are leaves that require a gradient, as do the captured tensors that do."""
    parsed = parse(problem.variant.text)
    tensors, floats = list(problem.tensors), list(problem.floats)
    first = len(tensors)
    score = _wide(parsed.score, first)
    printed = print_program(score, parsed.mask, DType.FLOAT64)
    leaves = {
        i: t.detach().double().requires_grad_(t.requires_grad) for i, t in enumerate(tensors) if t.is_floating_point()
    }
    captured: list[Any] = [tensors[i] if i < first else leaves[i - first] for i in printed.captured]
    captured = [t.detach() if i < first else t for i, t in zip(printed.captured, captured, strict=True)]
    used = {i - first for i in printed.captured if i >= first}
    q, k, v = (t.detach().double().requires_grad_() for t in (problem.query, problem.key, problem.value))
    made = problem._replace(
        query=q,
        key=k,
        value=v,
        captured=[*captured, *(floats[i] for i in printed.floats)],
        ints=[problem.ints[i] for i in printed.ints],
        variant=variant(printed.text),
    )
    return Wide(made, {i: t for i, t in leaves.items() if i in used})


def _wide(score: Node, first: int) -> Node:
    """The graph in float64. The tensor c0 in float64 is captured number `first`, c1 the next."""
    made: dict[Node, Node] = {}

    def in_double(node: Node) -> Node:
        if node in made:
            return made[node]
        if not node.dtype.is_float or node.dtype is DType.FLOAT64:
            return node
        if node.op is Op.CONST:
            assert isinstance(node.value, float)
            return const(node.value, DType.FLOAT64, node.kind)
        if node.op is Op.FLOAT:
            return Node(Op.FLOAT, (), DType.FLOAT64, node.kind, node.value)
        return Node(Op.CAST, (node,), DType.FLOAT64, node.kind)

    for node in walk(score):
        if node.op is Op.INPUT and node.value == "score":
            made[node] = Node(Op.INPUT, (), DType.FLOAT64, node.kind, "score")
        elif node.op is Op.LOAD and node.dtype.is_float:
            base, *index = node.args
            assert isinstance(base.value, tuple)
            wide = Node(Op.CAPTURED, (), DType.FLOAT64, base.kind, (first + base.value[0], base.value[1]))
            made[node] = Node(Op.LOAD, (wide, *(made.get(i, i) for i in index)), DType.FLOAT64, node.kind)
        elif any(a in made for a in node.args):
            args = tuple(made.get(a, a) if not a.dtype.is_float else in_double(a) for a in node.args)
            if node.op is Op.CAST and node.dtype.is_float:
                made[node] = (
                    args[0] if args[0].dtype is DType.FLOAT64 else Node(Op.CAST, args, DType.FLOAT64, node.kind)
                )
            elif node.op in (Op.CAST, Op.LOAD):
                made[node] = Node(node.op, args, node.dtype, node.kind)
            else:
                made[node] = apply(node.op, *args)
    return in_double(score)
