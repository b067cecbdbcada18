"""Systems of linear inequalities over the integers: Fourier-Motzkin elimination, with each inequality tightened.

A product of variables is taken for a variable of its own. An inequality is divided by the common divisor of its coefficients
and its constant rounded, which is exact for integers (Pugh, "The Omega test", 1991, section 2).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from .polynomials import Monomial, Polynomial, Terms

_MOST_ROWS = 160


class Exhausted(Exception):
    """The work that may be done is done."""


class Work:
    """How much may still be done, in combinations of inequalities: the same for every run, as time would not be."""

    def __init__(self, most: int) -> None:
        self.left = most

    def spend(self, amount: int) -> None:
        """Take note of work. Raises `Exhausted`."""
        self.left -= amount
        if self.left < 0:
            raise Exhausted


def infeasible(at_most_zero: Iterable[Polynomial], work: Work) -> bool:
    """Whether no integers satisfy all of `p <= 0`. False where it is so but this does not find it out."""
    rows: dict[Terms, int] = {}
    for p in at_most_zero:
        if _contradicts(rows, p):
            return True
    while rows:
        work.spend(len(rows))
        above: Counter[Monomial] = Counter()
        below: Counter[Monomial] = Counter()
        for terms in rows:
            for monomial, factor in terms:
                (above if factor > 0 else below)[monomial] += 1
        free = {m for m in above.keys() | below.keys() if not above[m] or not below[m]}
        if free:  # bounded on one side only: satisfied by a large enough value
            rows = {terms: constant for terms, constant in rows.items() if not any(m in free for m, _ in terms)}
            continue
        chosen = min(above, key=lambda m: (above[m] * below[m] - above[m] - below[m], m))
        if len(rows) + above[chosen] * below[chosen] > _MOST_ROWS:
            return False
        kept: dict[Terms, int] = {}
        uppers: list[tuple[int, Polynomial]] = []
        lowers: list[tuple[int, Polynomial]] = []
        for terms, constant in rows.items():
            factor = next((a for m, a in terms if m == chosen), 0)
            if factor:
                (uppers if factor > 0 else lowers).append((factor, Polynomial(terms, constant)))
            else:
                kept[terms] = constant
        work.spend(len(uppers) * len(lowers))
        rows = kept
        for a, upper in uppers:
            for b, lower in lowers:
                common = math.gcd(a, b)
                if _contradicts(rows, upper * (-b // common) + lower * (a // common)):
                    return True
    return False


def _contradicts(rows: dict[Terms, int], p: Polynomial) -> bool:
    """Add `p <= 0`, of which only the strongest with the same terms is kept; whether it cannot be with those there are."""
    p = p.at_most_zero()
    if p.is_number:
        return p.constant > 0
    rows[p.terms] = max(p.constant, rows.get(p.terms, p.constant))
    opposite = rows.get((-p).terms)
    return opposite is not None and opposite + rows[p.terms] > 0
