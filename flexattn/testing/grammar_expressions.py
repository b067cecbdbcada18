"""Expressions of a mod that can be evaluated on tensors and printed as Python: the same thing, in either form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .grammar_operations import OPERATIONS


class Expression:
    """What all expressions have in common. Operators make larger ones; `str` is the Python source."""

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The expressions directly inside."""
        return ()

    def value(self, names: Mapping[str, Any]) -> Any:
        """Its value, where names stand for the given values."""
        raise NotImplementedError

    def __add__(self, other: Operand) -> Apply:
        return apply("({} + {})", self, other)

    def __radd__(self, other: Operand) -> Apply:
        return apply("({} + {})", other, self)

    def __sub__(self, other: Operand) -> Apply:
        return apply("({} - {})", self, other)

    def __mul__(self, other: Operand) -> Apply:
        return apply("({} * {})", self, other)

    def __rmul__(self, other: Operand) -> Apply:
        return apply("({} * {})", other, self)

    def __truediv__(self, other: Operand) -> Apply:
        return apply("({} / {})", self, other)

    def __floordiv__(self, other: Operand) -> Apply:
        return apply("({} // {})", self, other)

    def __mod__(self, other: Operand) -> Apply:
        return apply("({} % {})", self, other)

    def __pow__(self, other: Operand) -> Apply:
        return apply("({} ** {})", self, other)

    def __rshift__(self, other: Operand) -> Apply:
        return apply("({} >> {})", self, other)

    def __and__(self, other: Operand) -> Apply:
        return apply("({} & {})", self, other)

    def __or__(self, other: Operand) -> Apply:
        return apply("({} | {})", self, other)

    def __xor__(self, other: Operand) -> Apply:
        return apply("({} ^ {})", self, other)

    def __invert__(self) -> Apply:
        return apply("(~{})", self)

    def __neg__(self) -> Apply:
        return apply("(-{})", self)

    def __abs__(self) -> Apply:
        return apply("abs({})", self)

    def __lt__(self, other: Operand) -> Apply:
        return apply("({} < {})", self, other)

    def __le__(self, other: Operand) -> Apply:
        return apply("({} <= {})", self, other)

    def __gt__(self, other: Operand) -> Apply:
        return apply("({} > {})", self, other)

    def __ge__(self, other: Operand) -> Apply:
        return apply("({} >= {})", self, other)

    def __getitem__(self, index: Operand | tuple[Operand, ...]) -> Apply:
        at = index if isinstance(index, tuple) else (index,)
        return apply(f"{{}}[{', '.join(['{}'] * len(at))}]", self, *at)


Operand = Expression | bool | int | float


@dataclass(frozen=True)
class Name(Expression):
    """An argument of the function around it."""

    name: str

    def value(self, names: Mapping[str, Any]) -> Any:
        """What the name stands for."""
        return names[self.name]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Literal(Expression):
    """A number, or a shape."""

    literal: bool | int | float | tuple[int, ...]

    def value(self, names: Mapping[str, Any]) -> Any:
        """The number."""
        return self.literal

    def __str__(self) -> str:
        finite = not isinstance(self.literal, float) or math.isfinite(self.literal)
        return repr(self.literal) if finite else f'float("{self.literal}")'


@dataclass(frozen=True)
class Captured(Expression):
    """A tensor that stands outside the function, under a name, and how it is made."""

    name: str
    made: Expression

    def value(self, names: Mapping[str, Any]) -> Any:
        """The tensor of this name, which is made once for a mod."""
        return names[self.name]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Apply(Expression):
    """An operation, one of `OPERATIONS`, on other expressions."""

    operation: str
    inside: tuple[Expression, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        """What the operation is applied to."""
        return self.inside

    def value(self, names: Mapping[str, Any]) -> Any:
        """The operation of the operands' values."""
        return OPERATIONS[self.operation](*[x.value(names) for x in self.inside])

    def __str__(self) -> str:
        return self.operation.format(*[bare(x) if self._delimits(i) else str(x) for i, x in enumerate(self.inside)])

    def _delimits(self, i: int) -> bool:
        """Whether an operand stands between commas or brackets, where it needs no parentheses of its own."""
        method = i == 0 and self.operation.startswith("{}")
        return not (method or self.operation.startswith("(") or self.operation.endswith(".dtype)"))


@dataclass(frozen=True)
class Function(Expression):
    """A function of named parameters."""

    parameters: tuple[str, ...]
    body: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The body."""
        return (self.body,)

    def value(self, names: Mapping[str, Any]) -> Callable[..., Any]:
        """A Python function that evaluates the body."""
        parameters, body = self.parameters, self.body

        def function(*arguments: Any) -> Any:
            return body.value({**names, **dict(zip(parameters, arguments, strict=True))})

        return function

    def __str__(self) -> str:
        return f"lambda {', '.join(self.parameters)}: {bare(self.body)}"


def apply(operation: str, *operands: Operand) -> Apply:
    """An operation of `OPERATIONS` on expressions and numbers."""
    assert operation in OPERATIONS, operation
    return Apply(operation, tuple(x if isinstance(x, Expression) else Literal(x) for x in operands))


def captured_of(root: Expression) -> dict[str, Captured]:
    """The captured tensors that an expression names, in the order of their names."""
    found = {x.name: x for x in _walk(root) if isinstance(x, Captured)}
    return dict(sorted(found.items()))


def bare(root: Expression) -> str:
    """The source without the parentheses around it."""
    text = str(root)
    if isinstance(root, Apply) and root.operation.startswith("(") and root.operation.endswith(")"):
        return text[1:-1]
    return text


def _walk(root: Expression) -> Iterator[Expression]:
    yield root
    for x in root.operands:
        yield from _walk(x)
