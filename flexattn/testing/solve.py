"""All results of an attention problem by name: outputs, and gradients for given gradients of these, by dense attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import reference
from ..capture import score_dtype
from ..problem import Problem
from .budget import Results

Normalizer = Callable[[Tensor, Tensor], Tensor]


def solve(
    problem: Problem,
    captured: Sequence[tuple[int, Tensor]],
    dout: Tensor,
    dlse: Tensor,
    plain: bool = False,
    scores: bool = False,
) -> Results:
    """Results of the reference: out, lse, max_scores, dq, dk, dv, and "d captured i" for the numbered leaves `captured`.

    `plain`: with matrix products in the dtype of the query, as plain attention in torch computes them. Its lse and max_scores
    are then of scores rounded to that dtype if `scores` is True, else of the unrounded ones that a fused kernel has.
    """
    q, k, v = leaves = [t.detach().requires_grad_() for t in (problem.query, problem.key, problem.value)]
    problem = problem._replace(query=q, key=k, value=v)
    found = reference.attention(problem, q.dtype if plain else None)
    of_scores = found
    if plain and not scores and score_dtype(q) is not q.dtype:
        with torch.no_grad():
            of_scores = reference.attention(problem, None)
    return {
        "out": found.out.detach(),
        "lse": of_scores.lse.detach(),
        "max_scores": of_scores.max_scores,
        **gradients([found.out, found.lse], [dout, dlse], leaves, captured),
    }


def gradients(
    outputs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    leaves: Sequence[Tensor],
    captured: Sequence[tuple[int, Tensor]] = (),
) -> Results:
    """dq, dk, dv, and "d captured i"; zero for a leaf that has none. A row without a finite output has seed 0 there."""
    pairs = [
        (out, seed.to(out.dtype) if out.dim() == 4 else torch.where(out.isfinite(), seed.to(out.dtype), 0))
        for out, seed in zip(outputs, seeds, strict=True)
        if out.requires_grad
    ]
    wrt = [*leaves, *(t for _, t in captured)]
    names = ["dq", "dk", "dv", *(f"d captured {i}" for i, _ in captured)]
    found = _gradients(pairs, wrt)
    return {name: torch.zeros_like(t) if g is None else g for name, g, t in zip(names, found, wrt, strict=True)}


def _gradients(pairs: list[tuple[Tensor, Tensor]], wrt: list[Tensor]) -> Sequence[Tensor | None]:
    if not pairs:
        return [None] * len(wrt)
    # A captured tensor may be the result of a computation whose graph others need, too.
    return torch.autograd.grad([o for o, _ in pairs], wrt, [s for _, s in pairs], allow_unused=True, retain_graph=True)
