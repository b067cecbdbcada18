"""How far each element of a result may be from the truth: error budgets of an attention problem, forward and backward.

In: a problem, its exact results in float64, and those of plain attention in the problem's precision. Out: for each result a
tensor of allowed errors. With e the eps of scores and sums, w that of query, key and value, and for query i and key j

    r = scale q.k    s = score_mod(r)    p = exp(s - lse)    dP = dO.v    D = dO.out - dlse    dS = p (dP - D)    dR = dS ds/dr

rounding each operation does, to first order (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapter 3):

- to r: 1.5 e scale |q|.|k|, for the products, the scale and log2(e). What the mod makes of that, and its own roundings add:
  `roundings.modified`.
- to p: E, the spread of exp(s - lse) over those, + e p (1 + |s| + |lse|). To the sum of a row, and so to lse: sum_j E.
- to out: sum_j E |v| + |out| sum_j E + e sum_j p |v|, and p is rounded to w before it is multiplied.
- to D: |dO|.(error of out), with out as it was stored, rounded to w. To dS: E |dP - D| + p (error of dP + error of D).
- to dq, dk, dv, d captured: the sums of those, times |k|, |q|, |dO|, |ds/dc|; dR and p are rounded to w, too, before that.

Errors that the elements of a sum may share add up in full. The roundings to w are independent: their sum exceeds
LAMBDA w / 2 sqrt(sum of squares) with a probability of at most 2 exp(-LAMBDA^2 / 2) (Hoeffding's inequality; Higham and Mary,
"A new approach to probabilistic rounding error analysis", 2019). That bound is far below the sum of their sizes, and is what
shows a sum in 16 bits. A result may be off by this, or by `FACTOR` times the largest error of plain attention in its row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..capture import score_dtype
from ..codegen.evaluate import Inputs, evaluate, wrap_index
from ..codegen.ir import Op
from ..problem import Problem
from ..reference import listed_blocks
from .roundings import Modified, modified
from .wide import Wide

Results = dict[str, Tensor]

LAMBDA = 6.0  # a sum of independent roundings exceeds its bound once in 30 million elements
FACTOR = 3.0
NEARBY = 16  # plain errors that one is chosen from: a single one can be zero by luck
PROBES = 16


class Seeds(NamedTuple):
    """The gradients of out [B, Hq, L, Ev] and of lse [B, Hq, L] in float64, and their errors where they are computed."""

    dout: Tensor
    dlse: Tensor
    dout_error: Tensor
    dlse_error: Tensor


class Bounds(NamedTuple):
    """Bounds of the forward's errors, of the shapes of its results."""

    out: Tensor
    lse: Tensor
    max_scores: Tensor


class Precision(NamedTuple):
    """eps of scores and sums, of the operands of products, and of what is stored; the smallest number of an operand."""

    e: float
    product: float
    w: float
    tiny: float

    @classmethod
    def of(cls, problem: Problem) -> Precision:
        """The precision that a kernel may have for a problem: TF32 products of float32 where torch has them."""
        dtype = problem.query.dtype
        e = torch.finfo(score_dtype(problem.query)).eps
        tf32 = dtype is torch.float32 and problem.query.is_cuda and torch.get_float32_matmul_precision() != "highest"
        w = 2.0**-10 if tf32 else torch.finfo(dtype).eps
        return cls(e, 2.0**-10 if tf32 else e, w, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


@dataclass
class Row:
    """What forward and backward share. [B, Hq, L, S] unless said; `key`, `value` are repeated for the heads of a group."""

    precision: Precision
    scale: float
    raw: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor
    mod: Modified
    p: Tensor
    E: Tensor
    lse_error: Tensor  # [B, Hq, L, 1]
    alone: Tensor | float  # relative independent roundings of p
    lse_alone: Tensor | float  # [B, Hq, L, 1], what they make of lse


class Budgets(NamedTuple):
    """Allowed errors by the names of the results.

    `conditions` are the same without the errors of plain attention. `shared` is the part of these that the elements of a result
    may have in common, which is all but roundings to 16 bits; for results in 16 bits and captured tensors. `row` is what they
    were derived from.
    """

    allowed: Results
    conditions: Results
    shared: Results
    row: Row


def budgets(
    problem: Problem,
    wide: Wide,
    exact: Results,
    plain: Results | None,
    seeds: Seeds,
    wanted: Sequence[int] = (),
    roundings: Mapping[Op, float] | None = None,
    scores: bool = False,
) -> Budgets:
    """The allowed error of every element of the results out, lse, max_scores, dq, dk, dv and "d captured i".

    Args:
        problem: the operands as the tested implementation has them.
        wide: the same problem in float64.
        exact, plain: results by name, of `wide` and of plain attention in the problem's precision, as far as there are any.
        seeds: the gradients that arrive.
        wanted: numbers i of the captured tensors with gradients.
        roundings: operations of the mod with other roundings than `roundings.ROUNDINGS`, in units of eps.
        scores: whether raw scores may be rounded to the query's dtype, and once more when they are scaled, as in plain
            attention.
    """
    with torch.no_grad():
        row = _row(problem, wide, exact, wanted, roundings, scores)
        out, lse, top, shared = _forward(row, exact)
        found: Results = {"out": out, "lse": lse, "max_scores": top}
        of_gradients, in_common = _backward(row, exact, seeds, shared, problem, wanted)
        found, in_common = found | of_gradients, in_common | {"out": shared.of_result}
        if problem.query.dtype is torch.float64:  # nothing is more exact than float64: the truth has its own error
            found = {name: 2 * t for name, t in found.items()}
        found = {name: t.nan_to_num(nan=torch.inf) for name, t in found.items() if name in exact}
        allowed = dict(found)
        for name, value in (plain or {}).items():
            error = (value.double() - exact[name]).abs()
            allowed[name] = torch.maximum(
                allowed[name], FACTOR * nearby(error.masked_fill(~error.isfinite(), 0.0), name)
            )
    return Budgets(allowed, found, {n: t for n, t in in_common.items() if n in exact}, row)


def nearby(error: Tensor, name: str) -> Tensor:
    """The largest error in the row of each element, and in adjacent rows where it has few elements."""
    if not error.numel() or not error.dim():
        return error
    if name.startswith("d captured"):
        return error.amax(-1, keepdim=True).expand_as(error)
    rows = error if name in ("lse", "max_scores") else error.amax(-1)
    reach = -(-NEARBY // (2 * (1 if rows is error else error.shape[-1])))
    flat = rows.reshape(1, -1, rows.shape[-1])
    rows = torch.nn.functional.max_pool1d(flat, 2 * reach + 1, 1, reach).view(rows.shape)
    return rows if rows.shape == error.shape else rows.unsqueeze(-1).expand_as(error)


def _row(
    problem: Problem,
    wide: Wide,
    exact: Results,
    wanted: Sequence[int],
    roundings: Mapping[Op, float] | None,
    scores: bool,
) -> Row:
    precision, solved = Precision.of(problem), wide.problem
    (B, H, L, _), S = problem.query.shape, problem.key.shape[2]
    group, device, shape = H // max(1, problem.key.shape[1]), problem.query.device, (B, H, L, S)
    q = solved.query.detach()
    k, v = (t.detach().repeat_interleave(group, 1).expand(B, -1, -1, -1) for t in (solved.key, solved.value))
    axes = [torch.arange(n, dtype=torch.int32, device=device) for n in shape]
    index = [a.view([-1 if i == d else 1 for i in range(4)]) for d, a in enumerate(axes)]
    named = dict(zip(("b", "h", "q_idx", "kv_idx"), index, strict=True))
    raw, size = problem.scale * (q @ k.mT), abs(problem.scale) * (q.abs() @ k.abs().mT)
    inputs = Inputs(named, [t.detach() for t in problem.tensors], problem.floats, problem.ints, device)
    keep = torch.ones(shape, dtype=torch.bool, device=device)
    if problem.variant.mask is not None:
        keep = evaluate([problem.variant.mask], inputs)[0].expand(shape)
    for blocks, join in zip(
        listed_blocks(problem.block_mask, problem.block_size, L, S), (torch.logical_and, torch.logical_or), strict=True
    ):
        keep = keep if blocks is None else join(keep, blocks)
    p64 = [t.detach() for t in solved.tensors]
    (score,) = evaluate(
        [solved.variant.unscaled],
        Inputs({**named, "score": solved.scale * (q @ k.mT)}, p64, solved.floats, solved.ints, device),
    )
    mod = modified(problem, score.expand(shape), raw, 1.5 * precision.product * size, keep, inputs, wanted, roundings)
    lse = exact["lse"].unsqueeze(-1)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    p = torch.exp(mod.score - finite)
    spread = torch.maximum(torch.exp(mod.high - finite) - p, p - torch.exp(mod.low - finite))
    size = mod.score.masked_fill(mod.score == -torch.inf, 0.0).abs() + finite.abs()
    smallest = torch.finfo(score_dtype(problem.query)).tiny  # below it a weight may be zero
    # A number times a bool is of the default dtype, in which the smallest float64 is 0.
    E = spread + precision.e * p * (1 + size) + smallest * keep.double()
    total = E.sum(-1, keepdim=True) + precision.e * growth(S)
    total = torch.where(total < 1, -torch.log1p(-total), torch.inf).masked_fill(lse == -torch.inf, 0.0)
    alone: Tensor | float = LAMBDA * precision.w / 2
    lse_alone: Tensor | float = 0.0
    if scores:
        # Two roundings of r, which the mod multiplies by its slope; out and lse change by sums of them.
        changed = 2**0.5 * (raw * mod.slope.value).abs()
        lse_alone = alone * (p * changed).square().sum(-1, keepdim=True).sqrt()
        alone = alone * (1 + changed.square()).sqrt()
    return Row(precision, problem.scale, raw, q, k, v, keep, mod, p, E, total, alone, lse_alone)


def growth(terms: float) -> float:
    """How the rounding of a sum grows with its terms, in eps of the largest partial sum.

    Kernels add up 16 terms or more at a time, and the roundings of the partial sums are independent.
    """
    return float(1 + terms**0.5 / 8)


class _Shared(NamedTuple):
    """The part of out's error that does not come from rounding to the dtype of the operands, as out.

    `of_result` has weights too small for that dtype, besides, which are rounded to zero, all of them.
    """

    error: Tensor
    of_result: Tensor


def _forward(row: Row, exact: Results) -> tuple[Tensor, Tensor, Tensor, _Shared]:
    e, _, w, tiny = row.precision
    S = row.p.shape[-1]
    out, lse, top = exact["out"].abs(), exact["lse"], exact["max_scores"]
    v = row.value.abs()
    shared = row.E @ v + row.lse_error * out + e * growth(S) * (row.p @ v)
    rounded = ((row.alone * row.p).square() @ v.square()).sqrt() + row.lse_alone * out
    lost = tiny * (row.keep.double() @ v) + tiny
    vanishing = tiny * (_small(row.p, row.precision) @ v) + tiny
    size = top.masked_fill(top == -torch.inf, 0.0).abs()
    finite = lse.masked_fill(lse == -torch.inf, 0.0).abs()
    of_lse = (row.lse_error + row.lse_alone).squeeze(-1) + 2 * e * (1 + finite + size)
    if S:
        highest, lowest = row.mod.high.amax(-1), row.mod.low.amax(-1)
        of_top = torch.maximum(*(torch.where(a == top, 0.0, (a - top).abs()) for a in (highest, lowest)))
    else:
        of_top = torch.zeros_like(top)
    found = shared + rounded + 1.5 * w * out + lost
    return found, of_lse, of_top + 2 * e * size, _Shared(shared, shared + vanishing)


def _small(x: Tensor, precision: Precision) -> Tensor:
    """1 where a number, or a sixteenth of it, is below the normal range of the operands' dtype, else 0."""
    return (x.abs() < 16 * precision.tiny / precision.w).double()


def _backward(
    row: Row, exact: Results, seeds: Seeds, shared: _Shared, problem: Problem, wanted: Sequence[int]
) -> tuple[Results, Results]:
    """The errors of the gradients, and the part of them that elements may share."""
    e, _, w, tiny = row.precision
    (B, H, L, S), kv_shape = row.p.shape, problem.key.shape
    do, k, q, v = seeds.dout.abs(), row.key, row.query, row.value.abs()
    # dP, D and their errors; `alone` is the part of D's that is another one in each row, from the rounding of out
    dP = seeds.dout @ row.value.mT
    inner = seeds.dout * exact["out"]
    D = (inner.sum(-1) - seeds.dlse).unsqueeze(-1)
    dP_error = 2 * e * growth(v.shape[-1]) * (do @ v.mT) + seeds.dout_error @ v.mT
    D_error = (do * shared.error + 2 * e * inner.abs() + seeds.dout_error * exact["out"].abs()).sum(-1, keepdim=True)
    D_error = D_error + (2 * e * seeds.dlse.abs() + seeds.dlse_error).unsqueeze(-1)
    alone = ((LAMBDA * w / 2 * inner).square().sum(-1) + (row.alone * row.p * dP).square().sum(-1)).sqrt().unsqueeze(-1)
    alone = alone + (w + row.lse_alone) * inner.sum(-1, keepdim=True).abs()
    # dS
    X, p_error = dP - D, row.E + row.p * row.lse_error
    weight = row.p + p_error
    dS, dS_error = row.p * X, p_error * X.abs() + weight * (dP_error + D_error + e * (dP.abs() + D.abs()))
    # dR; 0 times infinity is what a weight of zero makes of an infinite slope: nan in the truth, too
    slope, slope_error = row.mod.slope
    dR = dS * slope
    dR_error = dS_error * (slope.abs() + slope_error) + dS.abs() * slope_error + 2 * e * dR.abs()
    per_row = row.p * slope
    scale = abs(row.scale)

    def over_group(x: Tensor) -> Tensor:
        x = x.unflatten(1, (kv_shape[1], -1)).sum(2) if kv_shape[1] else x.sum(1, keepdim=True)[:, :0]
        return x.sum(0, keepdim=True) if kv_shape[0] != B else x

    at_all, of_dR, of_p = row.keep.double(), _small(dR, row.precision), _small(row.p, row.precision)
    sums = dR_error + e * growth(S) * dR.abs()
    common_q = scale * ((sums + tiny * of_dR) @ k.abs())
    dq = (sums + tiny * at_all) @ k.abs() + alone * (per_row @ k).abs()
    dq = scale * (dq + ((row.alone * dR).square() @ k.square()).sqrt() + row.lse_alone * (dR @ k).abs())
    count = growth(L * H / max(1, kv_shape[1]))
    sums = dR_error + e * count * dR.abs()
    common_k = scale * over_group((sums + tiny * of_dR).mT @ q.abs())
    dk = over_group((sums + tiny * at_all).mT @ q.abs())
    squares = (row.alone * dR).square() + (row.lse_alone * dR).square() + (alone * per_row).square()
    dk = scale * (dk + over_group(squares.mT @ q.square()).sqrt())
    sums = p_error + e * count * row.p
    common_v = over_group((sums + tiny * of_p).mT @ do + row.p.mT @ seeds.dout_error)
    dv = over_group((sums + tiny * at_all).mT @ do + row.p.mT @ seeds.dout_error)
    squares = (row.alone * row.p).square() + (row.lse_alone * row.p).square()
    dv = dv + over_group(squares.mT @ do.square()).sqrt()
    found = {"dq": dq, "dk": dk, "dv": dv}
    found = {n: t + 1.5 * w * exact[n].abs() + tiny for n, t in found.items() if n in exact}
    common = {"dq": common_q + tiny, "dk": common_k + tiny, "dv": common_v + tiny}
    for i in wanted:
        tensor = problem.captured[i]
        stored = torch.finfo(tensor.dtype)
        bound, alike = _captured(row, i, tensor, dS, dS_error, alone, e)
        found[f"d captured {i}"] = bound + alike + stored.eps * exact[f"d captured {i}"].abs() + stored.tiny
        common[f"d captured {i}"] = bound + stored.tiny
    return found, common


def _captured(
    row: Row, number: int, tensor: Tensor, dS: Tensor, dS_error: Tensor, alone: Tensor, e: float
) -> tuple[Tensor, Tensor]:
    """The error of the gradient of a captured tensor, before it is rounded to the tensor's dtype: shared, and from `alone`."""
    count = growth(dS.numel() / max(1, tensor.numel()))
    bound, squares = torch.zeros(2, tensor.numel(), dtype=torch.float64, device=dS.device)
    probes = torch.zeros(PROBES, tensor.numel(), dtype=torch.float64, device=dS.device)
    generator = torch.Generator(dS.device).manual_seed(0)
    signs = [torch.empty_like(alone).bernoulli_(0.5, generator=generator) * 2 - 1 for _ in range(PROBES)]
    for _, places, (slope, slope_error) in (load for load in row.mod.loads if load[0] == number):
        if not tensor.numel():
            continue
        at = entries(places, tensor, dS).reshape(-1)
        terms = dS * slope
        error = dS_error * (slope.abs() + slope_error) + dS.abs() * slope_error + (2 + count) * e * terms.abs()
        bound.index_add_(0, at, error.reshape(-1))
        per_row = row.p * slope * alone
        # Errors of the rows, of any sign: their sums in each entry, for a few choices of the signs (Hutchinson). Where each row
        # reads an entry once, the sum of the squares is their variance; two rows may cancel for all of the choices.
        squares.index_add_(0, at, per_row.square().reshape(-1))
        for probe, sign in zip(probes, signs, strict=True):
            probe.index_add_(0, at, (per_row * sign).reshape(-1))
    # `alone` has LAMBDA in it: the mean square of the probes is the variance of a sum of errors that large.
    alike = torch.maximum(2 * probes.square().mean(0).sqrt(), squares.sqrt())
    return bound.view(tensor.shape), alike.view(tensor.shape)


def entries(places: Sequence[Tensor], tensor: Tensor, like: Tensor) -> Tensor:
    """Which entry of `tensor`, flattened, is read at the indices `places`, as int64 of the shape of `like`."""
    at = torch.zeros((), dtype=torch.int64, device=like.device)
    for place, size in zip(places, tensor.shape, strict=True):
        at = at * size + wrap_index(place, size)
    return at.expand(like.shape)
