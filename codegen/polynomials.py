"""Polynomials with integer coefficients, in variables that are numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

Monomial = tuple[int, ...]  # the variables of a product, in order
Terms = tuple[tuple[Monomial, int], ...]


@dataclass(frozen=True)
class Polynomial:
    """A sum of products times coefficients, none of them 0 and in a fixed order, plus a constant."""

    terms: Terms
    constant: int

    @classmethod
    def of(cls, terms: Mapping[Monomial, int], constant: int) -> Polynomial:
        return cls(tuple(sorted((m, a) for m, a in terms.items() if a)), constant)

    @classmethod
    def number(cls, value: int) -> Polynomial:
        return cls((), value)

    @classmethod
    def variable(cls, number: int) -> Polynomial:
        return cls((((number,), 1),), 0)

    def __add__(self, other: Polynomial | int) -> Polynomial:
        if isinstance(other, int):
            return Polynomial(self.terms, self.constant + other)
        terms = dict(self.terms)
        for monomial, factor in other.terms:
            terms[monomial] = terms.get(monomial, 0) + factor
        return Polynomial.of(terms, self.constant + other.constant)

    def __neg__(self) -> Polynomial:
        return Polynomial(tuple((m, -a) for m, a in self.terms), -self.constant)

    def __sub__(self, other: Polynomial | int) -> Polynomial:
        return self + (-other)

    def __mul__(self, other: Polynomial | int) -> Polynomial:
        if isinstance(other, int):
            return Polynomial.of({m: a * other for m, a in self.terms}, self.constant * other)
        terms: dict[Monomial, int] = {}
        for one, a in (*self.terms, ((), self.constant)):
            for two, b in (*other.terms, ((), other.constant)):
                product = tuple(sorted(one + two))
                terms[product] = terms.get(product, 0) + a * b
        return Polynomial.of(terms, terms.pop((), 0))

    @property
    def is_number(self) -> bool:
        return not self.terms

    @cached_property
    def variables(self) -> frozenset[int]:
        return frozenset(v for monomial, _ in self.terms for v in monomial)

    def substituted(self, values: Mapping[int, Polynomial]) -> Polynomial:
        """With variables replaced."""
        if self.variables.isdisjoint(values):
            return self
        result = Polynomial.number(self.constant)
        for monomial, factor in self.terms:
            result = result + product((values.get(v) or Polynomial.variable(v) for v in monomial), factor)
        return result

    def at_most_zero(self) -> Polynomial:
        """What `self <= 0` says of integers, with coefficients that have no common divisor."""
        divisor = math.gcd(*(a for _, a in self.terms))
        if divisor <= 1:
            return self
        return Polynomial(tuple((m, a // divisor) for m, a in self.terms), -(-self.constant // divisor))

    def zero(self) -> Polynomial | None:
        """What `self == 0` says of integers, one form for it and its negative; None if it cannot be."""
        divisor = math.gcd(*(a for _, a in self.terms))
        if divisor == 0:
            return self if self.constant == 0 else None
        if self.constant % divisor:
            return None
        if self.terms[0][1] < 0:
            divisor = -divisor
        return Polynomial(tuple((m, a // divisor) for m, a in self.terms), self.constant // divisor)

    def solved(self) -> tuple[int, Polynomial] | None:
        """A variable and its value where `self == 0`, if one has a coefficient of 1 or -1 and is in no product."""
        for monomial, factor in reversed(self.terms):
            (variable, *others) = monomial
            if abs(factor) != 1 or others or any(variable in m for m, _ in self.terms if m != monomial):
                continue
            rest = Polynomial(tuple((m, a) for m, a in self.terms if m != monomial), self.constant)
            return variable, rest * -factor
        return None


def product(factors: Iterable[Polynomial], times: int = 1) -> Polynomial:
    """The product of polynomials, and a number."""
    result = Polynomial.number(times)
    for factor in factors:
        result = result * factor
    return result
