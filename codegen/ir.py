"""The intermediate representation: typed scalar expressions, one value per (b, h, q_idx, kv_idx).

A `Node` is immutable and hash-consed: equal expressions are the same object, so common sub-expressions are shared by
construction and dictionaries keyed by nodes are cheap. Nothing here knows torch or Triton.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterator
from enum import Enum, IntEnum
from typing import ClassVar


class DType(Enum):
    """Element types, named as torch names them."""

    BOOL = "bool"
    UINT8 = "uint8"
    INT8 = "int8"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is Python code, on the path of every trace

    @property
    def is_float(self) -> bool:
        return self in _FLOATS

    @property
    def is_int(self) -> bool:
        return self is not DType.BOOL and self not in _FLOATS


_FLOATS = frozenset((DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32, DType.FLOAT64))


class Kind(IntEnum):
    """How strongly a value takes part in type promotion: a Python number, a 0-d tensor, or a value per element."""

    WEAK = 0
    SCALAR = 1
    ELEMENT = 2


class Op(Enum):
    """Every operation an expression may contain; the value is its name in the program text."""

    # Leaves
    INPUT = "input"  # score, b, h, q_idx, kv_idx, grad
    CONST = "const"
    FLOAT = "float"  # a run-time Python float
    INT = "int"  # a run-time (symbolic) Python int
    CAPTURED = "captured"  # a captured tensor, only as the first operand of LOAD
    # Memory and types
    LOAD = "load"  # captured[i, j, ...]; negative indices wrap
    CAST = "cast"
    DETACH = "detach"
    # Arithmetic
    ADD = "add"
    SUB = "sub"
    MUL = "mul"
    DIV = "div"
    FLOORDIV = "floordiv"
    TRUNCDIV = "truncdiv"
    MOD = "mod"  # sign of the divisor, as Python and torch.remainder
    FMOD = "fmod"  # sign of the dividend, as C
    POW = "pow"
    MAXIMUM = "maximum"
    MINIMUM = "minimum"
    NEG = "neg"
    ABS = "abs"
    SIGN = "sign"
    # Bits and logic
    AND = "and"
    OR = "or"
    XOR = "xor"
    NOT = "not"
    SHL = "shl"
    SHR = "shr"
    # Comparison and choice
    LT = "lt"
    LE = "le"
    EQ = "eq"
    NE = "ne"
    WHERE = "where"
    # Elementary functions
    EXP = "exp"
    EXP2 = "exp2"
    EXPM1 = "expm1"
    LOG = "log"
    LOG2 = "log2"
    LOG1P = "log1p"
    SQRT = "sqrt"
    RSQRT = "rsqrt"
    SIN = "sin"
    COS = "cos"
    ATAN = "atan"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    ERF = "erf"
    FLOOR = "floor"
    CEIL = "ceil"
    ROUND = "round"
    TRUNC = "trunc"

    __hash__ = object.__hash__


INPUTS = ("score", "b", "h", "q_idx", "kv_idx", "grad")
INDEX_INPUTS = ("b", "h", "q_idx", "kv_idx")
COMMUTATIVE = frozenset((Op.ADD, Op.MUL, Op.MAXIMUM, Op.MINIMUM, Op.AND, Op.OR, Op.XOR, Op.EQ, Op.NE))

Value = str | int | float | bool | tuple[int, int] | None


class Node:
    """One operation on other nodes.

    `value` holds what a leaf needs: the input's name, a constant, the number of a run-time scalar, or `(number, rank)`
    of a captured tensor. `axes` is the set of inputs the value depends on.
    """

    __slots__ = ("__weakref__", "args", "axes", "dtype", "kind", "op", "order", "value")
    op: Op
    args: tuple[Node, ...]
    dtype: DType
    kind: Kind
    value: Value
    axes: frozenset[str]
    order: tuple[int, str, tuple[tuple[str, int], ...]]

    _interned: ClassVar[weakref.WeakValueDictionary[tuple[object, ...], Node]] = weakref.WeakValueDictionary()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __new__(cls, op: Op, args: tuple[Node, ...], dtype: DType, kind: Kind, value: Value = None) -> Node:
        # repr keeps 0.0 apart from -0.0, True from 1, and makes nan equal to itself.
        key = (op, args, dtype, kind, repr(value))
        with cls._lock:
            node = cls._interned.get(key)
            if node is None:
                node = super().__new__(cls)
                put = object.__setattr__
                put(node, "op", op)
                put(node, "args", args)
                put(node, "dtype", dtype)
                put(node, "kind", kind)
                put(node, "value", value)
                own = frozenset((str(value),)) if op is Op.INPUT else frozenset()
                put(node, "axes", own.union(*(a.axes for a in args)))
                put(node, "order", _order(node))
                cls._interned[key] = node
        return node

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Node is immutable")

    def __reduce__(self) -> tuple[type[Node], tuple[object, ...]]:
        return Node, (self.op, self.args, self.dtype, self.kind, self.value)

    def __repr__(self) -> str:
        inner = ", ".join(map(repr, self.args)) if self.args else repr(self.value)
        return f"{self.op.value}:{self.dtype.value}({inner})"

    @property
    def lhs(self) -> Node:
        return self.args[0]

    @property
    def rhs(self) -> Node:
        return self.args[1]

    @property
    def is_const(self) -> bool:
        return self.op is Op.CONST


def _order(node: Node) -> tuple[int, str, tuple[tuple[str, int], ...]]:
    """A sort key for the operands of commutative operations: inputs first, constants last, the same in every process.

    The numbers of captured tensors and run-time scalars only break ties, so dropping unused ones reorders nothing.
    """
    numbered = node.op in (Op.CAPTURED, Op.FLOAT, Op.INT)
    if node.op is Op.INPUT:
        rank = INPUTS.index(str(node.value))
    else:
        rank = len(INPUTS) + (node.op in (Op.CONST, Op.FLOAT, Op.INT))
    own = (node.value[1] if isinstance(node.value, tuple) else None) if numbered else node.value
    text = repr((node.op.value, node.dtype.value, own, [a.order[:2] for a in node.args]))
    leaves = (
        [(node.op.value, node.value[0] if isinstance(node.value, tuple) else int(node.value or 0))] if numbered else []
    )
    for arg in node.args:
        leaves.extend(x for x in arg.order[2] if x not in leaves)
    return rank, hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), tuple(leaves)


def input_node(name: str, dtype: DType) -> Node:
    """One of the arguments of a mod, or `grad`, the derivative of the loss with respect to the modified score."""
    return Node(Op.INPUT, (), dtype, Kind.ELEMENT, name)


def const(value: bool | int | float, dtype: DType, kind: Kind = Kind.ELEMENT) -> Node:
    """A literal of the given type."""
    if dtype is DType.BOOL:
        value = bool(value)
    elif dtype.is_int:
        value = int(value)
    else:
        value = float(value)
    return Node(Op.CONST, (), dtype, kind, value)


def walk(*roots: Node) -> Iterator[Node]:
    """Every node below `roots` once, operands before the operations that use them."""
    seen: set[Node] = set()
    for root in roots:
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if node in seen:
                continue
            if ready:
                seen.add(node)
                yield node
            else:
                stack.append((node, True))
                stack.extend((a, False) for a in reversed(node.args))
