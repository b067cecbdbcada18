"""Law 7: a backend computes what the reference computes, every output and every gradient, within a derived budget."""

from __future__ import annotations

from typing import Any

import torch
from assertions import EPSILON, assert_within_budget
from learned_mods import LearnedMod
from strategies import FLOATING, Mod, Shape, environment
from torch import Tensor

from flexattn import ops, reference
from flexattn.capture import block_lists
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.operands import split
from flexattn.problem import Problem


def run(
    backend: str,
    tensors: list[Tensor],
    mod: Any,
    mask: Any,
    shape: Shape,
    learned: list[Tensor],
    seeds: list[Tensor],
    options: str = "",
) -> list[Tensor]:
    """Outputs and all gradients of a backend; "plain" is the reference with low-precision products."""
    q, k, v = (t.detach().requires_grad_() for t in tensors)
    double = q.dtype is torch.float64
    program, captured, ints = trace(mod, mask, score_dtype=torch.float64 if double else torch.float32)
    lists = [] if mask is None else list(block_lists(mask, (shape.B, shape.H, shape.L, shape.S), shape.block, q)[:4])
    if backend in ("plain", "reference"):
        problem = Problem(q, k, v, captured, lists, ints, shape.block, variant(program), 0.3)
        products = q.dtype if backend == "plain" else None
        out, lse, top = reference.attention(problem, products)
    else:
        inside, floats = split(captured, program)
        out, lse, top = ops.FORWARD(q, k, v, inside, lists, ints, floats, shape.block, program, 0.3, backend, options)
    dout, dlse = (s.to(o.dtype) for s, o in zip(seeds, (out, lse), strict=True))
    dlse = torch.where(torch.isfinite(lse), dlse, 0)
    used = [t for t in learned if any(t is c for c in captured)]
    leaves = [q, k, v, *used]
    pairs = [(o, g) for o, g in ((out, dout), (lse, dlse)) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    return [out, lse, top, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))]


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
    tensors, seeds = operands(shape, dtype, seed)
    env = environment(dtype if dtype is torch.float64 else torch.float32)
    learned = [env[n].requires_grad_() for n in FLOATING] if "ONE_PASS=True" not in options else []
    f = None if mod is None else mod.bind(env)
    m = None if mask is None else mask.bind(env)
    exact = run("reference", [t.double() for t in tensors], f, m, shape, learned, seeds)
    plain = run("plain", tensors, f, m, shape, learned, seeds)
    blocked = run(backend, tensors, f, m, shape, learned, seeds, options)
    slope = mod is not None and "(kv_idx - q_idx)" in mod.body
    compare(blocked, exact, plain, tensors, seeds, shape, dtype, max(shape.L, shape.S) if slope else 1)


def assert_learned_gradients_equal_reference(
    backend: str, case: LearnedMod, shape: Shape, dtype: torch.dtype, seed: int, options: str = ""
) -> None:
    """Compare all outputs and gradients of a mod that reads learned tensors with the reference in float64."""
    tensors, seeds = operands(shape, dtype, seed)
    made = case.make(shape, seed)
    doubled = made.double()
    exact = run("reference", [t.double() for t in tensors], *doubled.mods, shape, doubled.learned, seeds)
    plain = run("plain", tensors, *made.mods, shape, made.learned, seeds)
    blocked = run(backend, tensors, *made.mods, shape, made.learned, seeds, options)
    slope = max(shape.L, shape.S) if "(kv_idx - q_idx)" in case.body else 1
    compare(blocked, exact, plain, tensors, seeds, shape, dtype, slope)


def compare(
    found: list[Tensor],
    exact: list[Tensor],
    plain: list[Tensor],
    tensors: list[Tensor],
    seeds: list[Tensor],
    shape: Shape,
    dtype: torch.dtype,
    slope: int,
) -> None:
    """Element by element, within the budget of each of the results of `run`; `slope` is the largest factor of a slope."""
    largest = [t.double().abs().max().item() if t.numel() else 0.0 for t in (*tensors, seeds[0])]
    scores = largest[0] * largest[1] * shape.E * 0.3
    # exp turns an absolute error of a score, eps * |score|, into a relative error of a weight.
    top = exact[2][torch.isfinite(exact[2])]
    condition = 1 + (top.abs().max().item() if top.numel() else 0.0)
    cancelling = condition * largest[3] * largest[2] * shape.Ev * max(largest[0], largest[1]) * 0.3
    names = ["out", "lse", "max_scores", "dq", "dk", "dv", *(f"d captured {i}" for i in range(len(exact) - 6))]
    for name, a, e, p in zip(names, found, exact, plain, strict=True):
        magnitude = {"out": condition * largest[2], "lse": scores, "max_scores": scores}.get(name, cancelling)
        if name.startswith("d captured"):  # a sum over elements whose roundings are independent
            magnitude *= (shape.B * shape.H * shape.L * shape.S) ** 0.5
            magnitude *= slope
        stored = dtype if name.startswith("d") else a.dtype
        if name.startswith("d captured") and EPSILON[a.dtype] * e.abs().max() > EPSILON[stored] * magnitude:
            stored, magnitude = a.dtype, 0.0  # the rounding of the result itself is what counts
        assert_within_budget(a, e, p, name, stored, magnitude, terms=max(shape.L, shape.S, shape.E))
