"""The many names of one torch function: operators, reflected operators, in-place forms, aliases -> the table's name."""

from __future__ import annotations

ALIASES: dict[str, str] = {
    **dict((("and", "bitwise_and"), ("or", "bitwise_or"), ("xor", "bitwise_xor"), ("invert", "bitwise_not"))),
    **dict((("lshift", "bitwise_left_shift"), ("rshift", "bitwise_right_shift"), ("bitwise_invert", "bitwise_not"))),
    **dict((("truediv", "div"), ("true_divide", "div"), ("divide", "div"), ("rtruediv", "rdiv"))),
    **dict((("floordiv", "floor_divide"), ("mod", "remainder"), ("subtract", "sub"), ("multiply", "mul"))),
    **dict((("radd", "add"), ("rmul", "mul"), ("rand", "bitwise_and"), ("ror", "bitwise_or"))),
    **dict((("rxor", "bitwise_xor"), ("negative", "neg"), ("absolute", "abs"), ("pos", "positive"))),
    **dict((("greater", "gt"), ("less", "lt"), ("greater_equal", "ge"), ("less_equal", "le"))),
    **dict((("not_equal", "ne"), ("clip", "clamp"), ("fix", "trunc"), ("arctan", "atan"), ("sgn", "sign"))),
    **dict((("special_exp2", "exp2"), ("special_expm1", "expm1"), ("special_log1p", "log1p"))),
    **dict((("special_erf", "erf"), ("special_expit", "sigmoid"), ("log_sigmoid", "logsigmoid"))),
}

# Functions that leave a single number as it is.
SHAPE_ONLY = frozenset(("view", "reshape", "squeeze", "unsqueeze", "expand", "expand_as", "view_as", "flatten"))
# Functions that give the tensor itself, or a view of all of it, where there is nothing to convert.
RETURNS_ITSELF = SHAPE_ONLY | frozenset(
    (
        "to",
        "type",
        "type_as",
        "float",
        "double",
        "half",
        "bfloat16",
        "int",
        "long",
        "short",
        "bool",
        "contiguous",
        "positive",
    )
)

# Functions whose result is a random number or that change a tensor at random.
RANDOM = frozenset(
    (
        *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "bernoulli", "bernoulli_"),
        *(
            "normal",
            "normal_",
            "uniform_",
            "exponential_",
            "random_",
            "cauchy_",
            "geometric_",
            "log_normal_",
            "poisson",
        ),
        *("multinomial", "dropout", "dropout_", "alpha_dropout", "feature_dropout", "native_dropout", "rrelu"),
    )
)


def canonical(name: str) -> tuple[str, bool]:
    """The table's name for a torch function, and whether the call changes its first operand in place."""
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        if inner.startswith("i") and inner[1:] in _IN_PLACE_OPERATORS:
            return ALIASES.get(inner[1:], inner[1:]), True
        return ALIASES.get(inner, inner), False
    if name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_"):
        name = name[:-1]
        return ALIASES.get(name, name), True
    name = name.rstrip("_") if name in ("and_", "or_", "not_") else name
    return ALIASES.get(name, name), False


_IN_PLACE_OPERATORS = frozenset(
    ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
)
