"""Every pair of a query and a key is visited exactly once or never, and nothing else of memory is read or left unwritten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from torch import Tensor

from flexattn.backends.collection import Collection
from flexattn.backends.launch import launch
from flexattn.backends.triton import Backward, Forward, dkdv_call, dq_call, forward_call
from flexattn.block_lists import dense
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.config import fitted
from flexattn.problem import Problem


@triton.jit
def count_visits(score, b, h, q_idx, kv_idx, captured):
    """A score_mod that counts how often each element is asked for."""
    L, S, H = captured[1], captured[2], captured[3]
    at = ((b * H + h) * L + q_idx) * S + kv_idx
    inside = (q_idx < L) & (kv_idx < S) & (score == score)
    tl.atomic_add(captured[0] + at, tl.full(score.shape, 1, tl.int32), mask=inside, sem="relaxed")
    return score


def block_mask_of(classes: Tensor, ragged_entry: int) -> list[Tensor]:
    """Lists of a class map [B, H, rows, columns], 1 partial and 2 full; what lies past a row's count is `ragged_entry`."""
    lists = []
    for kind in (1, 2):
        listed = (classes == kind).int()
        count = listed.sum(-1, dtype=torch.int32)
        index = torch.argsort(listed, dim=-1, descending=True, stable=True).int()
        used = torch.arange(index.shape[-1]) < count.unsqueeze(-1)
        lists += [count, torch.where(used, index, ragged_entry).int()]
    return lists


@settings(max_examples=40)
@given(
    which=st.sampled_from(["forward", "dq", "dkdv"]),
    L=st.integers(1, 100),
    S=st.integers(1, 100),
    block=st.tuples(
        *[st.sampled_from([16, 32, 48, 64])] * 2
    ),  # sizes that a tile divides: no element is asked for in vain
    sizes=st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32])),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    per_head=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_pair_of_a_listed_block_is_visited_once_and_no_other_pair(
    which: str,
    L: int,
    S: int,
    block: tuple[int, int],
    sizes: tuple[int, int],
    heads: tuple[int, int],
    per_head: bool,
    masked: bool,
    seed: int,
) -> None:
    B, (H, Hkv) = 2, heads
    g = torch.Generator().manual_seed(seed)
    grid = (-(-L // block[0]), -(-S // block[1]))
    classes = torch.randint(0, 3, (B if per_head else 1, H if per_head else 1, *grid), generator=g)
    listed = dense_of(classes, B, H, L, S, block)
    counts = visits(which, B, H, Hkv, L, S, block_mask_of(classes, 1 << 29), block, sizes, masked)
    assert torch.equal(counts, listed.int()), which


@pytest.mark.parametrize("which", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (32, 64), (33, 31), (64, 65)])
def test_without_lists_each_pair_is_visited_once(which: str, masked: bool, lengths: tuple[int, int]) -> None:
    counts = visits(which, 2, 2, 1, *lengths, [], (128, 128), (16, 32), masked)
    assert bool((counts == 1).all())


def dense_of(classes: Tensor, B: int, H: int, L: int, S: int, block: tuple[int, int]) -> Tensor:
    elements = (classes > 0).repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :L, :S]
    return elements.expand(B, H, L, S)


def visits(
    which: str, B: int, H: int, Hkv: int, L: int, S: int, lists: Sequence[Tensor], block: tuple[int, int],
    sizes: tuple[int, int], masked: bool,
) -> Tensor:  # fmt: skip
    """How often a kernel asked for the score of each element, [B, H, L, S]."""
    v = variant(trace(None, (lambda b, h, q_idx, kv_idx: q_idx >= kv_idx) if masked else None).program)
    q, k = torch.randn(B, H, L, 16), torch.randn(B, Hkv, S, 16)
    problem = Problem(q, k, torch.randn(B, Hkv, S, 16), [], lists, [], block, v, 0.3)
    names = {"forward": ("BLOCK_M", "BLOCK_N"), "dkdv": ("BLOCK_M1", "BLOCK_N1"), "dq": ("BLOCK_M2", "BLOCK_N2")}[which]
    options = dict(zip(names, map(fitted, sizes, block) if lists else sizes, strict=True))
    row = torch.zeros(B, H, L)
    gradients = Backward(torch.empty_like(q), torch.empty_like(k), torch.empty_like(k), [])
    nothing = Collection(problem, [])
    call = {
        "forward": lambda: forward_call(problem, Forward(torch.empty_like(q), row, row.clone()), options),
        "dq": lambda: dq_call(problem, q, row, row, gradients, nothing, options),
        "dkdv": lambda: dkdv_call(problem, q, row, row, gradients, nothing, options),
    }[which]()
    counts = torch.zeros(B, H, L, S, dtype=torch.int32)
    counting = {"score_mod": count_visits, "captured": (counts, L, S, H)}
    launch(call._replace(arguments=call.arguments | counting))
    return counts


# ---- memory that is not the problem's is never read, memory that is the result's is always written


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(3).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def surrounded_by_nan(*shape: int) -> Tensor:
    """A random tensor whose neighbours in memory, rows and columns alike, are nan."""
    memory = torch.full((*shape[:2], shape[2] + 70, shape[3] + 9), float("nan"))
    inside = memory[:, :, 33 : 33 + shape[2], 4 : 4 + shape[3]]
    inside.copy_(torch.randn(*shape))
    return inside.detach().requires_grad_()


@pytest.mark.parametrize("lengths", [(40, 50), (64, 64), (33, 65)])
def test_nan_around_the_operands_and_in_blocks_that_are_not_listed_never_leaks(lengths: tuple[int, int]) -> None:
    from flexattn import AuxRequest, BlockMask, flex_attention

    L, S = lengths
    q, k, v = surrounded_by_nan(1, 2, L, 20), surrounded_by_nan(1, 1, S, 20), surrounded_by_nan(1, 1, S, 12)
    with torch.no_grad():
        k[:, :, 16:32] = v[:, :, 16:32] = float("nan")  # key block 1, which nobody attends to
    rows, columns = -(-L // 16), -(-S // 16)
    classes = torch.randint(1, 3, (1, 1, rows, columns))
    classes[..., 1] = 0
    bias = torch.randn(S, requires_grad=True)
    hidden = torch.arange(S) % 5 == 0
    with torch.no_grad():
        bias[hidden] = float("nan")  # masked, where the mask decides
    lists = block_mask_of(torch.where(classes > 0, 1, 0), 1 << 29)
    mask = BlockMask((L, S), *lists, (16, 16), lambda b, h, q_idx, kv_idx: ~hidden[kv_idx])
    aux = AuxRequest(lse=True, max_scores=True)
    results = []
    with uninitialised_memory_is_nan():
        for backend in ("triton", "tiled"):
            clean = [q, k, v] if backend == "triton" else [t.detach().nan_to_num().requires_grad_() for t in (q, k, v)]
            out, more = flex_attention(
                *clean, lambda s, b, h, q_idx, kv_idx: s + bias[kv_idx], mask, enable_gqa=True, return_aux=aux,
                backend=backend,
            )  # fmt: skip
            assert more.lse is not None and more.max_scores is not None
            grads = torch.autograd.grad([out, more.lse], [*clean, bias], [torch.ones_like(out), torch.ones(1, 2, L)])
            results.append([out, more.lse, more.max_scores, *grads])
    for ours, exact in zip(*results, strict=True):
        assert not bool(ours.isnan().any())
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_the_transposed_lists_are_those_of_the_dense_mask() -> None:
    from flexattn.backends.kernel_lists import by_key

    classes = torch.randint(0, 3, (2, 3, 5, 7))
    made = by_key(block_mask_of(classes, 1 << 29), 7)
    for kind, (count, index) in zip(
        (1, 2), ((made.partial_count, made.partial_index), (made.full_count, made.full_index)), strict=True
    ):
        assert torch.equal(dense(count, index, 5), (classes == kind).mT)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("lengths", [(96, 96), (64, 96), (96, 160)])
def test_a_full_last_block_that_ends_with_a_tile_has_no_tile_beyond_the_end(
    lengths: tuple[int, int], descending: bool
) -> None:
    """Blocks of 64 in tiles of 32: half of the last block does not exist."""
    from flexattn import BlockMask, flex_attention

    L, S = lengths
    q, k, v = surrounded_by_nan(1, 2, L, 16), surrounded_by_nan(1, 2, S, 16), surrounded_by_nan(1, 2, S, 16)
    bias, table = torch.randn(L, S, requires_grad=True), torch.randn(L + S, requires_grad=True)
    rows, columns = -(-L // 64), -(-S // 64)
    index = torch.arange(columns - 1, -1, -1) if descending else torch.arange(columns)
    index = index.int().expand(1, 1, rows, columns).contiguous()
    count = torch.full((1, 1, rows), columns, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(count * 0, index, count, index, 64, None, (L, S))
    results = []
    for backend in ("triton", "reference"):
        out = flex_attention(q, k, v, lambda s, b, h, i, j: s + bias[i, j] + table[i - j + S], mask, backend=backend)
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v, bias, table))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
