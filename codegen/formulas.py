"""Masks as formulas over the integers: conjunctions and disjunctions of `p <= 0`, `p == 0`, `p != 0` and unknown truths.

In: a boolean node. Out: a formula in negation normal form, and what is known of the variables in it. Quotients, absolute
values, maxima and choices are variables with a definition; what is not understood, such as a load, is a function of which
only that is known: it gives equal results for equal arguments. Nothing wraps here, as integers of a kernel do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .ir import DType, Node, Op
from .polynomials import Polynomial, product


@dataclass(frozen=True)
class AtMostZero:
    """`p <= 0`."""

    p: Polynomial


@dataclass(frozen=True)
class Zero:
    """`p == 0`."""

    p: Polynomial


@dataclass(frozen=True)
class Nonzero:
    """`p != 0`."""

    p: Polynomial


@dataclass(frozen=True)
class Truth:
    """A predicate that is not understood, by its variable: that it is true, or that it is false."""

    variable: int
    value: bool


@dataclass(frozen=True)
class All:
    """Every part holds; true where there is none."""

    parts: tuple[Formula, ...]


@dataclass(frozen=True)
class Some:
    """At least one part holds; false where there is none."""

    parts: tuple[Formula, ...]


Formula = AtMostZero | Zero | Nonzero | Truth | All | Some
TRUE, FALSE = All(()), Some(())


class Application(NamedTuple):
    """A function of which nothing is known, at some integers. `symbol` tells functions apart, `result` is a variable."""

    symbol: tuple[Any, ...]
    arguments: tuple[Polynomial, ...]
    result: int
    is_truth: bool


def at_most_zero(p: Polynomial) -> Formula:
    p = p.at_most_zero()
    return (TRUE if p.constant <= 0 else FALSE) if p.is_number else AtMostZero(p)


def zero(p: Polynomial) -> Formula:
    found = p.zero()
    return FALSE if found is None else TRUE if found.is_number else Zero(found)


def nonzero(p: Polynomial) -> Formula:
    found = p.zero()
    return TRUE if found is None else FALSE if found.is_number else Nonzero(found)


def every(*parts: Formula) -> Formula:
    kept = _flat(parts, All)
    return FALSE if FALSE in kept else kept[0] if len(kept) == 1 else All(kept)


def some(*parts: Formula) -> Formula:
    kept = _flat(parts, Some)
    return TRUE if TRUE in kept else kept[0] if len(kept) == 1 else Some(kept)


def _flat(parts: Iterable[Formula], kind: type[All] | type[Some]) -> tuple[Formula, ...]:
    flat = (q for p in parts for q in (p.parts if isinstance(p, kind) else (p,)))
    return tuple(dict.fromkeys(flat))


_WIDE = (DType.INT32, DType.INT64)  # narrower types wrap as a matter of course
_RANGES = {DType.UINT8: (0, 255), DType.INT8: (-128, 127), DType.INT16: (-(2**15), 2**15 - 1)}
_SIZES = {DType.UINT8: 9, DType.INT8: 8, DType.INT16: 16, DType.INT32: 32, DType.INT64: 64}
_MOST_TERMS = 40


class Formulas:
    """The formulas of nodes. `lengths` bounds inputs by name; all of them are at least 0.

    `definitions` says what holds of a variable, `applications` which function it is the result of, `inputs` are the variables
    of indices.
    """

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.lengths = lengths
        self.definitions: dict[int, list[Formula]] = {}
        self.applications: dict[int, Application] = {}
        self.inputs: set[int] = set()
        self._numbers: dict[Node, Polynomial] = {}
        self._formulas: dict[tuple[Node, bool], Formula] = {}
        self._applied: dict[tuple[Any, ...], int] = {}

    # ---- variables

    def variable(self) -> int:
        number = len(self.definitions)
        self.definitions[number] = []
        return number

    def function(self, symbol: tuple[Any, ...], arguments: tuple[Polynomial, ...], is_truth: bool = False) -> int:
        """The variable of a function that is not understood; the same for the same arguments."""
        key = (symbol, arguments)
        if key not in self._applied:
            made = self._applied[key] = self.variable()
            self.applications[made] = Application(symbol, arguments, made, is_truth)
        return self._applied[key]

    def unknown(self, node: Node, is_truth: bool = False) -> int:
        """The variable of a node that is not understood: a function of the integers among its operands."""
        whole = tuple(a for a in node.args if not a.dtype.is_int or a.op is Op.CAPTURED)
        numbers = tuple(self.number(a) for a in node.args if a.dtype.is_int and a.op is not Op.CAPTURED)
        return self.function((node.op, node.dtype, node.value, whole), numbers, is_truth)

    def chosen(self, *cases: tuple[Formula, Polynomial], facts: Callable[[Polynomial], list[Formula]]) -> Polynomial:
        """A number that is that of the case that holds. `facts` of it hold in all cases."""
        number = self.variable()
        x = Polynomial.variable(number)
        self.definitions[number] = [*facts(x), some(*(every(when, zero(x - value)) for when, value in cases))]
        return x

    def quotient(self, x: Polynomial, divisor: int) -> Polynomial:
        """`x // divisor`, rounded down; the divisor is not 0."""
        if divisor < 0:
            x, divisor = -x, -divisor
        whole = {m: a // divisor for m, a in x.terms if a % divisor == 0}
        rest = Polynomial.of({m: a for m, a in x.terms if a % divisor}, x.constant % divisor)
        outside = Polynomial.of(whole, x.constant // divisor)
        if rest.is_number:
            return outside
        number = self.function(("quotient", divisor), (rest,))
        inside = Polynomial.variable(number)
        if not self.definitions[number]:
            remainder = rest - inside * divisor
            self.definitions[number] = [at_most_zero(-remainder), at_most_zero(remainder - (divisor - 1))]
        return outside + inside

    # ---- numbers

    def number(self, node: Node) -> Polynomial:
        """An integer node."""
        if node not in self._numbers:
            rule = _NUMBERS.get(node.op)
            found = rule(self, node) if rule is not None and node.dtype in _WIDE else None
            self._numbers[node] = self._unknown_number(node) if found is None else found
        return self._numbers[node]

    def _unknown_number(self, node: Node) -> Polynomial:
        if node.is_const:
            return Polynomial.number(int(node.value))  # type: ignore[arg-type]
        number = self.unknown(node)
        x = Polynomial.variable(number)
        if node.dtype in _RANGES and not self.definitions[number]:
            low, high = _RANGES[node.dtype]
            self.definitions[number] = [at_most_zero(-x + low), at_most_zero(x - high)]
        return x

    # ---- predicates

    def predicate(self, node: Node, positive: bool = True) -> Formula:
        """A boolean node, or its negation."""
        key = node, positive
        if key not in self._formulas:
            self._formulas[key] = self._predicate(node, positive)
        return self._formulas[key]

    def _predicate(self, node: Node, positive: bool) -> Formula:
        op, args = node.op, node.args
        if op is Op.CONST:
            return TRUE if bool(node.value) is positive else FALSE
        if op is Op.DETACH:
            return self.predicate(args[0], positive)
        if op is Op.WHERE:
            condition, a, b = args
            first = every(self.predicate(condition), self.predicate(a, positive))
            return some(first, every(self.predicate(condition, False), self.predicate(b, positive)))
        if args and op in _LOGIC and all(a.dtype is DType.BOOL for a in args):
            return _LOGIC[op](self, args, positive)
        if op in _COMPARISONS and args[0].dtype.is_int:
            return _COMPARISONS[op](self.number(args[0]) - self.number(args[1]), positive)
        if op is Op.CAST and args[0].dtype.is_int:
            return (nonzero if positive else zero)(self.number(args[0]))
        if op is Op.NE:  # of floats: the opposite of EQ, for nan as well
            return Truth(self.function((Op.EQ, *args), (), True), not positive)
        if op in (Op.LT, Op.LE, Op.EQ):
            return Truth(self.function((op, *args), (), True), positive)
        return Truth(self.unknown(node, True), positive)


def _exclusive(formulas: Formulas, args: tuple[Node, ...], positive: bool) -> Formula:
    a, b = args
    say = formulas.predicate
    return some(every(say(a), say(b, not positive)), every(say(a, False), say(b, positive)))


def _joined(formulas: Formulas, args: tuple[Node, ...], positive: bool, negated: tuple[bool, bool]) -> Formula:
    """Both of two, each negated or not; or the negation of that."""
    parts = (formulas.predicate(a, not_ is not positive) for a, not_ in zip(args, negated, strict=True))
    return (every if positive else some)(*parts)


_LOGIC: dict[Op, Callable[[Formulas, tuple[Node, ...], bool], Formula]] = {
    Op.AND: lambda f, args, positive: _joined(f, args, positive, (False, False)),
    Op.OR: lambda f, args, positive: _joined(f, args, not positive, (True, True)),
    Op.LT: lambda f, args, positive: _joined(f, args, positive, (True, False)),
    Op.LE: lambda f, args, positive: _joined(f, args, not positive, (False, True)),
    Op.NOT: lambda f, args, positive: f.predicate(args[0], not positive),
    Op.CAST: lambda f, args, positive: f.predicate(args[0], positive),
    Op.XOR: _exclusive,
    Op.NE: _exclusive,
    Op.EQ: lambda f, args, positive: _exclusive(f, args, not positive),
}
_COMPARISONS: dict[Op, Callable[[Polynomial, bool], Formula]] = {
    Op.LT: lambda d, positive: at_most_zero(d + 1) if positive else at_most_zero(-d),
    Op.LE: lambda d, positive: at_most_zero(d) if positive else at_most_zero(-d + 1),
    Op.EQ: lambda d, positive: zero(d) if positive else nonzero(d),
    Op.NE: lambda d, positive: nonzero(d) if positive else zero(d),
}


# ---- the rules of numbers; None: not understood


def _input(f: Formulas, node: Node) -> Polynomial:
    number = f.variable()
    x = Polynomial.variable(number)
    f.inputs.add(number)
    name = str(node.value)
    above = [at_most_zero(x - (f.lengths[name] - 1))] if name in f.lengths else []
    f.definitions[number] = [at_most_zero(-x), *above]
    return x


def _cast(f: Formulas, node: Node) -> Polynomial | None:
    (source,) = node.args
    if source.dtype is DType.BOOL:
        one, none = Polynomial.number(1), Polynomial.number(0)
        return f.chosen(
            (f.predicate(source), one),
            (f.predicate(source, False), none),
            facts=lambda x: [at_most_zero(-x), at_most_zero(x - 1)],
        )
    fits = source.dtype.is_int and _SIZES[node.dtype] >= _SIZES[source.dtype]
    return f.number(source) if fits else None


def _product(f: Formulas, node: Node) -> Polynomial | None:
    a, b = (f.number(x) for x in node.args)
    return None if (len(a.terms) + 1) * (len(b.terms) + 1) > _MOST_TERMS else a * b


def _power(f: Formulas, node: Node) -> Polynomial | None:
    base, exponent = f.number(node.args[0]), f.number(node.args[1])
    fits = exponent.is_number and 0 <= exponent.constant <= 4 and (len(base.terms) + 1) ** 4 <= _MOST_TERMS**2
    return product([base] * exponent.constant) if fits else None


def _by_constant(rule: Callable[[Formulas, Polynomial, int], Polynomial | None]) -> Any:
    """A rule for operations with a number that is not 0."""

    def apply(f: Formulas, node: Node) -> Polynomial | None:
        second = node.args[1]
        return rule(f, f.number(node.args[0]), int(second.value)) if second.is_const and second.value else None  # type: ignore[arg-type]

    return apply


def _truncated(f: Formulas, x: Polynomial, divisor: int) -> Polynomial:
    if divisor < 0:
        x, divisor = -x, -divisor
    below = -f.quotient(-x, divisor)
    return f.chosen((at_most_zero(-x), f.quotient(x, divisor)), (at_most_zero(x + 1), below), facts=lambda _: [])


def _masked(f: Formulas, x: Polynomial, bits: int) -> Polynomial | None:
    """`x & bits` where the bits are the lowest, or all but those."""
    low, size = (bits, bits + 1) if bits > 0 else (-bits - 1, -bits)
    if low & size:
        return None
    rest = f.quotient(x, size) * size
    return x - rest if bits > 0 else rest


def _largest(f: Formulas, a: Polynomial, b: Polynomial) -> Polynomial:
    cases = (at_most_zero(b - a), a), (at_most_zero(a - b + 1), b)
    return f.chosen(*cases, facts=lambda x: [at_most_zero(a - x), at_most_zero(b - x)])


def _sign(f: Formulas, node: Node) -> Polynomial:
    x = f.number(node.args[0])
    cases = (at_most_zero(-x + 1), 1), (zero(x), 0), (at_most_zero(x + 1), -1)
    return f.chosen(*((when, Polynomial.number(n)) for when, n in cases), facts=lambda _: [])


def _where(f: Formulas, node: Node) -> Polynomial:
    condition, a, b = node.args
    cases = (f.predicate(condition), f.number(a)), (f.predicate(condition, False), f.number(b))
    return f.chosen(*cases, facts=lambda _: [])


def _binary(rule: Callable[[Formulas, Polynomial, Polynomial], Polynomial]) -> Any:
    return lambda f, node: rule(f, f.number(node.args[0]), f.number(node.args[1]))


_NUMBERS: dict[Op, Callable[[Formulas, Node], Polynomial | None]] = {
    Op.INPUT: _input,
    Op.CAST: _cast,
    Op.DETACH: lambda f, node: f.number(node.args[0]),
    Op.ADD: _binary(lambda f, a, b: a + b),
    Op.SUB: _binary(lambda f, a, b: a - b),
    Op.MUL: _product,
    Op.POW: _power,
    Op.NEG: lambda f, node: -f.number(node.args[0]),
    Op.NOT: lambda f, node: -f.number(node.args[0]) - 1,
    Op.ABS: lambda f, node: _largest(f, f.number(node.args[0]), -f.number(node.args[0])),
    Op.MAXIMUM: _binary(_largest),
    Op.MINIMUM: _binary(lambda f, a, b: -_largest(f, -a, -b)),
    Op.SIGN: _sign,
    Op.WHERE: _where,
    Op.FLOORDIV: _by_constant(lambda f, x, c: f.quotient(x, c)),
    Op.MOD: _by_constant(lambda f, x, c: x - f.quotient(x, c) * c),
    Op.TRUNCDIV: _by_constant(_truncated),
    Op.FMOD: _by_constant(lambda f, x, c: x - _truncated(f, x, c) * c),
    Op.SHL: _by_constant(lambda f, x, c: x * 2**c if 0 < c < 63 else None),
    Op.SHR: _by_constant(lambda f, x, c: f.quotient(x, 2**c) if 0 < c < 63 else None),
    Op.AND: _by_constant(_masked),
}
