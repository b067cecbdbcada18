"""Systematic errors of a result: too small to be seen in one element, the same in all of them.

In: a result, the exact one, and their budgets. Out: the projections <found - exact, x> on a few tensors x that exceed what a
right implementation can have. Only for operands in 16 bits: of float32 the budgets of the elements see as much.

A right implementation rounds some numbers u to 16 bits. Each is off by a factor 1 + t, |t| <= w / 2, and changes the
projection by c t, with c = u d<result, x>/du (`adjoint`). Roundings of different numbers are independent and uniform, so the
sum of all c t exceeds LAMBDA w / 2 sqrt(sum c^2 / 3) with a probability of at most 2 exp(-LAMBDA^2 / 2), as for normal ones of
that variance (Hoeffding's inequality for uniform numbers).

- Equal numbers have equal roundings, as where all rows are the same. So the c of numbers whose sizes are within w / BINS of
  each other are added up before they are squared, if that gives more. Numbers closer than w have BINS bins at most, and since
  sqrt(BINS) < LAMBDA / sqrt(3) the bound holds whatever their roundings have in common.
- Truncation, which rounds every number towards zero, has a mean of -w/4 to -w/2 times c. Where it may be used it is allowed, in
  its direction.
- The rest of their error the elements may share in full: sum |x| `Budgets.shared`.
- Roundings of scores act by exp, and do not cancel to second order.

The larger of that and `FACTOR` times the projection of plain attention's error is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from .adjoint import Rounded, bend_of, over_group, recorded
from .budget import FACTOR, LAMBDA, Budgets, Results, Row, Seeds
from .verdict import AXES
from .wide import Wide

BINS = 11  # to an interval in which a rounding takes all of its values; less than LAMBDA squared by 3
TILE = 64  # rows; those of the last one are looked at alone, too
CLEARLY = 1.2

# What an error in the direction of a projection is like.
WORDS = {
    "exact": "{name} is {off} on average",
    "scale": "{name} is as with scores {off}",
    "delta": "{name} is as with a delta {off}",
}


class Drift(NamedTuple):
    """A projection that exceeds what is allowed, all in units of that of the exact result.

    `of` is the key of what it is a projection on, in `WORDS`; `where` says on which part of the result, "" for all.
    """

    name: str
    of: str
    where: str
    found: float
    low: float
    high: float

    @property
    def allowed(self) -> float:
        """How far it may be off in the direction in which it is."""
        return self.high if self.found > 0 else -self.low

    @property
    def ratio(self) -> float:
        """The error in units of what is allowed."""
        return abs(self.found) / self.allowed if self.allowed > 0 else math.inf

    @property
    def text(self) -> str:
        """What is wrong, in a line."""
        size = "large" if self.found > 0 else "small"
        words = WORDS[self.of].format(name=self.name, off=f"{_percent(self.found)} too {size}")
        return f"  {words}{f' over {self.where}' if self.where else ''}: allowed {_percent(self.allowed)}"


def _percent(x: float) -> str:
    return f"{100 * abs(x):.2g} %"


class _Direction(NamedTuple):
    name: str
    of: str
    x: Tensor
    where: str


class Judged(NamedTuple):
    """A problem with its exact results, those of plain attention and their budgets, as `budgets` has them.

    `scores`: whether scores may be rounded to the query's dtype, and the steps of the backward. `truncates`: whether roundings
    to that dtype may be truncations.
    """

    problem: Problem
    wide: Wide
    seeds: Seeds
    exact: Results
    plain: Results
    budget: Budgets
    scores: bool
    truncates: bool


def drifts(found: Results, judged: Judged) -> list[Drift]:
    """For each of the results found the projection that exceeds what is allowed by most, if one does.

    That of a part of a result, or on something else, has to exceed by `CLEARLY` more than that of all of it.
    """
    worst: dict[str, Drift] = {}
    for drift in projections(found, judged):
        if drift.ratio > max(1.0, CLEARLY * worst[drift.name].ratio if drift.name in worst else 0.0):
            worst[drift.name] = drift
    return list(worst.values())


def projections(found: Results, judged: Judged) -> Iterator[Drift]:
    """Every projection of results that have a budget of what is shared, whether it exceeds what is allowed or not."""
    problem, wide, seeds, exact, plain, budget, scores, truncates = judged
    row = budget.row
    if problem.query.dtype.itemsize != 2 or not row.p.numel():
        return
    tape = recorded(row, problem, seeds, bend_of(row, wide.problem) if scores else None)
    second = _second_order(row) if scores else 0.0
    names = [n for n in found if n in budget.shared and n in exact]
    keys = [_key(r.value, row.precision.w) for r in tape.rounded]
    for name, of, x, where in _directions(names, row, exact, seeds, problem):
        shared, true = budget.shared[name], exact[name]
        error, usual = found[name].detach().double() - true, plain[name].double() - true
        known = error.isfinite() & usual.isfinite() & shared.isfinite() & budget.allowed[name].isfinite() & x.isfinite()
        x, error, usual, shared, true = (torch.where(known, t, 0.0) for t in (x, error, usual, shared, true))
        stored = torch.finfo(found[name].dtype).eps
        if name not in AXES and stored > 2**-20:  # autograd rounds every term and partial sum to 16 bits
            shared = shared + FACTOR * usual.abs()
        places = _places(name, x, row, problem)
        last = Rounded(true, true, 1.0, True)
        changes = [
            (r, c, row.precision.w, key, places.of_heads)
            for r, c, key in zip(tape.rounded, tape.sensitivities(name, x), keys, strict=True)
            if c is not None
        ]
        changes.append((last, x * true, stored, _key(true, stored), places.of_result))
        noise, down, up = torch.zeros(3, len(places.names), dtype=torch.float64, device=x.device)
        for r, c, eps, key, labels in changes:
            squares, total = _sums(c, key, labels)
            noise = noise + (r.times * eps / 2) ** 2 / 3 * squares
            if truncates and r.cut:
                down = down + r.times * eps / 2 * total.clamp(min=0)
                up = up - r.times * eps / 2 * total.clamp(max=0)
        # The mean of a truncation depends on a number's leading digits, by an eighth of w either way.
        noise = LAMBDA * (1.25 if truncates else 1.0) * noise.sqrt()
        noise = noise + places.add(x.abs() * shared) + second * places.add((x * true).abs())
        size, off, of_plain = places.add(x * x), places.add(x * error), FACTOR * places.add(x * usual).abs()
        low, high = (torch.maximum(noise + t, of_plain).nan_to_num(nan=math.inf) for t in (down, up))
        for i, place in enumerate(places.names):
            if (unit := float(size[i])) > 0:
                at = " of ".join(part for part in (where, place) if part)
                yield Drift(name, of, at, float(off[i]) / unit, -float(low[i]) / unit, float(high[i]) / unit)


def _directions(names: Sequence[str], row: Row, exact: Results, seeds: Seeds, problem: Problem) -> Iterator[_Direction]:
    """What errors are projected on: the result itself, what a factor of the scores does to it, what delta does to it."""
    slope = torch.where(row.p > 0, row.mod.slope.value, 0.0)
    moved = row.p * slope * row.raw
    delta = (seeds.dout * exact["out"]).sum(-1, keepdim=True) - seeds.dlse.unsqueeze(-1)
    of_delta = -row.scale * row.p * slope * delta
    others: dict[str, tuple[str, Callable[[], Tensor]]] = {
        "out": ("scale", lambda: moved @ row.value - moved.sum(-1, keepdim=True) * exact["out"]),
        "dq": ("delta", lambda: of_delta @ row.key),
        "dk": ("delta", lambda: over_group(of_delta.mT @ row.query, problem)),
    }
    for name in names:
        x = exact[name]
        yield _Direction(name, "exact", x, "")
        last = (x.shape[2] - 1) // TILE * TILE if name in AXES else 0
        if last > 0:
            tail = torch.zeros_like(x)
            tail[:, :, last:] = x[:, :, last:]
            yield _Direction(name, "exact", tail, f"{AXES[name][2]} {last} to {x.shape[2] - 1}")
        if name in others:
            of, make = others[name]
            yield _Direction(name, of, make(), "")


class _Places(NamedTuple):
    """All of a result, then each head, then each batch entry: their names.

    And three times, in results and in scores, which one of these [b, h] belongs to.
    """

    names: list[str]
    of_result: list[Tensor]
    of_heads: list[Tensor]

    def add(self, x: Tensor) -> Tensor:
        """The sums of a result over each."""
        return torch.cat([_by_label(x, labels) for labels in self.of_result])


def _places(name: str, x: Tensor, row: Row, problem: Problem) -> _Places:
    B, H = row.p.shape[:2]
    if name not in AXES:
        one = [torch.zeros(1, dtype=torch.int64, device=x.device)]
        return _Places([""], one, one)
    batch, heads = x.shape[:2]
    b, h = (torch.arange(n, device=x.device) for n in (batch, heads))
    names, labels = [""], [torch.zeros(batch, heads, dtype=torch.int64, device=x.device)]
    for n, axis, label in ((heads, AXES[name][1], h), (batch, "b", b[:, None])):
        if n > 1:
            names += [f"{axis}={i}" for i in range(n)]
            labels.append(label.expand(batch, heads))
    return _Places(names, labels, [t.repeat_interleave(H // heads, 1).expand(B, H) for t in labels])


def _key(value: Tensor, w: float) -> Tensor:
    """The number of the bin that a number's size is in."""
    return (value.abs().clamp(min=1e-300).log2() * (BINS / w)).floor().nan_to_num(0.0).to(torch.int64)


def _sums(c: Tensor, key: Tensor, places: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each place: c squared, as if no two numbers were equal or as if those of a bin were; the sum of c."""
    squares, totals = [], []
    for labels in places:
        n = int(labels.max()) + 1
        # Two bins may share an entry of the table: then they are taken for one.
        size = 1 << max(10, math.ceil(math.log2(c.numel() / n)))
        at = labels.reshape(*labels.shape, *[1] * (c.dim() - labels.dim())) * size + key % size
        table = c.new_zeros(n * size).index_add_(0, at.reshape(-1), c.reshape(-1)).view(n, size)
        squares.append(torch.maximum(_by_label(c.square(), labels), table.square().sum(1)))
        totals.append(_by_label(c, labels))
    return torch.cat(squares), torch.cat(totals)


def _by_label(x: Tensor, labels: Tensor) -> Tensor:
    """The sums of x over all that one label stands for."""
    x = x.reshape(labels.numel(), -1).sum(1)
    return x.new_zeros(int(labels.max()) + 1).index_add_(0, labels.reshape(-1), x)


def _second_order(row: Row) -> float:
    """The relative change of a result by the squares of two roundings of each score: three times their mean."""
    change = row.precision.w * row.mod.slope.value * row.raw
    rows = torch.where(row.p > 0, row.p * change.square(), 0.0).sum(-1)
    return 0.25 * float(rows.mean().nan_to_num(math.inf))
