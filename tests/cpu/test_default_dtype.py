"""Python numbers under each default dtype: what they are rounded to, and what they are not, is torch's."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from assertions import EPSILON, assert_same
from hypothesis import given, settings
from laws import assert_backend_equals_reference
from strategies import Mod, Shape, default_dtype, environment, inexact, mask_mods, score_mods, shapes
from torch import Tensor

from flexattn import flex_attention
from flexattn.codegen.evaluate import Inputs, evaluate
from flexattn.codegen.pipeline import variant
from flexattn.codegen.program import parse, print_program
from flexattn.codegen.trace import trace

B, H, L, S = 2, 4, 13, 19
DEFAULTS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def indices() -> list[Tensor]:
    return [
        torch.arange(n, dtype=torch.int32).view([-1 if i == d else 1 for i in range(4)])
        for d, n in enumerate((B, H, L, S))
    ]


def traced(f: Any, score: Tensor) -> tuple[str, Tensor]:
    """The program of a score_mod, and its values."""
    program, captured, _ = trace(f, None, score_dtype=score.dtype)
    named = dict(zip(("b", "h", "q_idx", "kv_idx"), indices(), strict=True))
    v = variant(program)
    n = len(captured) - v.n_floats
    (value,) = evaluate([parse(program).score], Inputs({**named, "score": score}, captured[:n], captured[n:]))
    return program, value


@given(mod=score_mods().map(inexact), default=st.sampled_from(DEFAULTS))
def test_law_1_under_every_default_dtype(mod: Mod, default: torch.dtype) -> None:
    f = mod.bind(environment())
    score = torch.randn(B, H, L, S)
    with default_dtype(default):
        program, value = traced(f, score)
        expected = f(score, *indices())
    assert_same(value, torch.as_tensor(expected, dtype=torch.float32), program)


@settings(max_examples=40)
@given(
    mod=score_mods().map(inexact),
    mask=st.one_of(st.none(), mask_mods()),
    shape=shapes(),
    default=st.sampled_from((torch.float64, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 1000),
)
def test_law_7_under_every_default_dtype(
    mod: Mod, mask: Mod | None, shape: Shape, default: torch.dtype, seed: int
) -> None:
    with default_dtype(default):
        assert_backend_equals_reference("tiled", mod, mask, shape, torch.float32, seed)


NUMBERS: dict[str, Any] = {
    "times": lambda s, b, h, q, k: s * 0.3,
    "from the left": lambda s, b, h, q, k: 0.3 - s,
    "quotient": lambda s, b, h, q, k: 7.1 * torch.tanh(s / 7.1),
    "bounds": lambda s, b, h, q, k: s.clamp(-0.3, 0.7),
    "choice": lambda s, b, h, q, k: torch.where(q >= k, s, -0.3),
    "rounded choice": lambda s, b, h, q, k: s + torch.where(q >= k, 0.3, -0.7),
    "mask": lambda s, b, h, q, k: s.masked_fill(q < k, -1000.1),
    "slope of an option": lambda s, b, h, q, k: torch.nn.functional.leaky_relu(s, 0.013),
    "added multiple": lambda s, b, h, q, k: torch.add(s, s.sin(), alpha=0.3),
    "filled": lambda s, b, h, q, k: s + torch.full_like(s, 0.3),
    "filled integers": lambda s, b, h, q, k: s + torch.full_like(q, 1001.9),
    "number alone": lambda s, b, h, q, k: s * 0 + 0.3,
    "half precision of the user's": lambda s, b, h, q, k: s + (s.half() * 0.5 + torch.full_like(s.half(), 0.3)),
    "index and choice": lambda s, b, h, q, k: s + torch.where(q >= 4, q, 0.3),
}


@pytest.mark.parametrize("score_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_python_number_has_its_full_value_beside_a_score(
    name: str, default: torch.dtype, score_dtype: torch.dtype
) -> None:
    f = NUMBERS[name]
    score = torch.randn(B, H, L, S, dtype=score_dtype)
    with default_dtype(default):
        program, value = traced(f, score)
        assert_same(value, f(score, *indices()).to(score_dtype), program, ulps=4)


@pytest.mark.parametrize("default", DEFAULTS)
def test_a_python_number_beside_an_index_has_the_default_dtype(default: torch.dtype) -> None:
    """In 16 bits torch rounds the number before some operations and not before others: one rounding may differ."""
    for f in (lambda s, b, h, q, k: q * 0.3 + 0 * s, lambda s, b, h, q, k: (k + 0.3) / 0.7 + 0 * s):
        score = torch.randn(B, H, L, S)
        with default_dtype(default):
            program, value = traced(f, score)
            expected = f(score, *indices())
        epsilon = EPSILON[default]
        value, expected = torch.broadcast_tensors(value, expected.to(value.dtype))
        torch.testing.assert_close(value, expected, rtol=max(2 * epsilon, 1e-6), atol=1e-6, msg=program)
        assert torch.equal(value, value.to(default).float()) or default is torch.float64


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_reads_numbers_at_the_precision_of_the_score(
    backend: str, default: torch.dtype, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(1, 2, 24, 8, dtype=dtype) for _ in range(3))
    with default_dtype(default):
        out = flex_attention(q, k, v, lambda s, b, h, i, j: torch.sin(s * 0.3) * 7.1, scale=1.0, backend=backend)
    exact = torch.softmax(torch.sin(q.double() @ k.double().mT * 0.3) * 7.1, -1) @ v.double()
    torch.testing.assert_close(out.double(), exact, rtol=64 * EPSILON[dtype], atol=64 * EPSILON[dtype])


def test_beside_a_score_the_default_dtype_does_not_change_the_program() -> None:
    f = lambda s, b, h, q, k: torch.where(q >= k, 7.1 * torch.tanh(s / 7.1), -0.3)
    programs = set()
    for default in DEFAULTS:
        with default_dtype(default):
            programs.add(trace(f, None).program)
    assert len(programs) == 1


def test_a_number_that_is_read_as_two_dtypes_is_two_numbers_of_the_program() -> None:
    double = torch.tensor([1.0, 2.0], dtype=torch.float64)
    f = lambda s, b, h, q, k: torch.lerp(double[h % 2] + 0 * s.double(), s.double(), 0.3) + s * 0.3
    program, captured, _ = trace(f, None)
    parsed = parse(program)
    assert print_program(parsed.score, parsed.mask, parsed.score_dtype).text == program
    assert parsed.n_floats == 2 and captured[-2:] == [0.3, 0.3]
