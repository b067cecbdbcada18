"""Proofs about masks that hold for every length: `never` shows that a predicate is false at all indices.

Two masks are equal where `never(a ^ b)`, a mask is causal where `never(mask & (kv_idx > q_idx))`. The cases of the logic are
gone through one by one (an analytic tableau), and each is refuted by linear arithmetic over the integers. Where nothing is
left to split and no contradiction was found, there may be an index at which the predicate holds, and nothing is proved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from .formulas import (
    All,
    Application,
    AtMostZero,
    Formula,
    Formulas,
    Nonzero,
    Some,
    Truth,
    Zero,
    at_most_zero,
    nonzero,
    zero,
)
from .inequalities import Exhausted, Work, infeasible
from .ir import Node, walk
from .polynomials import Polynomial, Terms

_LARGEST = 400  # nodes of a mask that is worth the while
_WORK = 60_000  # of the order of a second
_PAIRS = 200  # of applications that are compared


def never(mask: Node, lengths: Mapping[str, int] | None = None, work: int = _WORK) -> bool:
    """Whether a boolean node is proved to be False for all b, h, q_idx, kv_idx >= 0 and all values of what it captured.

    Sound, not complete: False says that no proof was found within the `work` allowed, which is counted, not timed, so that
    the answer is always the same. Loads are only known to give equal values at equal indices of one captured tensor.

    A proof is about integers that do not overflow. For given sizes `intervals.Context.wrapping` tells whether some do.

    Args:
        mask: a boolean node, best simplified.
        lengths: sizes by the name of an input, `{"q_idx": 128}`, for a proof about these instead of all.
        work: how much may be tried before it gives up.
    """
    if sum(1 for _ in walk(mask)) > _LARGEST:
        return False
    formulas = Formulas(lengths or {})
    try:
        return _refuted(formulas.predicate(mask), formulas, Work(work))
    except (Exhausted, RecursionError):
        return False


class _Contradiction(Exception):
    """A case that cannot be."""


def _refuted(formula: Formula, formulas: Formulas, work: Work) -> bool:
    """Whether every case of a formula leads to a contradiction."""
    first = _Case(formulas, work)
    waiting: list[tuple[_Case, Formula]] = [(first, formula)]
    while waiting:
        case, assumed = waiting.pop()
        try:
            case.add([assumed])
            clause = case.clause() or case.last_resort()
        except _Contradiction:
            continue
        if clause is None:
            return False
        # The last part needs no copy; each copy is of what is known before.
        waiting.extend((case.copy() if i else case, part) for i, part in enumerate(clause.parts))
    return True


@dataclass
class _Case:
    """What is assumed to hold: inequalities, values of variables, numbers that are not 0, truths, and open clauses."""

    formulas: Formulas
    work: Work
    below: dict[Terms, int] = field(default_factory=dict)  # of p <= 0, the constant by the terms
    equal: list[Polynomial] = field(default_factory=list)  # p == 0 that gives no variable a value
    apart: set[Polynomial] = field(default_factory=set)  # p != 0
    values: dict[int, Polynomial] = field(default_factory=dict)
    truths: dict[int, bool] = field(default_factory=dict)
    defined: set[int] = field(default_factory=set)
    applied: list[Application] = field(default_factory=list)
    open: list[Some] = field(default_factory=list)
    sound: bool = False  # whether the inequalities have been looked at since the last one came

    def copy(self) -> _Case:
        return _Case(
            self.formulas,
            self.work,
            dict(self.below),
            list(self.equal),
            set(self.apart),
            dict(self.values),
            dict(self.truths),
            set(self.defined),
            list(self.applied),
            list(self.open),
            self.sound,
        )

    # ---- assumptions

    def add(self, formulas: Iterable[Formula]) -> None:
        """Assume formulas, and what defines their variables. Raises `_Contradiction`."""
        waiting = list(formulas)
        while waiting:
            self.work.spend(1)
            match waiting.pop():
                case All(parts):
                    waiting.extend(parts)
                case Some() as clause:
                    self.open.append(clause)
                case Truth(variable, value):
                    waiting += self._define([variable])
                    if self.truths.setdefault(variable, value) is not value:
                        raise _Contradiction
                    waiting += self._agreeing()
                case AtMostZero(p):
                    waiting += self._define(p.variables)
                    waiting += self._bound(p.substituted(self.values).at_most_zero())
                case Zero(p):
                    waiting += self._define(p.variables)
                    waiting += self._equate(p.substituted(self.values))
                case Nonzero(p):
                    waiting += self._define(p.variables)
                    self._keep_apart(p.substituted(self.values))

    def _define(self, variables: Iterable[int]) -> Iterator[Formula]:
        """What the definitions of variables say, of those that are new, and of those in these."""
        found: list[Formula] = []
        for v in variables:
            if v in self.defined:
                continue
            self.defined.add(v)
            found += self.formulas.definitions[v]
            application = self.formulas.applications.get(v)
            if application is not None:
                for p in application.arguments:
                    found += self._define(p.variables)
                arguments = tuple(p.substituted(self.values) for p in application.arguments)
                self.applied.append(application._replace(arguments=arguments))
                found += self._agreeing()
        return iter(found)

    def _bound(self, p: Polynomial) -> list[Formula]:
        if p.is_number:
            if p.constant > 0:
                raise _Contradiction
            return []
        if p.constant <= self.below.get(p.terms, p.constant - 1):
            return []
        self.below[p.terms], self.sound = p.constant, False
        opposite = self.below.get((-p).terms)
        if opposite is not None and opposite + p.constant > 0:
            raise _Contradiction
        return [zero(p)] if opposite is not None and opposite + p.constant == 0 else []

    def _keep_apart(self, p: Polynomial) -> None:
        found = p.zero()
        if found is not None and found.is_number:
            raise _Contradiction
        if found is not None:
            self.apart.add(found)
            self.sound = False

    def _equate(self, p: Polynomial) -> list[Formula]:
        found = p.zero()
        if found is None:
            raise _Contradiction
        if found.is_number:
            return []
        solution = found.solved()
        if solution is None:
            if found in self.equal:
                return []
            self.equal.append(found)
            return [at_most_zero(found), at_most_zero(-found)]
        variable, value = solution
        new = {variable: value}
        self.values = {v: p.substituted(new) for v, p in self.values.items()} | new
        self.applied = [a._replace(arguments=tuple(p.substituted(new) for p in a.arguments)) for a in self.applied]
        below, equal, apart = self.below, self.equal, self.apart
        self.below, self.equal, self.apart, self.sound = {}, [], set(), False
        again: list[Formula] = [AtMostZero(Polynomial(terms, constant)) for terms, constant in below.items()]
        again += [Zero(p) for p in equal]
        again += [Nonzero(p) for p in apart]
        return again + self._agreeing()

    def _agreeing(self) -> list[Formula]:
        """Results of functions at equal arguments are equal."""
        found: list[Formula] = []
        first: dict[object, Application] = {}
        for application in self.applied:
            other = first.setdefault((application.symbol, application.arguments), application)
            if other is not application:
                found += self._same(other, application)
        return found

    def _same(self, a: Application, b: Application) -> list[Formula]:
        if not a.is_truth:
            difference = Polynomial.variable(a.result) - Polynomial.variable(b.result)
            return [] if difference.substituted(self.values) == Polynomial.number(0) else [zero(difference)]
        known = [self.truths[v] for v in (a.result, b.result) if v in self.truths]
        if len(set(known)) == 2:
            raise _Contradiction
        missing = [v for v in (a.result, b.result) if v not in self.truths] if known else []
        return [Truth(v, known[0]) for v in missing]

    # ---- conclusions

    def clause(self) -> Some | None:
        """The shortest clause that is open, with the parts of it that can still be. Raises `_Contradiction`."""
        while True:
            self.check()
            kept: list[Some] = []
            forced: list[Formula] = []
            for clause in self.open:
                self.work.spend(1)
                judged = [(part, self._status(part)) for part in clause.parts]
                if any(status is True for _, status in judged):
                    continue
                left = tuple(part for part, status in judged if status is None)
                if not left:
                    raise _Contradiction
                if len(left) == 1:
                    forced.append(left[0])
                else:
                    kept.append(Some(left))
            self.open = kept
            if not forced:
                break
            self.add(forced)
        if not kept:
            return None
        chosen = min(kept, key=lambda c: len(c.parts))
        self.open = [c for c in kept if c is not chosen]
        return chosen

    def _status(self, formula: Formula) -> bool | None:
        """Whether a formula is known to hold, or not to; None if neither is seen at once."""
        match formula:
            case All(parts) | Some(parts):
                ends = isinstance(formula, Some)
                found = {self._status(p) for p in parts}
                return ends if ends in found else None if None in found else not ends
            case Truth(variable, value):
                known = self.truths.get(variable)
                return None if known is None else known is value
            case AtMostZero(p):
                p = p.substituted(self.values).at_most_zero()
                return p.constant <= 0 if p.is_number else self._bounded(p)
            case Zero(p) | Nonzero(p):
                positive = isinstance(formula, Zero)
                normal = p.substituted(self.values).zero()
                if normal is None:
                    return not positive
                if normal.is_number or normal in self.equal:
                    return positive
                sides = self._bounded(normal), self._bounded(-normal)
                return not positive if normal in self.apart or False in sides else None

    def _bounded(self, p: Polynomial) -> bool | None:
        least = self.below.get(p.terms)
        most = self.below.get((-p).terms)
        if least is not None and p.constant <= least:
            return True
        return False if most is not None and most + p.constant > 0 else None

    def check(self) -> None:
        """Raise `_Contradiction` if no integers satisfy the inequalities."""
        if not self.sound and infeasible(self._rows(), self.work):
            raise _Contradiction
        self.sound = True

    def _rows(self) -> list[Polynomial]:
        rows = [Polynomial(terms, constant) for terms, constant in self.below.items()]
        products = {m for p in rows for m, _ in p.terms if len(m) > 1}
        # Squares, and products of indices, are not negative.
        positive = (m for m in products if self.formulas.inputs.issuperset(m) or _is_square(m))
        return rows + [Polynomial(((m, -1),), 0) for m in positive]

    def last_resort(self) -> Some | None:
        """A clause of one part that follows from what is left, by a longer look; None where there is none."""
        # What is known to be on one side of 0 says no more.
        self.apart = {p for p in self.apart if True not in (self._bounded(p + 1), self._bounded(-p + 1))}
        for p in self.apart:
            for side in (p, -p):
                if self._cannot(side + 1):
                    return Some((at_most_zero(-side + 1),))
        for a, b in list(combinations(self.applied, 2))[:_PAIRS]:
            if a.symbol != b.symbol or a.arguments == b.arguments:
                continue
            differences = [p - q for p, q in zip(a.arguments, b.arguments, strict=True)]
            if all(self._is_zero(d) for d in differences):
                new = tuple(f for f in self._same(a, b) if self._status(f) is not True)
                if new:
                    return Some((All(new),))
            if len(differences) == 1 and self._status(nonzero(differences[0])) is None and self._differ(a, b):
                return Some((nonzero(differences[0]),))
        return None

    def _cannot(self, p: Polynomial) -> bool:
        """Whether `p <= 0` contradicts the inequalities."""
        return infeasible([*self._rows(), p], self.work)

    def _is_zero(self, p: Polynomial) -> bool:
        return p == Polynomial.number(0) or (not p.is_number and self._cannot(p + 1) and self._cannot(-p + 1))

    def _differ(self, a: Application, b: Application) -> bool:
        if a.is_truth:
            return len({self.truths.get(v) for v in (a.result, b.result)} & {True, False}) == 2
        difference = Polynomial.variable(a.result) - Polynomial.variable(b.result)
        return self._status(Nonzero(difference)) is True


def _is_square(monomial: tuple[int, ...]) -> bool:
    return all(monomial.count(v) % 2 == 0 for v in monomial)
