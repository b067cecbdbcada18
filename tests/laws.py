"""Law 7: a backend computes what the reference computes, every output and every gradient, within a derived budget."""

from __future__ import annotations

from typing import Any

import torch
from assertions import EPSILON, assert_within, assert_within_budget
from learned_mods import LearnedMod
from permitted import permitted
from strategies import FLOATING, Mod, Shape, environment
from torch import Tensor

from flexattn import ops
from flexattn.capture import block_lists
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.operands import split
from flexattn.problem import Problem
from flexattn.testing.budget import Results, Seeds, budgets
from flexattn.testing.solve import gradients, solve
from flexattn.testing.wide import widened

SCALE = 0.3


def problem_of(tensors: list[Tensor], mod: Any, mask: Any, shape: Shape) -> Problem:
    """The problem that a call with these operands poses, by block lists if there is a mask."""
    q, k, v = tensors
    program, captured, ints = trace(mod, mask, score_dtype=torch.float64 if q.dtype is torch.float64 else torch.float32)
    lists = [] if mask is None else list(block_lists(mask, (shape.B, shape.H, shape.L, shape.S), shape.block, q)[:4])
    # Leaves: what a mod computes of captured tensors alone is captured, too, and has a gradient of its own.
    captured = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in captured]
    return Problem(q, k, v, captured, lists, ints, shape.block, variant(program), SCALE)


def run(backend: str, problem: Problem, wanted: list[int], seeds: list[Tensor], options: str = "") -> Results:
    """Outputs and all gradients of a backend."""
    q, k, v = leaves = [t.detach().requires_grad_() for t in problem[:3]]
    inside, floats = split(problem.captured, problem.variant.text)
    operands = inside, problem.block_mask, problem.ints, floats, problem.block_size, problem.variant.text, SCALE
    out, lse, top = ops.FORWARD(q, k, v, *operands, backend, options)
    found = gradients([out, lse], seeds, leaves, [(i, problem.captured[i]) for i in wanted])
    return {"out": out, "lse": lse, "max_scores": top, **found}


def operands(shape: Shape, dtype: torch.dtype, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key and value, and the gradients of the output and of lse."""
    g = torch.Generator().manual_seed(seed)
    kv_batch = 1 if shape.shared_keys else shape.B
    sizes = (
        (shape.B, shape.H, shape.L, shape.E),
        (kv_batch, shape.kv_heads, shape.S, shape.E),
        (kv_batch, shape.kv_heads, shape.S, shape.Ev),
    )
    tensors = [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in sizes]
    seeds = [
        torch.randn(shape.B, shape.H, shape.L, shape.Ev, generator=g, dtype=torch.float64).to(dtype),
        torch.randn(shape.B, shape.H, shape.L, generator=g, dtype=torch.float64),
    ]
    return tensors, seeds


def assert_backend_equals_reference(
    backend: str,
    mod: Mod | None,
    mask: Mod | None,
    shape: Shape,
    dtype: torch.dtype,
    seed: int,
    options: str = "",
) -> None:
    """Compare all outputs and gradients of one problem, element by element, with the reference in float64.

    Captured tensors are learned, unless the options ask for a backward in one pass, which cannot collect their gradients.
    """
    env = environment(dtype if dtype is torch.float64 else torch.float32)
    for name in FLOATING if "ONE_PASS=True" not in options else ():
        env[name].requires_grad_()
    bound = tuple(None if m is None else m.bind(env) for m in (mod, mask))
    assert_right(backend, bound, bound, shape, dtype, seed, options, _slope("" if mod is None else mod.body, shape))


def assert_learned_gradients_equal_reference(
    backend: str, case: LearnedMod, shape: Shape, dtype: torch.dtype, seed: int, options: str = ""
) -> None:
    """Compare all outputs and gradients of a mod that reads learned tensors with the reference in float64."""
    made = case.make(shape, seed)
    assert_right(backend, made.mods, made.double().mods, shape, dtype, seed, options, _slope(case.body, shape))


def _slope(body: str, shape: Shape) -> int:
    """The largest factor that a captured number has in the scores."""
    return max(shape.L, shape.S) if "(kv_idx - q_idx)" in body else 1


def assert_right(
    backend: str, mods: Any, doubled: Any, shape: Shape, dtype: torch.dtype, seed: int, options: str, slope: int
) -> None:
    """Every element of every result is within its budget, and no result is worse than plain attention's by a factor.

    `doubled`: the mods with captured tensors in float64, for the truth of the second rule.
    """
    tensors, seeds = operands(shape, dtype, seed)
    problem = problem_of(tensors, *mods, shape)
    wide = widened(problem)
    wanted = [i for i, t in enumerate(problem.tensors) if i in wide.leaves and t.requires_grad]
    exact = solve(wide.problem, [(i, wide.leaves[i]) for i in wanted], *seeds)
    plain = solve(problem, [(i, problem.captured[i]) for i in wanted], *seeds, plain=True)
    found = run(backend, problem, wanted, seeds, permitted(options, problem, wanted))
    dout, dlse = seeds[0].double(), torch.where(exact["lse"].isfinite(), seeds[1], 0)
    arrive = Seeds(dout, dlse, torch.zeros_like(dout), torch.zeros_like(dlse))
    allowed = budgets(problem, wide, exact, plain, arrive, wanted).allowed
    for name, value in found.items():
        assert_within(name, value, exact[name], allowed[name])
    truth = problem_of([t.double() for t in tensors], *doubled, shape)
    exact = solve(truth, [(i, truth.captured[i]) for i in wanted], *seeds)
    assert_near_plain(found, exact, plain, tensors, seeds[0], shape, slope)


def assert_near_plain(
    found: Results,
    exact: Results,
    plain: Results,
    tensors: list[Tensor],
    dout: Tensor,
    shape: Shape,
    slope: int,
) -> None:
    """The largest error of each result is that of plain attention, up to a factor: a rule that knows nothing of elements."""
    dtype = tensors[0].dtype
    largest = [t.double().abs().max().item() if t.numel() else 0.0 for t in (*tensors, dout)]
    scores = largest[0] * largest[1] * shape.E * SCALE
    # exp turns an absolute error of a score, eps * |score|, into a relative error of a weight.
    top = exact["max_scores"][torch.isfinite(exact["max_scores"])]
    condition = 1 + (top.abs().max().item() if top.numel() else 0.0)
    cancelling = condition * largest[3] * largest[2] * shape.Ev * max(largest[0], largest[1]) * SCALE
    for name, value in found.items():
        magnitude = {"out": condition * largest[2], "lse": scores, "max_scores": scores}.get(name, cancelling)
        if name.startswith("d captured"):  # a sum over elements whose roundings are independent
            magnitude *= (shape.B * shape.H * shape.L * shape.S) ** 0.5 * slope
        stored = dtype if name.startswith("d") else value.dtype
        if (
            name.startswith("d captured")
            and EPSILON[value.dtype] * exact[name].abs().max() > EPSILON[stored] * magnitude
        ):
            stored, magnitude = value.dtype, 0.0  # the rounding of the result itself is what counts
        terms = max(shape.L, shape.S, shape.E)
        assert_within_budget(value, exact[name], plain[name], name, stored, magnitude, terms=terms)
