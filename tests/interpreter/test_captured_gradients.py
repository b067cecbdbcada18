"""Gradients of learned tensors by the Triton kernels, in every pattern, with workspaces of every size."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from laws import assert_learned_gradients_equal_reference
from learned_leaks import (
    ENTRIES,
    assert_entries_that_nothing_reads_get_exactly_zero,
    assert_nan_beside_a_table_and_gates_leaks_nowhere,
    assert_nan_in_masked_places_of_a_bias_leaks_nowhere,
)
from learned_mods import CASES, LearnedMod, learned_mods, learned_shapes
from strategies import Shape

from flexattn import flex_attention
from flexattn.backends import collection
from flexattn.backends.collection import Collection, Tiling
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.problem import Problem

SHAPE = Shape(2, 2, 2, 50, 61, 16, 8, (16, 32), False)


def options(tile: tuple[int, int], deterministic: bool) -> str:
    M, N = tile
    return f"BLOCK_M1={M},BLOCK_M2={M},BLOCK_N1={N},BLOCK_N2={N},DETERMINISTIC={deterministic}"


@settings(max_examples=20)
@given(
    # Triton's interpreter rounds to bfloat16 towards zero, which arithmetic of such tensors shows.
    case=learned_mods((torch.float32, torch.float16, torch.float64)),
    shape=learned_shapes(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tile=st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64])),
    workspace=st.sampled_from([1 << 13, 1 << 16, 1 << 28]),
    deterministic=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_learned_gradients_equal_the_reference(
    case: LearnedMod,
    shape: Shape,
    dtype: torch.dtype,
    tile: tuple[int, int],
    workspace: int,
    deterministic: bool,
    seed: int,
) -> None:
    with patch.multiple(collection, WORKSPACE=workspace, BUSY=1):
        assert_learned_gradients_equal_reference("triton", case, shape, dtype, seed, options(tile, deterministic))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_named_case_equals_the_reference(name: str, deterministic: bool) -> None:
    with patch.multiple(collection, WORKSPACE=1 << 15, BUSY=1, SORTED=300):
        assert_learned_gradients_equal_reference(
            "triton", CASES[name], SHAPE, torch.float32, 3, options((32, 16), deterministic)
        )


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("entry", ENTRIES)
def test_nan_in_masked_places_of_a_bias_leaks_nowhere(entry: str, block_size: int, curved: bool) -> None:
    assert_nan_in_masked_places_of_a_bias_leaks_nowhere("triton", entry, block_size, curved)


def test_nan_beside_a_table_and_gates_leaks_nowhere() -> None:
    assert_nan_beside_a_table_and_gates_leaks_nowhere("triton")


def test_entries_that_nothing_reads_get_exactly_zero() -> None:
    assert_entries_that_nothing_reads_get_exactly_zero("triton")


def problem_of(name: str, shape: Shape = SHAPE) -> Problem:
    """A case without a mask."""
    made = CASES[name].make(shape)
    program, captured, ints = trace(made.mods[0], None)
    q, k = torch.zeros(shape.B, shape.H, shape.L, 16), torch.zeros(shape.B, shape.kv_heads, shape.S, 16)
    return Problem(q, k, k, captured, [], ints, (128, 128), variant(program), 1.0)


UNROUNDED = ("relative", "t5", "forgetting gates", "pair bias", "pair bias, heads between", "routed")


@pytest.mark.parametrize("name", UNROUNDED)
def test_parameters_of_16_bits_are_summed_in_32(name: str) -> None:
    case = CASES[name]
    narrow = replace(case, tensors=tuple(replace(t, dtype=torch.bfloat16) for t in case.tensors))
    assert_learned_gradients_equal_reference("triton", narrow, SHAPE, torch.float32, 3, options((16, 32), False))


METHODS = {
    "alibi": {"row"},
    "t5": {"diagonal"},
    "relative": {"diagonal"},
    "forgetting gates": {"row", "column"},
    "pair bias": {"workspace"},  # batch entries share it
    "pair bias, heads between": {"store"},
    "routed": {"atomic"},
    "read by the score": {"atomic"},
}


@pytest.mark.parametrize("setting", ["neither", "option", "torch"])
@pytest.mark.parametrize("name", METHODS)
def test_only_arbitrary_indices_take_atomics_and_none_where_bits_shall_repeat(name: str, setting: str) -> None:
    given = {"DETERMINISTIC": True} if setting == "option" else {}
    try:
        torch.use_deterministic_algorithms(setting == "torch")
        problem = problem_of(name)
        found = Collection(problem, range(len(problem.tensors)), collection.is_deterministic(given))
    finally:
        torch.use_deterministic_algorithms(False)
    wanted = METHODS[name] if setting == "neither" else {m.replace("atomic", "sorted") for m in METHODS[name]}
    assert set(found.methods) - {None} == wanted


@pytest.mark.parametrize("lengths", [(0, 9), (9, 0), (0, 0)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_without_queries_or_keys_gradients_are_zero(lengths: tuple[int, int], deterministic: bool) -> None:
    L, S = lengths
    q, k = torch.randn(1, 2, L, 16), torch.randn(1, 2, S, 16)
    t, u = torch.randn(20, 20, requires_grad=True), torch.randn(20, requires_grad=True)
    ids = torch.arange(20)
    try:
        torch.use_deterministic_algorithms(deterministic)  # fills what is not initialised with nan
        out = flex_attention(
            q,
            k,
            k,
            lambda s, b, h, i, j: s * u[j] + u[i] + u[h] + u[j - i] + t[i, j] + t[ids[i], ids[j]],
            backend="triton",
        )
        found = torch.autograd.grad(out.sum(), (t, u))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(g.any() for g in found)


BEYOND = {
    "before the first": lambda t, u: lambda s, b, h, i, j: s + t[i - 5, j],
    "behind the last": lambda t, u: lambda s, b, h, i, j: s + t[i, j + 20],
    "by head, transposed": lambda t, u: lambda s, b, h, i, j: s + u[j - 3, h, i + 30],
    "another beside it": lambda t, u: lambda s, b, h, i, j: s + t[i + 20, j] * t[i, j - 1],
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_dense_tensor_read_beyond_its_ends_needs_no_atomics(name: str) -> None:
    q, k, v = (torch.randn(2, 3, 40, 16) for _ in range(3))
    t, u = torch.randn(45, 45, requires_grad=True), torch.randn(45, 3, 45, requires_grad=True)
    mod = BEYOND[name](t, u)
    with patch.multiple(collection, WORKSPACE=1 << 15, BUSY=1):
        results = [
            torch.autograd.grad(flex_attention(q, k, v, mod, backend=backend).sin().sum(), (t, u), allow_unused=True)
            for backend in ("triton", "reference")
        ]
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    program, captured, ints = trace(mod, None)
    methods = Collection(Problem(q, k, v, captured, [], ints, (128, 128), variant(program), 1.0), [0]).methods
    assert set(methods) == {"workspace"}


def test_only_the_backward_can_be_told_to_repeat_its_bits() -> None:
    q = torch.randn(1, 1, 20, 8)
    flex_attention(q, q, q, backend="triton", kernel_options={"bwd_DETERMINISTIC": True})
    with pytest.raises(ValueError, match="write 'DETERMINISTIC'"):
        flex_attention(q, q, q, kernel_options={"fwd_DETERMINISTIC": True})


def test_arithmetic_on_parameters_of_16_bits() -> None:
    """Integers and literals become bfloat16 in a mod."""
    slopes = torch.tensor([0.5, 0.25], dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    results = [
        flex_attention(q, k, v, lambda s, b, h, i, j: s * (1 + slopes[h]) + slopes[h] * (j - i), backend=backend)
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def test_a_tensor_that_the_batch_does_not_share_is_stored() -> None:
    alone = Shape(1, 2, 2, 50, 61, 16, 8, (16, 32), False)
    found = Collection(problem_of("pair bias", alone), [0])
    assert found.methods == ("store",)


@given(
    lengths=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    sizes=st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 40, 64])),
    most=st.integers(1, 60),
)
def test_parts_of_a_grid_cover_each_program_and_each_line_once(
    lengths: tuple[int, int], sizes: tuple[int, int], most: int
) -> None:
    (L, S), (tile, block) = lengths, sizes
    found = Collection(problem_of("pair bias", Shape(2, 3, 1, L, S, 16, 8, (16, 16), False)), [0])
    starts = [begin + i for begin in range(0, L, block) for i in range(0, min(block, L - begin), tile)]
    tiling = Tiling(tile, 16, block, 16, len(starts), blocks=1)
    assert [tiling.start(t) for t in range(len(starts))] == starts
    heads, lines, programs = 2 * 3, [], []
    for piece in found._pieces(tiling, heads * len(starts), most):
        assert 1 <= piece.programs <= most
        programs += range(piece.first, piece.first + piece.programs)
        lines += range(piece.line, piece.line + piece.lines)
        whole = piece.line % L == 0 and piece.lines % L == 0
        assert whole or piece.line // L == (piece.line + piece.lines - 1) // L  # heads, or a part of one
    assert programs == list(range(heads * len(starts))) and lines == list(range(heads * L))


def test_the_option_changes_no_result_of_the_other_backends() -> None:
    q = torch.randn(1, 1, 20, 8)
    results = [
        flex_attention(q, q, q, backend=backend, kernel_options={"DETERMINISTIC": True})
        for backend in ("tiled", "reference", "triton")
    ]
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])
