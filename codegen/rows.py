"""Arithmetic of rows, short vectors and matrices of scalars: reductions, products and transposes, written out by element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .calls import FUNCTIONS, convert, weak
from .errors import TraceError
from .ir import DType, Node, Op
from .promotion import build, cast
from .values import Value

REDUCTIONS = frozenset(("sum", "mean", "prod", "amax", "amin", "max", "min", "any", "all"))
PRODUCTS = frozenset(("matmul", "dot", "inner"))

_FUNCTION = {
    **{"sum": "add", "mean": "add", "prod": "mul", "amax": "maximum", "amin": "minimum", "max": "maximum"},
    **{"min": "minimum", "any": "logical_or", "all": "logical_and"},
}
_LOW = (DType.FLOAT16, DType.BFLOAT16)  # summed in float32 and rounded once, as by torch


def reduce(name: str, value: Value, args: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """The scalar that a reduction of a row gives; `args` and `options` are what the call has beside the row."""
    options = {**dict(zip(("dim", "keepdim"), args, strict=False)), **options}
    rank = len(value.shape)
    dim = options.pop("axis", None) if "axis" in options else options.pop("dim", None)
    dims = (dim,) if isinstance(dim, int) else dim or range(rank)
    dtype = options.pop("dtype", None)
    whole = {d % max(rank, 1) for d in dims} >= set(range(rank))
    if len(args) > 2 or not whole or any(options.values()):
        raise TraceError(
            f"reduces part of a {rank}-d value with `{name}`",
            "The kernel holds single numbers, so a reduction must end in one.",
            f"x.{name}() over a row with one dimension",
        )
    nodes = value.nodes if dtype is None else [convert(n, dtype) for n in value.nodes]
    if not value.shape and name in ("max", "min"):
        return value
    return Value((), (_fold(name, nodes),))


def _fold(name: str, nodes: Sequence[Node]) -> Node:
    kind = nodes[0].dtype
    if name in ("sum", "prod") and not kind.is_float:
        return _chain(name, [cast(n, DType.INT64) for n in nodes])
    if name in ("any", "all"):
        return _chain(name, [FUNCTIONS["bool"](n) for n in nodes])
    if name not in ("sum", "prod", "mean") or kind not in _LOW or len(nodes) == 1:
        total = _chain(name, nodes)
        return build(Op.DIV, total, weak(len(nodes))) if name == "mean" else total
    return cast(_fold(name, [cast(n, DType.FLOAT32) for n in nodes]), kind)


def _chain(name: str, nodes: Iterable[Node]) -> Node:
    total, *rest = nodes
    for node in rest:
        total = FUNCTIONS[_FUNCTION[name]](total, node)
    return total


def product(name: str, a: Value, b: Value) -> Value:
    """`a @ b`, `torch.dot` or `torch.inner` of vectors and matrices."""
    columns = transposed(b) if name == "matmul" and len(b.shape) == 2 else b
    ranks = len(a.shape), len(b.shape)
    if 0 in ranks or max(ranks) > (1 if name == "dot" else 2) or a.shape[-1] != columns.shape[-1]:
        raise TraceError(
            f"multiplies values of shapes {a.shape} and {b.shape} with `{name}`",
            "It takes rows of one length, or matrices that fit.",
            "u[q_idx] @ v[kv_idx] for rows, u[q_idx] @ t[h] @ v[kv_idx] with a matrix between them, x * y for numbers",
        )
    length = a.shape[-1]
    nodes = [_inner(x, y) for x in _split(a.nodes, length) for y in _split(columns.nodes, length)]
    return Value((*a.shape[:-1], *columns.shape[:-1]), tuple(nodes))


def _split(nodes: Sequence[Node], length: int) -> list[Sequence[Node]]:
    return [nodes[i : i + length] for i in range(0, len(nodes), length)]


def _inner(a: Sequence[Node], b: Sequence[Node]) -> Node:
    products = [build(Op.MUL, x, y) for x, y in zip(a, b, strict=True)]
    kind = products[0].dtype
    if kind not in _LOW:
        return _chain("sum", products)
    exact = [build(Op.MUL, cast(x, DType.FLOAT32), cast(y, DType.FLOAT32)) for x, y in zip(a, b, strict=True)]
    return cast(_chain("sum", exact), kind)


def transposed(value: Value) -> Value:
    """A matrix with its dimensions exchanged; anything else as it is."""
    if len(value.shape) != 2:
        return value
    _, columns = value.shape
    return Value((columns, value.shape[0]), tuple(n for i in range(columns) for n in value.nodes[i::columns]))


def keeps_one(name: str, args: Sequence[Any]) -> bool:
    """Whether `expand` or the like, of a number, gives one number."""
    if name in ("expand_as", "view_as"):
        return math.prod(args[0].shape) == 1
    sizes = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list, torch.Size)) else args
    return name != "expand" or all(n in (1, -1) for n in sizes)
