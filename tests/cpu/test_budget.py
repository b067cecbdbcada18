"""Error budgets are small beside the results, and large exactly where rounding decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.problem import Problem
from flexattn.testing.budget import Budgets, Results, Seeds, budgets
from flexattn.testing.solve import solve
from flexattn.testing.wide import widened


def judged(mod: object, dtype: torch.dtype, query: Tensor | None = None) -> tuple[Results, Budgets]:
    """Exact results of a problem, and their budgets."""
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 64, 16, generator=g, dtype=torch.float64).to(dtype) for _ in range(4))
    dlse = torch.randn(1, 2, 64, generator=g, dtype=torch.float64)
    program, captured, ints = trace(mod, None, score_dtype=torch.float64 if dtype is torch.float64 else torch.float32)  # type: ignore[arg-type]
    problem = Problem(q if query is None else query, k, v, captured, [], ints, (128, 128), variant(program), 0.25)
    wide = widened(problem)
    wanted = list(wide.leaves)
    exact = solve(wide.problem, [(i, wide.leaves[i]) for i in wanted], dout, dlse)
    plain = solve(problem, [(i, problem.captured[i]) for i in wanted], dout, dlse, plain=True)
    seeds = Seeds(dout.double(), dlse, torch.zeros_like(dout.double()), torch.zeros_like(dlse))
    return exact, budgets(problem, wide, exact, plain, seeds, wanted)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float64, 4e-13), (torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 0.15)], ids=str
)  # fmt: skip
def test_budgets_are_small_beside_the_results(dtype: torch.dtype, share: float) -> None:
    slopes = torch.tensor(
        [0.1, 0.05], dtype=torch.float64 if dtype is torch.float64 else torch.float32, requires_grad=True
    )
    exact, found = judged(lambda s, b, h, q, k: 4 * torch.tanh(s / 4) + slopes[h] * (k - q), dtype)
    assert sorted(found.allowed) == sorted(exact) and "d captured 0" in exact
    for name, allowed in found.allowed.items():
        assert allowed.isfinite().all() and (allowed > 0).all()
        terms = 10 if name.startswith("d captured") else 1  # a sum over all pairs, of both signs
        assert float(allowed.median() / exact[name].square().mean().sqrt()) < share * terms, name


def test_a_jump_is_allowed_in_the_row_that_it_is_in() -> None:
    """Scores of the first query are 0 up to rounding, where the mod jumps by 3."""
    query = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(1)).abs()
    query[:, :, 0] = 0.0
    query[:, :, 0, 0] = 1e-30
    _, smooth = judged(lambda s, b, h, q, k: s + 3 * torch.sigmoid(s), torch.float32, query)
    _, jumps = judged(lambda s, b, h, q, k: torch.where(s + q + 1 > q + 1, s + 3, s), torch.float32, query)
    for name in ("out", "lse", "dq"):
        assert (jumps.conditions[name][:, :, 0] > 1e3 * smooth.conditions[name][:, :, 0]).all()
        rest = jumps.conditions[name][:, :, 1:] / smooth.conditions[name][:, :, 1:]
        assert float(rest.median()) < 3, name


def test_amplified_errors_are_allowed() -> None:
    """exp of a score of about 10 makes its absolute error 20,000 times as large."""
    _, small = judged(lambda s, b, h, q, k: torch.exp(s), torch.float32)
    _, large = judged(lambda s, b, h, q, k: torch.exp(s + 10), torch.float32)
    assert float((large.conditions["lse"] / small.conditions["lse"]).median()) > 1e3


def test_a_weight_that_float64_holds_with_few_digits_may_be_any_of_them() -> None:
    """Below the smallest normal number a weight has an absolute error, far above eps times the weight."""
    query = torch.full((1, 2, 64, 16), 11.7, dtype=torch.float64)
    _, found = judged(lambda s, b, h, q, k: s - 12.0 * k, torch.float64, query)
    assert float(found.conditions["dk"].min()) > torch.finfo(torch.float64).tiny
