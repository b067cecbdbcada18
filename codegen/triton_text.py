"""How each operation, type and constant is written in Triton: one row an operation.

A speller takes the operation, the texts of its operands, and the name of Triton's module. Where Triton has no operation with
torch's meaning, the text calls a function of `device`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .ir import DType, Node, Op

TRITON_DTYPE = {d: "int1" if d is DType.BOOL else d.value for d in DType}
BITS = {DType.UINT8: 8, DType.INT8: 8, DType.INT16: 16, DType.INT32: 32, DType.INT64: 64}
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127

Speller = Callable[[Node, list[str], str], str]


def _call(name: str) -> Speller:
    return lambda node, args, tl: f"{tl}.{name}({', '.join(args)})"


def _device(name: str) -> Speller:
    return lambda node, args, tl: f"device.{name}({', '.join(args)})"


def _infix(sign: str) -> Speller:
    return lambda node, args, tl: f"{args[0]} {sign} {args[1]}"


def _by_type(integer: Speller, floating: Speller) -> Speller:
    return lambda node, args, tl: (floating if node.lhs.dtype.is_float else integer)(node, args, tl)


def _extremum(name: str) -> Speller:
    """torch's maximum and minimum give nan if an operand is nan."""
    return _by_type(
        _call(name), lambda node, args, tl: f"{tl}.{name}({args[0]}, {args[1]}, propagate_nan={tl}.PropagateNan.ALL)"
    )


def _integer_division(exact: str, device: str) -> Speller:
    """Triton's operator where neither operand can be negative, else the function that rounds as torch does."""

    def spell(node: Node, args: list[str], tl: str) -> str:
        plain = never_negative(node.lhs) and never_negative(node.rhs)
        return f"{args[0]} {exact} {args[1]}" if plain else f"device.{device}({args[0]}, {args[1]})"

    return spell


def _shift(sign: str, device: str) -> Speller:
    def spell(node: Node, args: list[str], tl: str) -> str:
        bits, by = BITS[node.dtype], node.rhs.value
        if node.rhs.is_const and isinstance(by, int) and 0 <= by < bits:
            return f"{args[0]} {sign} {args[1]}"
        return f"device.{device}({args[0]}, {args[1]}, {bits})"

    return spell


def _power(node: Node, args: list[str], tl: str) -> str:
    x, exponent = args[0], node.rhs.value
    if node.rhs.is_const and isinstance(exponent, (int, float)) and math.isfinite(exponent):
        if exponent == int(exponent) and 1 <= exponent <= 4:
            return " * ".join([x] * int(exponent))
        if node.dtype.is_float and exponent in (0.5, -0.5, -1.0):
            return {0.5: f"{tl}.sqrt({x})", -0.5: f"{tl}.rsqrt({x})", -1.0: f"1.0 / {x}"}[exponent]
    if node.dtype.is_float:
        return f"device.power({x}, {args[1]})"
    bits = exponent.bit_length() if node.rhs.is_const and isinstance(exponent, int) else BITS[node.dtype] - 1
    return f"device.integer_power({x}, {args[1]}, {bits})"


def _not(node: Node, args: list[str], tl: str) -> str:
    if node.dtype is DType.UINT8:  # whose bits Triton's interpreter cannot turn with ~
        return f"{args[0]} ^ 255"
    return f"{args[0]} == 0" if node.dtype is DType.BOOL else f"~{args[0]}"


SPELLING: dict[Op, Speller] = {
    Op.DETACH: lambda node, args, tl: args[0],
    Op.ADD: _infix("+"),
    Op.SUB: _infix("-"),
    Op.MUL: _infix("*"),
    Op.DIV: _infix("/"),
    Op.FLOORDIV: _by_type(_integer_division("//", "floor_divide"), _device("float_floor_divide")),
    Op.TRUNCDIV: _by_type(_infix("//"), lambda node, args, tl: f"device.truncate({args[0]} / {args[1]})"),
    Op.MOD: _by_type(_integer_division("%", "remainder"), _device("float_remainder")),
    Op.FMOD: _by_type(_infix("%"), _device("fmod")),
    Op.POW: _power,
    Op.MAXIMUM: _extremum("maximum"),
    Op.MINIMUM: _extremum("minimum"),
    Op.NEG: lambda node, args, tl: f"-{args[0]}",
    Op.ABS: _call("abs"),
    Op.SIGN: _device("sign"),
    Op.AND: _infix("&"),
    Op.OR: _infix("|"),
    Op.XOR: _infix("^"),
    Op.NOT: _not,
    Op.SHL: _shift("<<", "shift_left"),
    Op.SHR: _shift(">>", "shift_right"),
    Op.LT: _infix("<"),
    Op.LE: _infix("<="),
    Op.EQ: _infix("=="),
    Op.NE: _infix("!="),
    Op.WHERE: _call("where"),
    Op.EXP: _call("exp"),
    Op.EXP2: _call("exp2"),
    Op.EXPM1: _device("expm1"),
    Op.LOG: _call("log"),
    Op.LOG2: _call("log2"),
    Op.LOG1P: _device("log1p"),
    Op.SQRT: _call("sqrt"),
    Op.RSQRT: _call("rsqrt"),
    Op.SIN: _call("sin"),
    Op.COS: _call("cos"),
    Op.ATAN: _device("atan"),
    Op.TANH: _device("tanh"),
    Op.SIGMOID: _device("sigmoid"),
    Op.ERF: _call("erf"),
    Op.FLOOR: _call("floor"),
    Op.CEIL: _call("ceil"),
    Op.ROUND: _device("round_even"),
    Op.TRUNC: _device("truncate"),
}


def never_negative(node: Node) -> bool:
    """Whether an integer is known to be 0 or more. Sums and products may overflow, so they are not known."""
    if node.op is Op.CONST:
        return isinstance(node.value, int) and node.value >= 0
    if node.op is Op.INPUT:
        return node.value in ("b", "h", "q_idx", "kv_idx")
    if node.dtype in (DType.UINT8, DType.BOOL):
        return True
    match node.op:
        case Op.FLOORDIV | Op.MINIMUM:
            return never_negative(node.lhs) and never_negative(node.rhs)
        case Op.MAXIMUM | Op.AND:
            return never_negative(node.lhs) or never_negative(node.rhs)
        case Op.MOD:
            return never_negative(node.rhs)
        case Op.SHR:
            return never_negative(node.lhs)
        case Op.WHERE:
            condition, chosen, other = node.args
            # x.clamp(min=c) is where(x < c, c, x)
            clamped = condition.op is Op.LT and condition.lhs is other and never_negative(condition.rhs)
            return never_negative(chosen) and (clamped or never_negative(other))
        case Op.CAST:
            source = node.lhs.dtype
            if source.is_float or not node.dtype.is_int:
                return False
            needed = {DType.BOOL: 1, DType.UINT8: 9}.get(source) or BITS[source]  # with a bit for the sign
            return BITS[node.dtype] >= needed and never_negative(node.lhs)
    return False


def literal(node: Node, tl: str) -> str:
    """A constant as an operand beside a tensor: bare where Triton gives it the right type by itself."""
    bare = node.dtype in (DType.FLOAT32, DType.INT32, DType.BOOL)
    return _number_text(node) if bare else typed(node, tl)


def typed(node: Node, tl: str) -> str:
    """A constant as a scalar of its own type; one of bfloat16, which Triton's interpreter lacks, by way of float32."""
    if node.dtype is DType.BFLOAT16:
        return f"{tl}.full((), {_number_text(node)}, {tl}.float32).to({tl}.bfloat16)"
    return f"{tl}.full((), {_number_text(node)}, {tl}.{TRITON_DTYPE[node.dtype]})"


def _number_text(node: Node) -> str:
    value = node.value
    if not isinstance(value, float):
        return repr(value)
    if node.dtype is DType.FLOAT32 and math.isfinite(value) and abs(value) > _LARGEST_FLOAT32:
        value = math.copysign(math.inf, value)
    return repr(value) if math.isfinite(value) else f'float("{value}")'
