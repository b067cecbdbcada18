"""Gradients of learned tensors: their access patterns, and what the tiled backend makes of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from laws import assert_learned_gradients_equal_reference
from learned_leaks import (
    ENTRIES,
    assert_entries_that_nothing_reads_get_exactly_zero,
    assert_nan_beside_a_table_and_gates_leaks_nowhere,
    assert_nan_in_masked_places_of_a_bias_leaks_nowhere,
)
from learned_mods import CASES, LearnedMod, learned_mods, learned_shapes
from strategies import Shape, environment, integers
from torch import Tensor

from flexattn import create_block_mask, flex_attention
from flexattn.backends import schedule
from flexattn.backends.tile_sums import diagonals
from flexattn.codegen.access import Access, Pattern, access
from flexattn.codegen.evaluate import Inputs, Pool, evaluate
from flexattn.codegen.ir import Op, walk
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace

S = 24
SHAPE = Shape(2, 2, 2, 70, 75, 8, 8, (16, 16), False)


def accesses(score: Callable[..., Any]) -> tuple[list[Access], list[Tensor]]:
    """The accesses of the floating-point tensors that a score_mod reads."""
    traced = trace(score, None)
    loads = [n for n in walk(variant(traced.program).score) if n.op is Op.LOAD and n.dtype.is_float]
    return [access(n) for n in loads], list(traced.captured)


def bucket(distance: Tensor) -> Tensor:
    """T5's."""
    far = 8 + (torch.log(distance.abs().clamp(min=1).float() / 8) / math.log(16) * 8).long()
    return torch.where(distance < 0, 16, 0) + torch.where(distance.abs() < 8, distance.abs(), far.clamp(max=15))


def patterns() -> Iterator[tuple[str, Callable[..., Any], Pattern]]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    zero, line, heads, gate, rel = normal(), normal(4 * S), normal(2, 4), normal(2, 4, 4 * S), normal(4, 4 * S)
    square, pair = normal(2 * S, 2 * S), normal(4, 2 * S, 2 * S)
    group, doc = torch.tensor([0, 0, 1, 1]), torch.randint(0, 4, (S,), generator=g)
    offset, lookup, keyed = torch.tensor([1, 3]), torch.randint(0, 9, (2 * S,), generator=g), torch.tensor([2, 0])
    yield "slopes[h]", lambda s, b, h, q, k: s + line[h] * (k - q), Pattern.HEAD
    yield "0-d", lambda s, b, h, q, k: s * zero, Pattern.HEAD
    yield "constant", lambda s, b, h, q, k: s + line[3], Pattern.HEAD
    yield "t[b, h]", lambda s, b, h, q, k: s + heads[b, h], Pattern.HEAD
    yield "t[h // 2]", lambda s, b, h, q, k: s + line[h // 2], Pattern.HEAD
    yield "t[group[h]]", lambda s, b, h, q, k: s + line[group[h]], Pattern.HEAD
    yield "F[b, h, q]", lambda s, b, h, q, k: s + gate[b, h, q], Pattern.ROW
    yield "t[doc[q]]", lambda s, b, h, q, k: s + line[doc[q]], Pattern.ROW
    yield "t[q, q]", lambda s, b, h, q, k: s + square[q, q], Pattern.ROW
    yield "t[q - q + k]", lambda s, b, h, q, k: s + line[q - q + k], Pattern.COLUMN
    yield "F[b, h, kv]", lambda s, b, h, q, k: s + gate[b, h, k], Pattern.COLUMN
    yield "t[3, kv]", lambda s, b, h, q, k: s + square[3, k // 2], Pattern.COLUMN
    yield "rel[h, q - kv]", lambda s, b, h, q, k: s + rel[h, q - k + S - 1], Pattern.DIAGONAL
    yield "rel[h, kv - q]", lambda s, b, h, q, k: s + rel[h, k - q + S - 1], Pattern.DIAGONAL
    yield "rel[h, long]", lambda s, b, h, q, k: s + rel[h, (k - q).long() + S - 1], Pattern.DIAGONAL
    yield "rel[h, longs]", lambda s, b, h, q, k: s + rel[h, k.long() - (q.long() - S)], Pattern.DIAGONAL
    yield "rel, offset[b]", lambda s, b, h, q, k: s + rel[h, q + offset[b] - k + S], Pattern.DIAGONAL
    yield "T5", lambda s, b, h, q, k: s + rel[h, bucket(k - q)], Pattern.DIAGONAL
    yield "t[lookup[q - kv + S]]", lambda s, b, h, q, k: s + line[lookup[q - k + S]], Pattern.DIAGONAL
    yield "two diagonals", lambda s, b, h, q, k: s + square[abs(q - k), k - q], Pattern.DIAGONAL
    yield "pair[h, q, kv]", lambda s, b, h, q, k: s + pair[h, q, k], Pattern.DENSE
    yield "pair[h, kv, q]", lambda s, b, h, q, k: s + pair[h, k, q], Pattern.DENSE
    yield "pair[q, kv + 1]", lambda s, b, h, q, k: s + square[q, k + 1], Pattern.DENSE
    yield "pair[group[h], q, kv]", lambda s, b, h, q, k: s + pair[group[h], q.long(), k], Pattern.DENSE
    yield "pair[q + offset[b], kv]", lambda s, b, h, q, k: s + square[q + offset[b], k], Pattern.INDIRECT
    yield "pair[q, -kv]", lambda s, b, h, q, k: s + square[q, -k], Pattern.INDIRECT
    yield "pair[q, 2 kv]", lambda s, b, h, q, k: s + square[q, 2 * k], Pattern.INDIRECT
    yield "pair[q, kv - q]", lambda s, b, h, q, k: s + square[q, k - q], Pattern.INDIRECT
    yield "routed", lambda s, b, h, q, k: s + square[doc[q], doc[k]], Pattern.INDIRECT
    yield "t[q + kv]", lambda s, b, h, q, k: s + line[q + k], Pattern.INDIRECT
    yield "t[2 q - kv]", lambda s, b, h, q, k: s + line[2 * q - k], Pattern.INDIRECT
    yield "t[doc[q] - doc[kv]]", lambda s, b, h, q, k: s + line[doc[q] - doc[k]], Pattern.INDIRECT
    yield "t[q // 16 - kv // 16]", lambda s, b, h, q, k: s + line[q // 16 - k // 16], Pattern.INDIRECT
    yield "t[score]", lambda s, b, h, q, k: s + line[s.long().clamp(0, 3)], Pattern.INDIRECT
    yield "t[keyed[kv == q]]", lambda s, b, h, q, k: s + line[keyed[(k - q == 0).long()]], Pattern.DIAGONAL


@pytest.mark.parametrize(("mod", "pattern"), [pytest.param(f, p, id=name) for name, f, p in patterns()])
def test_the_pattern_of_a_load(mod: Callable[..., Any], pattern: Pattern) -> None:
    ((found, *_), _) = accesses(mod)
    assert found.pattern is pattern


@settings(max_examples=150)
@given(
    index=st.lists(integers(), min_size=1, max_size=2), own=st.sampled_from(["{}", "{} + kv_idx - q_idx", "q_idx + {}"])
)
def test_what_a_pattern_claims_is_true(index: list[str], own: str) -> None:
    env = {**environment(), "t": torch.randn([40] * len(index))}
    mod = eval(f"lambda score, b, h, q_idx, kv_idx: score + t[{', '.join(map(own.format, index))}]", env)
    try:
        found, captured = accesses(mod)
    except IndexError:  # a constant beyond the end, which no mod may read
        reject()
    sizes = {"b": 2, "h": 3, "q_idx": 9, "kv_idx": 11}
    named = {
        name: torch.arange(n, dtype=torch.int32).view([-1 if i == d else 1 for i in range(4)])
        for d, (name, n) in enumerate(sizes.items())
    }
    for to in found:
        values = [v.expand(*sizes.values()) for v in evaluate(to.indices, Inputs(named, captured))]
        for d, value in enumerate(values):
            if to.pattern in (Pattern.HEAD, Pattern.ROW):
                assert (value == value[..., :1]).all()
            if to.pattern in (Pattern.HEAD, Pattern.COLUMN):
                assert (value == value[:, :, :1]).all()
            if to.pattern is Pattern.DIAGONAL:
                assert (value[..., 1:, 1:] == value[..., :-1, :-1]).all()
            if to.pattern is Pattern.DENSE:
                assert to.q is not None and to.kv is not None
                steps = int(d == to.q.dim), int(d == to.kv.dim)
                assert (value.diff(dim=2) == steps[0]).all() and (value.diff(dim=3) == steps[1]).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 5), (2, 5, 1), (3, 4, 7), (1, 40, 9), (2, 130, 131)])
def test_sums_along_diagonals(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    pool = Pool(x.device)
    for part in (x, x[..., shape[2] // 2 :]):
        for _ in range(2):  # the second time the pool's memory is not zero
            sums = diagonals(part, pool)
            rows, columns = part.shape[1:]
            expected = [part.diagonal(d, 1, 2).sum(-1) for d in range(1 - rows, columns)]
            torch.testing.assert_close(sums, torch.stack(expected, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_named_cases_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    assert_learned_gradients_equal_reference("tiled", CASES[name], SHAPE, dtype, seed=3)


@settings(max_examples=100)
@given(
    case=learned_mods(), shape=learned_shapes(), double=st.booleans(), narrow=st.booleans(), seed=st.integers(0, 1000)
)
def test_generated_mods_equal_the_reference(
    case: LearnedMod, shape: Shape, double: bool, narrow: bool, seed: int
) -> None:
    sizes_of_work = {"TILE_ELEMENTS": 1 << 9, "MIN_WIDTH": 16} if narrow else {}
    schedule.everything.cache_clear()  # made for other sizes
    dtype = torch.float64 if double else torch.float32
    with patch.multiple(schedule, **sizes_of_work) if narrow else nullcontext():
        assert_learned_gradients_equal_reference("tiled", case, shape, dtype, seed)
    schedule.everything.cache_clear()


def gradients(name: str, shape: Shape = SHAPE) -> list[Tensor]:
    """Of query, key, value and the learned tensors of a case, with a block mask of blocks of 16."""
    g = torch.Generator().manual_seed(1)
    made = CASES[name].make(shape)
    q, k, v = (
        torch.randn(shape.B, heads, n, 8, generator=g, requires_grad=True)
        for heads, n in ((shape.H, shape.L), (shape.kv_heads, shape.S), (shape.kv_heads, shape.S))
    )
    mod, mask = made.mods
    blocks = None if mask is None else create_block_mask(mask, shape.B, shape.H, shape.L, shape.S, "cpu", BLOCK_SIZE=16)
    out = flex_attention(q, k, v, mod, blocks, enable_gqa=True, backend="tiled")
    return list(torch.autograd.grad(out.sin().sum(), [q, k, v, *made.learned]))


@pytest.mark.parametrize("name", CASES)
def test_gradients_repeat_bit_by_bit(name: str) -> None:
    shape = Shape(2, 2, 2, 150, 163, 8, 8, (16, 16), False)
    try:
        torch.set_num_threads(3)
        first, again = gradients(name, shape), gradients(name, shape)
        torch.use_deterministic_algorithms(True)
        strict = gradients(name, shape)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    for a, b, c in zip(first, again, strict, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("entry", ENTRIES)
def test_nan_in_masked_places_of_a_bias_leaks_nowhere(entry: str, block_size: int, curved: bool) -> None:
    assert_nan_in_masked_places_of_a_bias_leaks_nowhere("tiled", entry, block_size, curved)


def test_nan_beside_a_table_and_gates_leaks_nowhere() -> None:
    assert_nan_beside_a_table_and_gates_leaks_nowhere("tiled")


def test_entries_that_nothing_reads_get_exactly_zero() -> None:
    assert_entries_that_nothing_reads_get_exactly_zero("tiled")
