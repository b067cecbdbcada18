"""The laws of the compiler and its backends, on mods and shapes that hypothesis chooses."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import torch
from assertions import assert_same
from hypothesis import given, settings
from laws import assert_backend_equals_reference
from strategies import Mod, Shape, environment, mask_mods, score_mods, shapes
from torch import Tensor

from flexattn.backends import schedule
from flexattn.codegen.derivative import derivative
from flexattn.codegen.evaluate import Inputs, evaluate
from flexattn.codegen.ir import Op, walk
from flexattn.codegen.pipeline import variant
from flexattn.codegen.program import parse, print_program
from flexattn.codegen.trace import trace

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
    # Narrow chunks take these short sequences through the online softmax of long ones.
    sizes_of_work = {"TILE_ELEMENTS": 1 << 9, "MIN_WIDTH": 16} if narrow else {}
    schedule.everything.cache_clear()  # made for other sizes
    with patch.multiple(schedule, **sizes_of_work) if narrow else nullcontext():
        assert_backend_equals_reference("tiled", mod, mask, shape, dtype, seed)
