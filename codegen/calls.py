"""The torch functions a mod may call, as a table: name -> how it is built from IR operations.

Operands arrive as nodes (Python numbers as weak constants), options such as `dtype` as they were given. What is not in
the table cannot be traced; the user's list of supported operations is printed from it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import lru_cache

import torch

from .errors import TraceError
from .evaluate import IR_DTYPE, TORCH_DTYPE
from .ir import DType, Kind, Node, Op, const
from .promotion import build, cast, current_default_float, result_dtype, truth

Builder = Callable[..., Node]


def _number(value: float, like: Node) -> Node:
    """A literal that takes the type of `like` in promotion."""
    if like.dtype.is_float:
        return const(value, like.dtype, Kind.SCALAR)
    return const(value, current_default_float(), Kind.SCALAR)


def _float(x: Node) -> Node:
    """`x`, as the float type torch would compute an elementary function of it in."""
    return x if x.dtype.is_float else cast(x, current_default_float())


def _unary(op: Op) -> Builder:
    return lambda input: build(op, input)


def _binary(op: Op) -> Builder:
    return lambda input, other: build(op, input, other)


def _swapped(op: Op) -> Builder:
    return lambda input, other: build(op, other, input)


def _rounding(op: Op) -> Builder:
    return lambda input: build(op, input) if input.dtype.is_float else input


def _scaled(input: Node, other: Node, alpha: float) -> Node:
    """`other * alpha`, in the type of the sum that it is part of."""
    dtype = result_dtype([input, other])
    factor = weak(bool(alpha) if dtype is DType.BOOL else alpha)
    return other if alpha == 1 else build(Op.MUL, cast(other, dtype), factor)


def _add(input: Node, other: Node, alpha: float = 1) -> Node:
    return build(Op.ADD, input, _scaled(input, other, alpha))


def _sub(input: Node, other: Node, alpha: float = 1) -> Node:
    return build(Op.SUB, input, _scaled(input, other, alpha))


def _div(input: Node, other: Node, rounding_mode: str | None = None) -> Node:
    ops = {None: Op.DIV, "floor": Op.FLOORDIV, "trunc": Op.TRUNCDIV}
    return build(ops[rounding_mode], input, other)


def _not(input: Node) -> Node:
    return build(Op.NOT, input)


def _clamp(input: Node, min: Node | None = None, max: Node | None = None) -> Node:
    # Written with where: the gradient at the bounds is then torch's, one.
    dtype = result_dtype([x for x in (input, min, max) if x is not None])
    x = cast(input, dtype)
    if min is not None:
        low = cast(min, dtype)
        x = build(Op.WHERE, build(Op.LT, x, low), low, x)
    if max is not None:
        high = cast(max, dtype)
        x = build(Op.WHERE, build(Op.LT, high, x), high, x)
    return x


def _relu(input: Node) -> Node:
    zero = const(0, input.dtype, Kind.SCALAR)
    return build(Op.WHERE, build(Op.LE, input, zero), zero, input)


def _leaky_relu(input: Node, negative_slope: float = 0.01) -> Node:
    x = _float(input)
    return build(Op.WHERE, build(Op.LT, _number(0, x), x), x, build(Op.MUL, x, weak(negative_slope)))


def _elu(input: Node, alpha: float = 1.0) -> Node:
    x = _float(input)
    positive = build(Op.LT, _number(0, x), x)
    # exp of a clipped argument: the branch not taken stays finite, so its gradient is zero and not nan.
    clipped = build(Op.WHERE, positive, _number(0, x), x)
    return build(Op.WHERE, positive, x, build(Op.MUL, build(Op.EXPM1, clipped), weak(alpha)))


def _softplus(input: Node, beta: float = 1.0, threshold: float = 20.0) -> Node:
    x = _float(input)
    scaled = build(Op.MUL, x, weak(beta))
    linear = build(Op.LT, weak(threshold), scaled)
    # exp of a clipped argument: the branch not taken stays finite, so its gradient is zero and not nan.
    clipped = build(Op.WHERE, linear, _number(0, x), scaled)
    curve = build(Op.DIV, build(Op.LOG1P, build(Op.EXP, clipped)), weak(beta))
    return build(Op.WHERE, linear, x, curve)


def _logsigmoid(input: Node) -> Node:
    x = _float(input)
    tail = build(Op.LOG1P, build(Op.EXP, build(Op.NEG, build(Op.ABS, x))))
    return build(Op.SUB, build(Op.MINIMUM, x, _number(0, x)), tail)


def _gelu(input: Node, approximate: str = "none") -> Node:
    x = _float(input)
    if approximate == "tanh":
        cube = build(Op.MUL, build(Op.MUL, x, x), x)
        inner = build(Op.ADD, x, build(Op.MUL, cube, _number(0.044715, x)))
        bell = build(Op.TANH, build(Op.MUL, inner, _number(math.sqrt(2 / math.pi), x)))
    else:
        bell = build(Op.ERF, build(Op.MUL, x, _number(math.sqrt(0.5), x)))
    return build(Op.MUL, build(Op.MUL, x, _number(0.5, x)), build(Op.ADD, bell, _number(1, x)))


def _logaddexp(input: Node, other: Node) -> Node:
    high = build(Op.MAXIMUM, input, other)
    gap = build(Op.ABS, build(Op.SUB, input, other))
    value = build(Op.ADD, high, build(Op.LOG1P, build(Op.EXP, build(Op.NEG, gap))))
    # Two equal infinities have no difference; they are their own sum. Other ties share the gradient.
    infinite = build(Op.AND, build(Op.EQ, input, other), _isinf(high))
    return build(Op.WHERE, infinite, high, value)


def _lerp(input: Node, end: Node, weight: Node) -> Node:
    return build(Op.ADD, input, build(Op.MUL, weight, build(Op.SUB, end, input)))


def _times(x: Node, factor: Node | float) -> Node:
    if isinstance(factor, Node):
        return build(Op.MUL, x, factor)
    return x if factor == 1 else build(Op.MUL, x, weak(factor))


def _added(op: Op) -> Builder:
    """`input + value * op(tensor1, tensor2)`, all of it in the common type."""

    def added(input: Node, tensor1: Node, tensor2: Node, value: Node | float = 1) -> Node:
        dtype = result_dtype([input, tensor1, tensor2])
        x, a, b = (cast(n, dtype) for n in (input, tensor1, tensor2))
        return build(Op.ADD, x, _times(build(op, a, b), value))

    return added


def _pow(input: Node, exponent: Node) -> Node:
    if exponent.dtype.is_int and exponent.is_const and input.dtype.is_int and int(exponent.value) < 0:  # type: ignore[arg-type]
        raise TraceError(
            "raises an integer to a negative power",
            "The result is no integer, and torch refuses it too.",
            "convert first, e.g. (q_idx - kv_idx).float() ** -1",
        )
    if exponent.is_const and exponent.kind is Kind.WEAK:
        # The exponents that torch computes by other means; the result then agrees to the last bit.
        x = input if input.dtype.is_float or exponent.dtype.is_int else _float(input)
        special = _POWERS.get(float(exponent.value)) if x.dtype.is_float else None  # type: ignore[arg-type]
        if special is not None:
            return special(x)
    return build(Op.POW, input, exponent)


_POWERS: dict[float, Builder] = {
    2.0: lambda x: build(Op.MUL, x, x),
    3.0: lambda x: build(Op.MUL, build(Op.MUL, x, x), x),
    0.5: lambda x: build(Op.SQRT, x),
    -0.5: lambda x: build(Op.RSQRT, x),
    -1.0: lambda x: _reciprocal(x),
}


def _where(condition: Node, input: Node, other: Node) -> Node:
    if condition.dtype is not DType.BOOL:
        raise TraceError(
            f"passes a {condition.dtype.value} condition to torch.where",
            "The condition must be boolean.",
            "torch.where(x != 0, a, b)",
        )
    return build(Op.WHERE, condition, input, other)


def _to(input: Node, *target: object, dtype: torch.dtype | None = None, other: Node | None = None, **_: object) -> Node:
    for item in (dtype, other, *target):
        if isinstance(item, torch.dtype):
            return convert(input, item)
        if isinstance(item, Node) and item.kind is not Kind.WEAK:  # a Python bool is `non_blocking`
            return convert(input, TORCH_DTYPE[item.dtype])
    return input


def _type(input: Node, target_type: object = None, dtype: object = None, **_: object) -> Node:
    target = target_type if dtype is None else dtype
    if not isinstance(target, torch.dtype):
        raise TraceError(
            "calls `type` without a torch.dtype",
            "A traced value is of no tensor type such as torch.FloatTensor.",
            "x.to(torch.float32)",
        )
    return convert(input, target)


def convert(input: Node, dtype: torch.dtype) -> Node:
    """`input` as a torch dtype; conversion to bool asks for non-zero."""
    if dtype not in IR_DTYPE:
        raise TraceError(
            f"converts to {dtype}", "Kernels have no such type.", "one of " + ", ".join(d.value for d in DType)
        )
    return truth(input) if dtype is torch.bool else cast(input, IR_DTYPE[dtype])


def _isinf(input: Node) -> Node:
    return build(Op.EQ, build(Op.ABS, _float(input)), _number(math.inf, input))


def _isfinite(input: Node) -> Node:
    return build(Op.LT, build(Op.ABS, _float(input)), _number(math.inf, input))


def _reciprocal(input: Node) -> Node:
    return build(Op.DIV, _number(1, input), input)


def _tan(input: Node) -> Node:
    return build(Op.DIV, build(Op.SIN, input), build(Op.COS, input))


def _log10(input: Node) -> Node:
    x = build(Op.LOG, input)
    return build(Op.MUL, x, _number(1 / math.log(10), x))


def _silu(input: Node) -> Node:
    return build(Op.MUL, input, build(Op.SIGMOID, input))


def weak(value: bool | int | float) -> Node:
    """A Python number that is part of the program."""
    if isinstance(value, bool):
        return const(value, DType.BOOL, Kind.WEAK)
    if isinstance(value, int):
        return const(value, DType.INT64, Kind.WEAK)
    return const(value, current_default_float(), Kind.WEAK)


def _fill(value: float) -> Builder:
    def filled(input: Node, *_: object, dtype: torch.dtype | None = None, **__: object) -> Node:
        return const(value, input.dtype if dtype is None else IR_DTYPE[dtype])

    return filled


def _full(input: Node, *arguments: object, dtype: torch.dtype | None = None, **__: object) -> Node:
    value = next((a for a in reversed(arguments) if isinstance(a, Node)), None)
    if value is None:
        raise TraceError("fills a tensor with no number", "The value must be a number.", "torch.full_like(score, 0.0)")
    return cast(value, input.dtype if dtype is None else IR_DTYPE[dtype])


def _as(dtype: torch.dtype) -> Builder:
    return lambda input, **_: convert(input, dtype)


def _same(input: Node, *_: object, **__: object) -> Node:
    return input


FUNCTIONS: dict[str, Builder] = {
    # arithmetic
    "add": _add,
    "sub": _sub,
    "rsub": lambda input, other: build(Op.SUB, other, input),
    "mul": _binary(Op.MUL),
    "div": _div,
    "rdiv": lambda input, other: build(Op.DIV, other, input),
    "floor_divide": _binary(Op.FLOORDIV),
    "rfloordiv": _swapped(Op.FLOORDIV),
    "remainder": _binary(Op.MOD),
    "rmod": _swapped(Op.MOD),
    "fmod": _binary(Op.FMOD),
    "pow": _pow,
    "rpow": lambda input, exponent: _pow(exponent, input),
    "neg": _unary(Op.NEG),
    "positive": _same,
    "abs": _unary(Op.ABS),
    "sign": _unary(Op.SIGN),
    "square": lambda input: build(Op.MUL, input, input),
    "reciprocal": _reciprocal,
    "addcmul": _added(Op.MUL),
    "addcdiv": _added(Op.DIV),
    "lerp": _lerp,
    "maximum": _binary(Op.MAXIMUM),
    "minimum": _binary(Op.MINIMUM),
    "clamp": _clamp,
    "clamp_min": lambda input, min: _clamp(input, min),
    "clamp_max": lambda input, max: _clamp(input, None, max),
    # comparison, logic, choice
    "lt": _binary(Op.LT),
    "le": _binary(Op.LE),
    "gt": _swapped(Op.LT),
    "ge": _swapped(Op.LE),
    "eq": _binary(Op.EQ),
    "ne": _binary(Op.NE),
    "where": _where,
    "masked_fill": lambda input, mask, value: cast(build(Op.WHERE, mask, value, input), input.dtype),
    "bitwise_and": _binary(Op.AND),
    "bitwise_or": _binary(Op.OR),
    "bitwise_xor": _binary(Op.XOR),
    "bitwise_not": _not,
    "bitwise_left_shift": _binary(Op.SHL),
    "bitwise_right_shift": _binary(Op.SHR),
    "rlshift": _swapped(Op.SHL),
    "rrshift": _swapped(Op.SHR),
    "logical_and": lambda input, other: build(Op.AND, truth(input), truth(other)),
    "logical_or": lambda input, other: build(Op.OR, truth(input), truth(other)),
    "logical_xor": lambda input, other: build(Op.XOR, truth(input), truth(other)),
    "logical_not": lambda input: build(Op.NOT, truth(input)),
    "isnan": lambda input: build(Op.NE, input, input),
    "isinf": _isinf,
    "isfinite": _isfinite,
    # elementary functions
    "exp": _unary(Op.EXP),
    "exp2": _unary(Op.EXP2),
    "expm1": _unary(Op.EXPM1),
    "log": _unary(Op.LOG),
    "log2": _unary(Op.LOG2),
    "log10": _log10,
    "log1p": _unary(Op.LOG1P),
    "logaddexp": _logaddexp,
    "sqrt": _unary(Op.SQRT),
    "rsqrt": _unary(Op.RSQRT),
    "sin": _unary(Op.SIN),
    "cos": _unary(Op.COS),
    "tan": _tan,
    "atan": _unary(Op.ATAN),
    "tanh": _unary(Op.TANH),
    "sigmoid": _unary(Op.SIGMOID),
    "erf": _unary(Op.ERF),
    "floor": _rounding(Op.FLOOR),
    "ceil": _rounding(Op.CEIL),
    "round": _rounding(Op.ROUND),
    "trunc": _rounding(Op.TRUNC),
    # activations
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "gelu": _gelu,
    "silu": _silu,
    "softplus": _softplus,
    "logsigmoid": _logsigmoid,
    # types and constants
    "to": _to,
    "type_as": _to,
    "type": _type,
    "float": _as(torch.float32),
    "double": _as(torch.float64),
    "half": _as(torch.float16),
    "bfloat16": _as(torch.bfloat16),
    "int": _as(torch.int32),
    "long": _as(torch.int64),
    "short": _as(torch.int16),
    "bool": _as(torch.bool),
    "zeros_like": _fill(0),
    "ones_like": _fill(1),
    "new_zeros": _fill(0),
    "new_ones": _fill(1),
    "new_tensor": lambda input, data, **options: _full(input, data, **options),
    "full_like": _full,
    "new_full": _full,
    "detach": lambda input: build(Op.DETACH, input),
    "clone": _same,
    "contiguous": _same,
}


BY_VALUE = frozenset(("beta", "threshold", "approximate"))  # options, also where they are given by position


@lru_cache(maxsize=256)
def parameters(builder: Builder) -> tuple[str, ...]:
    """The names of a builder's parameters."""
    return tuple(inspect.signature(builder).parameters)
