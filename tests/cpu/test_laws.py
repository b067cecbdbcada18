"""The laws of the compiler and its backends, on mods and shapes that hypothesis chooses."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import torch
from assertions import assert_same, assert_within_budget
from hypothesis import given, settings
from strategies import FLOATING, Mod, Shape, environment, mask_mods, score_mods, shapes
from torch import Tensor

from flexattn import ops, reference
from flexattn.backends import tiled
from flexattn.capture import block_lists
from flexattn.codegen.derivative import derivative
from flexattn.codegen.evaluate import Inputs, evaluate
from flexattn.codegen.ir import Op, walk
from flexattn.codegen.pipeline import variant
from flexattn.codegen.program import parse, print_program
from flexattn.codegen.trace import trace
from flexattn.problem import Problem

B, H, L, S = 2, 4, 13, 19


def index_tensors() -> dict[str, Tensor]:
    sizes = {"b": B, "h": H, "q_idx": L, "kv_idx": S}
    return {
        name: torch.arange(n, dtype=torch.int32).view([-1 if i == d else 1 for i in range(4)])
        for d, (name, n) in enumerate(sizes.items())
    }


def inputs_of(program: str, captured: list[Tensor], score: Tensor) -> Inputs:
    n = len(captured) - variant(program).n_floats
    return Inputs({**index_tensors(), "score": score}, captured[:n], captured[n:])


@given(mod=score_mods())
def test_law_1_a_traced_score_mod_computes_what_the_function_does(mod: Mod) -> None:
    f = mod.bind(environment())
    score = torch.randn(B, H, L, S)
    program, captured, _ = trace(f, None)
    (value,) = evaluate([parse(program).score], inputs_of(program, captured, score))
    expected = torch.as_tensor(f(score, *index_tensors().values()))
    assert_same(value, expected.to(torch.float32), program)


@given(mod=mask_mods())
def test_law_1_a_traced_mask_mod_computes_what_the_function_does(mod: Mod) -> None:
    f = mod.bind(environment())
    program, captured, _ = trace(None, f)
    mask = parse(program).mask
    assert mask is not None
    (value,) = evaluate([mask], inputs_of(program, captured, torch.zeros(())))
    assert_same(value, f(*index_tensors().values()), program)


@given(mod=score_mods(), mask=mask_mods())
def test_law_2_simplification_changes_no_value(mod: Mod, mask: Mod) -> None:
    env = environment()
    program, captured, _ = trace(mod.bind(env), mask.bind(env))
    parsed, simple = parse(program), variant(program)
    score = torch.randn(B, H, L, S)
    before = evaluate([parsed.score], inputs_of(program, captured, score))[0]
    after = evaluate([simple.score], inputs_of(program, captured, score))[0]
    assert torch.equal(*torch.broadcast_tensors(before.nan_to_num(7.0), after.nan_to_num(7.0)))
    assert parsed.mask is not None
    keep = evaluate([parsed.mask], inputs_of(program, captured, score))[0]
    kept = keep.new_ones(()) if simple.mask is None else evaluate([simple.mask], inputs_of(program, captured, score))[0]
    assert torch.equal(*torch.broadcast_tensors(keep, kept))
    assert len(list(walk(simple.score))) <= len(list(walk(parsed.score)))


@given(mod=score_mods(), mask=mask_mods())
def test_a_program_is_its_own_canonical_form(mod: Mod, mask: Mod) -> None:
    env = environment()
    program = trace(mod.bind(env), mask.bind(env)).program
    parsed = parse(program)
    assert print_program(parsed.score, parsed.mask, parsed.score_dtype).text == program


@given(mod=score_mods())
def test_law_5_the_derivative_is_that_of_autograd(mod: Mod) -> None:
    env = environment(torch.float64)
    program, captured, _ = trace(mod.bind(env), None, score_dtype=torch.float64)
    node = variant(program).score
    found = derivative(node)
    score = torch.randn(B, H, L, S, dtype=torch.float64, requires_grad=True)
    inputs = inputs_of(program, captured, score)
    # Each loaded value becomes a leaf of full size, so that autograd gives the gradient of each single read.
    inputs.on_load = lambda t: t.expand(B, H, L, S).detach().requires_grad_() if t.is_floating_point() else t
    (value,) = evaluate([node], inputs)
    value = value.expand(B, H, L, S)
    loads = [n for n in walk(node) if n.op is Op.LOAD and n.dtype.is_float]
    leaves = [score, *(inputs.memo[n] for n in loads)]
    grad = torch.randn(B, H, L, S, dtype=torch.float64)
    expected: list[Any] = [None] * len(leaves)
    if value.requires_grad:
        expected = list(torch.autograd.grad(value, leaves, grad, allow_unused=True))
    inputs.memo.clear()
    ours = {n: g for n, g in found.loads}
    with torch.no_grad():
        plain = inputs_of(program, captured, score.detach()).fork({"grad": grad})
        for leaf, load, want in zip(leaves, [None, *loads], expected, strict=True):
            root = found.score if load is None else ours.get(load)
            got = torch.zeros(()) if root is None else evaluate([root], plain)[0]
            want = torch.zeros_like(leaf) if want is None else want
            torch.testing.assert_close(
                got.to(torch.float64).expand(B, H, L, S), want, rtol=1e-9, atol=1e-9, equal_nan=True
            )


def run(
    backend: str, tensors: list[Tensor], mod: Any, mask: Any, shape: Shape, learned: list[Tensor], seeds: list[Tensor]
) -> list[Tensor]:
    """Outputs and all gradients of "tiled" or "reference"; "plain" is the reference with low-precision products."""
    q, k, v = (t.detach().requires_grad_() for t in tensors)
    double = q.dtype is torch.float64
    program, captured, ints = trace(mod, mask, score_dtype=torch.float64 if double else torch.float32)
    lists = [] if mask is None else list(block_lists(mask, (shape.B, shape.H, shape.L, shape.S), shape.block, q))
    if backend == "plain":
        problem = Problem(q, k, v, captured, lists, ints, shape.block, variant(program), 0.3)
        out, lse, top = reference.attention(problem, products=q.dtype)
    else:
        out, lse, top = ops.FORWARD(q, k, v, captured, lists, ints, shape.block, program, 0.3, backend, "")
    dout, dlse = (s.to(o.dtype) for s, o in zip(seeds, (out, lse), strict=True))
    dlse = torch.where(torch.isfinite(lse), dlse, 0)
    used = [t for t in learned if any(t is c for c in captured)]
    leaves = [q, k, v, *used]
    pairs = [(o, g) for o, g in ((out, dout), (lse, dlse)) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    return [out, lse, top, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))]


@settings(max_examples=120)
@given(
    mod=st.one_of(st.none(), score_mods()),
    mask=st.one_of(st.none(), mask_mods()),
    shape=shapes(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    narrow=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_law_7_the_tiled_backend_equals_the_reference(
    mod: Mod | None, mask: Mod | None, shape: Shape, dtype: torch.dtype, narrow: bool, seed: int
) -> None:
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
    env = environment(dtype if dtype is torch.float64 else torch.float32)
    learned = [env[n].requires_grad_() for n in FLOATING]
    f = None if mod is None else mod.bind(env)
    m = None if mask is None else mask.bind(env)
    exact = run("reference", [t.double() for t in tensors], f, m, shape, learned, seeds)
    plain = run("plain", tensors, f, m, shape, learned, seeds)
    # Narrow chunks take these short sequences through the online softmax of long ones.
    sizes_of_work = {"TILE_ELEMENTS": 1 << 9, "MIN_WIDTH": 16} if narrow else {}
    with patch.multiple(tiled, **sizes_of_work) if narrow else nullcontext():
        blocked = run("tiled", tensors, f, m, shape, learned, seeds)
    largest = [t.double().abs().max().item() if t.numel() else 0.0 for t in (*tensors, seeds[0])]
    scores = largest[0] * largest[1] * shape.E * 0.3
    # exp turns an absolute error of a score, eps * |score|, into a relative error of a weight.
    top = exact[2][torch.isfinite(exact[2])]
    condition = 1 + (top.abs().max().item() if top.numel() else 0.0)
    cancelling = condition * largest[3] * largest[2] * shape.Ev * max(largest[0], largest[1]) * 0.3
    names = ["out", "lse", "max_scores", "dq", "dk", "dv", *(f"d captured {i}" for i in range(len(exact) - 6))]
    for name, a, e, p in zip(names, blocked, exact, plain, strict=True):
        magnitude = {"out": condition * largest[2], "lse": scores, "max_scores": scores}.get(name, cancelling)
        if name.startswith("d captured"):  # a sum over elements whose roundings are independent
            magnitude *= (shape.B * shape.H * shape.L * shape.S) ** 0.5
            if mod is not None and "(kv_idx - q_idx)" in mod.body:  # the factor of a slope
                magnitude *= max(shape.L, shape.S)
        stored = dtype if name.startswith("d") else a.dtype
        assert_within_budget(a, e, p, name, stored, magnitude, terms=max(shape.L, shape.S, shape.E))
