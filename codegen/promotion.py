"""torch's type promotion as a table, and the constructors that apply it: operands in, a well-typed `Node` out.

Python numbers are weak, 0-d tensors give way to per-element values of the same category (bool < int < float), and
integer division or an elementary function of integers gives the default float dtype. Law 1 checks all of it against
torch itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from .errors import TraceError
from .ir import DType, Kind, Node, Op, const
from .spec import SIGNATURES, apply

_DEFAULT_FLOAT: ContextVar[DType] = ContextVar("default_float", default=DType.FLOAT32)

_LADDER = (DType.INT8, DType.INT16, DType.INT32, DType.INT64)
_FLOAT_LADDER = (DType.FLOAT16, DType.FLOAT32, DType.FLOAT64)
_INT_RANGE = {
    DType.UINT8: (0, 255),
    DType.INT8: (-(2**7), 2**7 - 1),
    DType.INT16: (-(2**15), 2**15 - 1),
    DType.INT32: (-(2**31), 2**31 - 1),
    DType.INT64: (-(2**63), 2**63 - 1),
}


@contextmanager
def default_float(dtype: DType) -> Iterator[None]:
    """The float type that integers and Python floats become, torch's default dtype, while a mod is traced."""
    token = _DEFAULT_FLOAT.set(dtype)
    try:
        yield
    finally:
        _DEFAULT_FLOAT.reset(token)


def current_default_float() -> DType:
    return _DEFAULT_FLOAT.get()


def promote(a: DType, b: DType) -> DType:
    """The smallest dtype that both convert to, for operands of equal standing."""
    if a is b:
        return a
    if a is DType.BOOL:
        return b
    if b is DType.BOOL:
        return a
    if a.is_float or b.is_float:
        if not (a.is_float and b.is_float):
            return a if a.is_float else b
        if DType.BFLOAT16 in (a, b):
            other = b if a is DType.BFLOAT16 else a
            return DType.FLOAT32 if other is DType.FLOAT16 else other
        return max(a, b, key=_FLOAT_LADDER.index)
    if DType.UINT8 in (a, b):
        other = b if a is DType.UINT8 else a
        return DType.INT16 if other is DType.INT8 else other
    return max(a, b, key=_LADDER.index)


def result_dtype(operands: Sequence[Node]) -> DType:
    """What torch computes in when these operands meet."""
    groups: dict[Kind, DType] = {}
    for node in operands:
        dtype = node.dtype
        if node.kind is Kind.WEAK and dtype.is_float:
            dtype = _DEFAULT_FLOAT.get()
        groups[node.kind] = promote(groups[node.kind], dtype) if node.kind in groups else dtype
    result: DType | None = None
    for kind in sorted(groups, reverse=True):
        result = groups[kind] if result is None else _combine(result, groups[kind])
    assert result is not None
    return result


def _combine(stronger: DType, weaker: DType) -> DType:
    """A weaker group counts only if its category (bool, int, float) is higher."""
    if stronger.is_float:
        return stronger
    if stronger is DType.BOOL or weaker.is_float:
        return promote(stronger, weaker)
    return stronger


def cast(node: Node, dtype: DType) -> Node:
    """`node` as `dtype`. A literal is converted on the spot; a run-time Python float is read as that type at once, for it
    was never rounded to the default one."""
    if node.op is Op.FLOAT:
        node = Node(Op.FLOAT, (), dtype if dtype.is_float else DType.FLOAT64, Kind.WEAK, node.value)
    if node.dtype is dtype and node.kind is not Kind.WEAK:
        return node
    if node.is_const and isinstance(node.value, (bool, int, float)):
        if dtype.is_int and not node.dtype.is_float:
            low, high = _INT_RANGE[dtype]
            if not low <= node.value <= high:
                raise TraceError(
                    f"uses the number {node.value}",
                    f"It does not fit {dtype.value}, the type of the value it is combined with.",
                    "convert the other operand first, e.g. q_idx.to(torch.int64)",
                )
        if not (dtype.is_int and node.dtype.is_float):
            return const(node.value, dtype, max(node.kind, Kind.SCALAR))
    if node.dtype is dtype:
        return Node(Op.CAST, (node,), dtype, Kind.SCALAR)
    return Node(Op.CAST, (node,), dtype, max(node.kind, Kind.SCALAR))


def _as_float(dtype: DType) -> DType:
    return dtype if dtype.is_float else _DEFAULT_FLOAT.get()


def build(op: Op, *args: Node) -> Node:
    """`op` applied to `args` as torch would: promoted to a common dtype first."""
    if op is Op.WHERE:
        condition, *branches = args
        dtype = result_dtype(branches)
        a, b = (cast(x, dtype) for x in branches)
        return apply(op, truth(condition), a, b)
    signature = SIGNATURES[op]
    dtype = result_dtype(args)
    if signature.accepts == "f":
        dtype = _as_float(dtype)
    refused = op is Op.SUB and any(a.dtype is DType.BOOL for a in args)
    if refused or (dtype is DType.BOOL and "b" not in signature.accepts):
        if op in _ON_BOOL and not refused:
            return build(_ON_BOOL[op], *args)
        raise TraceError(
            f"applies `{op.value}` to booleans",
            "It is not defined for them, as in torch.",
            "convert first, e.g. (q_idx >= kv_idx).to(torch.int32); for logic use &, |, ^ and ~",
        )
    if dtype.is_float and "f" not in signature.accepts:
        raise TraceError(
            f"applies `{op.value}` to {dtype.value} values",
            "It is defined for integers and booleans only.",
            "compare first, e.g. (x > 0) & (y > 0)",
        )
    return apply(op, *(cast(a, dtype) for a in args))


# torch defines these three on booleans as logic.
_ON_BOOL = {Op.ADD: Op.OR, Op.MUL: Op.AND, Op.MAXIMUM: Op.OR, Op.MINIMUM: Op.AND}


def truth(node: Node) -> Node:
    """`node` as a bool: true where it is not zero."""
    if node.dtype is DType.BOOL:
        return cast(node, DType.BOOL)
    return build(Op.NE, node, const(0, node.dtype, Kind.SCALAR))
