"""Which graphs are legal: one row per operation, and a check that stands between the passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .errors import ProgramError
from .ir import COMMUTATIVE, DType, Kind, Node, Op, walk


class Signature(NamedTuple):
    """Operands an operation takes. All value operands have one dtype, taken from `accepts`; `result` says what comes out."""

    arity: int
    accepts: str  # letters: b(ool) i(nt) f(loat)
    result: str  # "same" or "bool"


_NUMBER, _INT, _LOGIC, _FLOAT, _ANY = "if", "i", "bi", "f", "bif"

SIGNATURES: dict[Op, Signature] = {
    Op.ADD: Signature(2, _NUMBER, "same"),
    Op.SUB: Signature(2, _NUMBER, "same"),
    Op.MUL: Signature(2, _NUMBER, "same"),
    Op.DIV: Signature(2, _FLOAT, "same"),
    Op.FLOORDIV: Signature(2, _NUMBER, "same"),
    Op.TRUNCDIV: Signature(2, _NUMBER, "same"),
    Op.MOD: Signature(2, _NUMBER, "same"),
    Op.FMOD: Signature(2, _NUMBER, "same"),
    Op.POW: Signature(2, _NUMBER, "same"),
    Op.MAXIMUM: Signature(2, _NUMBER, "same"),
    Op.MINIMUM: Signature(2, _NUMBER, "same"),
    Op.NEG: Signature(1, _NUMBER, "same"),
    Op.ABS: Signature(1, _NUMBER, "same"),
    Op.SIGN: Signature(1, _NUMBER, "same"),
    Op.AND: Signature(2, _LOGIC, "same"),
    Op.OR: Signature(2, _LOGIC, "same"),
    Op.XOR: Signature(2, _LOGIC, "same"),
    Op.NOT: Signature(1, _LOGIC, "same"),
    Op.SHL: Signature(2, _INT, "same"),
    Op.SHR: Signature(2, _INT, "same"),
    Op.LT: Signature(2, _ANY, "bool"),
    Op.LE: Signature(2, _ANY, "bool"),
    Op.EQ: Signature(2, _ANY, "bool"),
    Op.NE: Signature(2, _ANY, "bool"),
    Op.DETACH: Signature(1, _ANY, "same"),
    **{
        op: Signature(1, _FLOAT, "same")
        for op in (
            *(Op.EXP, Op.EXP2, Op.EXPM1, Op.LOG, Op.LOG2, Op.LOG1P, Op.SQRT, Op.RSQRT, Op.SIN, Op.COS, Op.ATAN),
            *(Op.TANH, Op.SIGMOID, Op.ERF, Op.FLOOR, Op.CEIL, Op.ROUND, Op.TRUNC),
        )
    },
}

LEAVES = frozenset((Op.INPUT, Op.CONST, Op.FLOAT, Op.INT, Op.CAPTURED))


def letter(dtype: DType) -> str:
    """The class of a dtype as `Signature.accepts` spells it."""
    return "f" if dtype.is_float else "b" if dtype is DType.BOOL else "i"


def apply(op: Op, *args: Node) -> Node:
    """`op` on operands that already have one dtype; commutative operands are put in order."""
    if op in COMMUTATIVE:
        args = tuple(sorted(args, key=lambda a: a.order))
    kind = max(a.kind for a in args)
    if op is Op.WHERE:
        return Node(op, args, args[1].dtype, kind)
    bool_result = SIGNATURES[op].result == "bool"
    return Node(op, args, DType.BOOL if bool_result else args[0].dtype, kind)


def rebuild(node: Node, args: tuple[Node, ...]) -> Node:
    """`node` on other operands of the same dtypes."""
    if args == node.args:
        return node
    if node.op in SIGNATURES or node.op is Op.WHERE:
        return apply(node.op, *args)
    return Node(node.op, args, node.dtype, node.kind, node.value)


def load(base: Node, *index: Node) -> Node:
    """The element of a captured tensor; a tensor of rank 0 is a scalar to type promotion."""
    return Node(Op.LOAD, (base, *index), base.dtype, Kind.ELEMENT if index else Kind.SCALAR)


def substitute(roots: Iterable[Node], rewrite: dict[Node, Node]) -> list[Node]:
    """`roots` with every node that `rewrite` maps replaced, all the way down."""
    roots = list(roots)
    done = dict(rewrite)
    for node in walk(*roots):
        if node not in done:
            done[node] = rebuild(node, tuple(done[a] for a in node.args))
    return [done[r] for r in roots]


def check(roots: Iterable[Node], *, allow_grad: bool = False) -> None:
    """Raise `ProgramError` unless every node below `roots` is well typed. `grad` is legal only in a derivative."""
    for node in walk(*roots):
        problem = _problem(node, allow_grad)
        if problem:
            raise ProgramError(f"illegal node {node!r}: {problem}")


def _problem(node: Node, allow_grad: bool) -> str | None:
    op, args = node.op, node.args
    if op in LEAVES:
        if args:
            return "a leaf has no operands"
        if op is Op.INPUT and node.value == "grad" and not allow_grad:
            return "`grad` exists only in a derivative"
        return None
    if op is Op.LOAD:
        base, *index = args
        if base.op is not Op.CAPTURED:
            return "only a captured tensor can be loaded from"
        assert isinstance(base.value, tuple)
        if len(index) != base.value[1]:
            return f"{len(index)} indices for a tensor of rank {base.value[1]}"
        if not all(i.dtype.is_int for i in index):
            return "an index must be an integer"
        return None if node.dtype is base.dtype else "a load has the dtype of its tensor"
    if any(a.op is Op.CAPTURED for a in args):
        return "a captured tensor must be loaded from before it is used"
    if op is Op.CAST:
        return None if len(args) == 1 else "a cast has one operand"
    if op is Op.WHERE:
        if len(args) != 3 or args[0].dtype is not DType.BOOL:
            return "where takes a bool and two values"
        return None if args[1].dtype is args[2].dtype is node.dtype else "the branches of where differ in dtype"
    signature = SIGNATURES[op]
    if len(args) != signature.arity:
        return f"{op.value} takes {signature.arity} operands"
    if len({a.dtype for a in args}) != 1:
        return "operands differ in dtype"
    if letter(args[0].dtype) not in signature.accepts:
        return f"{op.value} does not take {args[0].dtype.value}"
    expected = DType.BOOL if signature.result == "bool" else args[0].dtype
    if node.dtype is not expected:
        return f"{op.value} gives {expected.value}"
    return None if node.kind == max((a.kind for a in args), default=Kind.ELEMENT) else "wrong promotion kind"
