"""In which order programs get their tiles: every tile of every head once, the longest first, heads of one cache together."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from flexattn import create_block_mask, flex_attention, masks
from flexattn.backends import one_pass, work_order
from flexattn.backends.one_pass import in_one_pass_or_two
from flexattn.backends.target import Target
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.problem import Problem
from flexattn.templates.launch_order import work_of_program


@triton.jit
def record(out, tiles, heads, batches, heads_at_once, order):
    t, b, h = work_of_program(tl.program_id(0), tiles, heads, batches, heads_at_once, order)
    at = out + tl.program_id(0) * 3
    tl.store(at, t)
    tl.store(at + 1, b)
    tl.store(at + 2, h)


def order_of(tiles: int, heads: int, batches: int, heads_at_once: int, order: object) -> list[tuple[int, ...]]:
    """Tile, batch entry and head of every program."""
    out = torch.full((tiles * heads * batches, 3), -1, dtype=torch.int32)
    record[(len(out),)](out, tiles, heads, batches, heads_at_once, order)
    return [tuple(row) for row in out.tolist()]


@settings(max_examples=30)
@given(
    tiles=st.integers(1, 7),
    heads=st.integers(1, 5),
    batches=st.integers(1, 3),
    at_once=st.integers(1, 16),
    ordered=st.booleans(),
    seed=st.integers(0, 100),
)
def test_every_tile_of_every_head_is_some_program_s(
    tiles: int, heads: int, batches: int, at_once: int, ordered: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    permutations = torch.rand(batches, heads, tiles, generator=g).argsort(-1).int()
    order = work_order.Order(permutations, heads * tiles, tiles) if ordered else None
    found = order_of(tiles, heads, batches, min(at_once, heads * batches), order)
    assert sorted(found) == sorted((t, b, h) for t in range(tiles) for b in range(batches) for h in range(heads))


def test_heads_that_share_the_cache_take_turns() -> None:
    found = order_of(3, 4, 1, 2, None)
    assert [(t, h) for t, _, h in found] == [(t, h) for first in (0, 2) for t in range(3) for h in (first, first + 1)]


@pytest.mark.parametrize("tiles_of_block", [1, 2])
def test_the_longest_rows_come_first(tiles_of_block: int) -> None:
    mask = create_block_mask(masks.causal_mask, None, None, 300, 300, BLOCK_SIZE=64)
    tiles = 5 * tiles_of_block - (tiles_of_block - 1)  # the last block has one tile
    made = work_order.longest_first(mask.kv_lists(), tiles, tiles_of_block)
    assert (made.stride_b, made.stride_h) == (0, 0)
    blocks = [t // tiles_of_block for t in made.ptr.flatten().tolist()]
    assert sorted(made.ptr.flatten().tolist()) == list(range(tiles))
    assert blocks == sorted(blocks, reverse=True)  # a causal mask's last rows are its longest
    keys = work_order.longest_first(mask.kv_lists(), 5, 1, work_order.KeyTiles(5, 1, 1, 1))
    assert keys.ptr.flatten().tolist() == [0, 1, 2, 3, 4]


def test_heads_whose_lists_differ_have_orders_of_their_own() -> None:
    def one_head_looks_back(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) ^ (h == 1)

    mask = create_block_mask(one_head_looks_back, None, 2, 256, 256, BLOCK_SIZE=64)
    made = work_order.longest_first(mask.kv_lists(), 4, 1)
    assert made.stride_h == 4
    assert [found[0, h].tolist() for found in [made.ptr] for h in (0, 1)] == [[3, 2, 1, 0], [0, 1, 2, 3]]


def test_programs_of_keys_count_the_work_of_all_for_whom_they_work() -> None:
    def first_head_forward(b, h, q_idx, kv_idx):
        return torch.where(h % 2 == 0, q_idx >= kv_idx, (kv_idx < 64) | (kv_idx >= 192) & (q_idx >= 192))

    mask = create_block_mask(first_head_forward, 2, 2, 256, 256, BLOCK_SIZE=64)
    apart = work_order.longest_first(mask.kv_lists(), 4, 1, work_order.KeyTiles(4, 1, 1, 1))
    group = work_order.longest_first(mask.kv_lists(), 4, 1, work_order.KeyTiles(4, 2, 1, 3))
    shared = work_order.longest_first(mask.kv_lists(), 4, 1, work_order.KeyTiles(4, 2, 2, 3))
    assert apart.ptr.shape[1] == 2 and apart.ptr[0, 1, 0] == 0
    assert group.ptr.flatten().tolist()[:4] == shared.ptr.flatten().tolist() == [0, 1, 2, 3]


def test_the_heads_of_a_group_are_divided_only_where_programs_are_few() -> None:
    cpu = torch.device("cpu")
    assert work_order.splits(2048, 4, 8, cpu) == 4  # TinyLlama, one sequence: 64 programs for 132 multiprocessors
    assert work_order.splits(2048, 32, 8, cpu) == 1
    assert work_order.splits(128, 1, 3, cpu) == 3  # no more parts than heads
    assert work_order.splits(0, 0, 1, cpu) == 1


def test_as_many_heads_are_together_as_fit_the_cache() -> None:
    cpu, room = torch.device("cpu"), int(work_order.CACHE_SHARE * work_order.USUAL.cache)
    assert work_order.together(4, room // 5, 64, cpu) == 16
    assert work_order.together(4, room + 1, 64, cpu) == 4  # the heads of a group read the same keys
    assert work_order.together(4, 1, 6, cpu) == 6


def test_a_backward_in_one_pass_is_refused_where_it_cannot_be() -> None:
    slopes = torch.rand(2, requires_grad=True)
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    alibi = lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)
    options = {"ONE_PASS": True}
    with pytest.raises(ValueError, match="is summed by tiles of queries; or leave the option out"):
        flex_attention(q, k, v, alibi, kernel_options=options, backend="triton").sum().backward()
    with pytest.raises(ValueError, match="in an order that differs from run to run; leave one of them out"):
        flex_attention(q, k, v, kernel_options={**options, "DETERMINISTIC": True}, backend="triton").sum().backward()


def test_both_ways_are_compared_only_on_request() -> None:
    q = torch.randn(1, 2, 40, 16)
    problem = Problem(q, q, q, [], [], [], (128, 128), variant(trace(None, None).program), 0.25)
    assert in_one_pass_or_two(problem, (), {}) == [False]
    assert in_one_pass_or_two(problem, (), {"AUTOTUNE": True}) == [False, True]
    assert in_one_pass_or_two(problem, (), {"AUTOTUNE": True, "ONE_PASS": True}) == [True]
    assert in_one_pass_or_two(problem, ("row",), {"AUTOTUNE": True}) == [False]
    assert in_one_pass_or_two(problem, ("column",), {"AUTOTUNE": True}) == [False, True]


@pytest.mark.parametrize(
    "D, options, expected",
    [(64, {}, True), (72, {}, True), (80, {}, True), (80, {"PIECES": False}, False), (96, {}, False), (128, {}, False)],
)
def test_one_pass_is_the_default_of_head_dimensions_whose_tiles_fit(
    D: int, options: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the columns that are multiplied: 80 are 64 and 16."""
    monkeypatch.setattr(one_pass, "interpreted", lambda: False)
    monkeypatch.setattr(one_pass, "_target", lambda device: Target("cuda", 90, 232448))
    with FakeTensorMode():
        q = torch.empty(1, 2, 256, D, dtype=torch.bfloat16, device="cuda:0")
    problem = Problem(q, q, q, [], [], [], (128, 128), variant(trace(None, None).program), 0.25)
    monkeypatch.setattr("flexattn.backends.products.interpreted", lambda: False)
    assert in_one_pass_or_two(problem, (), options) == [expected]
