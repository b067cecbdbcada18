"""Dense attention in float64 with a factor 1 + t at every number that is rounded to 16 bits: how a result depends on each.

In: a row of `budget`. Out: results of which any weighted sum has, by reverse differentiation at t = 0, its sensitivity to each
rounding (Bauer, "Computational graphs and rounding error", 1974).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.evaluate import Inputs, evaluate
from ..problem import Problem
from .budget import Results, Row, Seeds, entries


class Rounded(NamedTuple):
    """Numbers that are rounded to 16 bits `times` times, and their factors' zeros t. `cut`: some implementations truncate."""

    value: Tensor
    t: Tensor
    times: float
    cut: bool


class Tape:
    """The results by name, as functions of the roundings that it has recorded."""

    def __init__(self) -> None:
        self.rounded: list[Rounded] = []
        self.results: Results = {}
        self.sums: dict[str, Callable[[Tensor], Tensor]] = {}

    def round(self, value: Tensor, times: float = 1.0, cut: bool = False) -> Tensor:
        """`value`, rounded."""
        return value * (1 + self.error(value, times, cut))

    def error(self, value: Tensor, times: float = 1.0, cut: bool = False) -> Tensor:
        """The relative error of rounding `value`, zero."""
        t = torch.zeros_like(value).requires_grad_()
        self.rounded.append(Rounded(value.detach(), t, times, cut))
        return t

    def sensitivities(self, name: str, x: Tensor) -> Sequence[Tensor | None]:
        """The derivative of the sum of x times a result, by each t; None where it is zero."""
        if name in self.results:
            total = (x * self.results[name]).sum()
        elif name in self.sums:
            total = self.sums[name](x)
        else:  # a captured tensor that no score depends on
            return [None] * len(self.rounded)
        return torch.autograd.grad(total, [r.t for r in self.rounded], retain_graph=True, allow_unused=True)


def _captured(row: Row, dS: Tensor, number: int, tensor: Tensor, x: Tensor) -> Tensor:
    """The sum of x times the gradient of a captured tensor."""
    weights = x.reshape(-1)
    loads = [load for load in row.mod.loads if load[0] == number]
    return torch.stack([(dS * s.value * weights[entries(at, tensor, dS)]).sum() for _, at, s in loads]).sum()


class Bend(NamedTuple):
    """What a score_mod and its slope do beyond the slope where r is off by a rounding, [B, Hq, L, S]."""

    score: Tensor
    slope: Tensor


def over_group(x: Tensor, problem: Problem) -> Tensor:
    """The sum over the heads [B, Hq] that share a key, and over the batch if it does."""
    x = x.unflatten(1, (problem.key.shape[1], -1)).sum(2)
    return x.sum(0, keepdim=True) if problem.key.shape[0] != x.shape[0] else x


def recorded(row: Row, problem: Problem, seeds: Seeds, bend: Bend | None) -> Tape:
    """The tape of an attention: FlashAttention-2's roundings, or with a `bend` those of other orders of operations, too.

    FlashAttention-2 rounds p before it is multiplied by v and dO, dR before it is multiplied by k and q, and out, which the
    backward reads. Others also round q and k when they scale them, scores before and after the mod, dP, and dR in steps.
    """
    tape, p, slope, own = Tape(), row.p, row.mod.slope.value, bend is not None
    q, k, v, w, do = row.query, row.key, row.value, row.precision.w, seeds.dout
    if bend is not None:
        t = tape.error(row.raw, 2**0.5)
        score = row.mod.score.masked_fill(row.mod.score.isinf(), 0.0)
        change = row.scale * (tape.round(q) @ tape.round(k).mT) - row.raw + row.raw * t
        change = slope * change + bend.score * t / w + score * tape.error(score)
        p = p * (1 + change - (p * change).sum(-1, keepdim=True))
        slope = slope + bend.slope * t / w
    multiplied = tape.round(p, cut=True)
    out = multiplied @ v
    exact = do @ v.mT
    dP = tape.round(exact) if own else exact
    D = (do * tape.round(out, cut=True)).sum(-1, keepdim=True) - seeds.dlse.unsqueeze(-1)
    if own:
        D = D + (multiplied * (dP - exact)).sum(-1, keepdim=True)
    dS = (tape.round(p) if own else p) * (dP - D)
    dR = tape.round(dS * slope, 3**0.5 if own else 1.0, cut=True)

    dk, dv = row.scale * (dR.mT @ q), tape.round(p, cut=True).mT @ do
    tape.results = {
        "out": out,
        "dq": row.scale * (dR @ k),
        "dk": over_group(tape.round(dk) if own else dk, problem),
        "dv": over_group(tape.round(dv) if own else dv, problem),
    }
    for i in {load[0] for load in row.mod.loads}:
        tape.sums[f"d captured {i}"] = partial(_captured, row, dS, i, problem.captured[i])
    return tape


def bend_of(row: Row, wide: Problem) -> Bend:
    """What the mod of a problem in float64 makes of scores that are off by w, beyond its slope."""
    B, H, L, S = row.p.shape
    device, w = row.p.device, row.precision.w
    axes = [torch.arange(n, dtype=torch.int32, device=device) for n in (B, H, L, S)]
    index = [a.view([-1 if i == d else 1 for i in range(4)]) for d, a in enumerate(axes)]
    named = dict(zip(("b", "h", "q_idx", "kv_idx"), index, strict=True))
    slope_of = wide.variant.derivative.score
    roots = [wide.variant.unscaled] + ([] if slope_of is None else [slope_of])
    tensors, worst = [t.detach() for t in wide.tensors], Bend(torch.zeros_like(row.p), torch.zeros_like(row.p))
    for sign in (1, -1):
        given = {**named, "score": row.raw * (1 + sign * w), "grad": torch.ones_like(row.p)}
        with torch.no_grad():
            score, *slopes = evaluate(roots, Inputs(given, tensors, wide.floats, wide.ints, device))
        at = row.mod.score, row.mod.slope.value
        by = [score - at[0] - sign * w * row.raw * at[1], *(s - at[1] for s in slopes)]
        off = [torch.where(row.p > 0, t.abs(), 0.0) for t in by]
        worst = Bend(*(torch.maximum(t, o) for t, o in zip(worst, off, strict=False)), *worst[len(off) :])
    return worst
