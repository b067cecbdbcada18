"""Law 7 for the Triton kernels: under the interpreter they compute what the reference computes."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from laws import assert_backend_equals_reference
from strategies import Mod, Shape, mask_mods, score_mods, shapes

import flexattn
from flexattn import AuxRequest, BlockMask, create_block_mask, flex_attention
from flexattn.backends.kernel_lists import contiguous

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [16, 24, 64, 72, 80, 96, 128, 192, 256]
SLOPES = "score + slopes[h] * (kv_idx - q_idx)"
CAUSAL = Mod("b, h, q_idx, kv_idx", "(q_idx >= kv_idx)")


# Ways to the same results: by descriptors, values a tile late, queries as rows in the dK/dV pass, dQ in the same pass.
WAYS = [
    "", "USE_TMA=True", "OVERLAP=True,USE_TMA=True", "UPRIGHT=True", "ONE_PASS=True",
    "ONE_PASS=True,OVERLAP=True,UPRIGHT=True,USE_TMA=True",
]  # fmt: skip


def options(BLOCK_M: int = 32, BLOCK_N: int = 32, BLOCK_M1: int = 32, BLOCK_N1: int = 32, way: str = "") -> str:
    sizes = f"BLOCK_M={BLOCK_M},BLOCK_M1={BLOCK_M1},BLOCK_N={BLOCK_N},BLOCK_N1={BLOCK_N1}"
    if "ONE_PASS" not in way:  # which has no dQ pass
        sizes += f",BLOCK_M2={BLOCK_M},BLOCK_N2={BLOCK_N}"
    return f"{sizes},{way}"


tiles = st.builds(options, *[st.sampled_from([16, 32, 64])] * 4, st.sampled_from(WAYS))


@settings(max_examples=40)
@given(
    mod=st.one_of(st.none(), score_mods()),
    mask=st.one_of(st.none(), mask_mods()),
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    tiles=tiles,
    seed=st.integers(0, 1000),
)
def test_law_7_the_kernels_equal_the_reference(
    mod: Mod | None, mask: Mod | None, shape: Shape, dtype: torch.dtype, tiles: str, seed: int
) -> None:
    assert_backend_equals_reference("triton", mod, mask, shape, dtype, seed, tiles)


@st.composite
def kernel_shapes(draw: st.DrawFn) -> Shape:
    """What the kernels specialise on: head dimensions, groups of heads, and how the lengths end."""
    block = draw(st.sampled_from([16, 32, 64]))
    tail = st.sampled_from([0, 1, block - 1])
    whole = st.integers(0, 96 // block)
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 4), (4, 1), (2, 1)]))
    dim = st.sampled_from(HEAD_DIMS)
    L, S = (block * draw(whole) + draw(tail) for _ in range(2))
    return Shape(draw(st.integers(1, 2)), kv_heads, group, L, S, draw(dim), draw(dim), (block, block), False)


@settings(max_examples=30)
@given(
    mod=st.sampled_from([None, Mod("score, b, h, q_idx, kv_idx", SLOPES)]),
    mask=st.sampled_from([None, CAUSAL, Mod("b, h, q_idx, kv_idx", "(docs[q_idx] == docs[kv_idx])")]),
    shape=kernel_shapes(),
    dtype=st.sampled_from(DTYPES),
    tiles=tiles,
)
def test_head_dimensions_groups_and_tails(
    mod: Mod | None, mask: Mod | None, shape: Shape, dtype: torch.dtype, tiles: str
) -> None:
    assert_backend_equals_reference("triton", mod, mask, shape, dtype, 3, tiles)


@pytest.mark.parametrize(
    ("E", "way"), [*((E, "") for E in HEAD_DIMS), *((E, way) for E in (24, 192) for way in WAYS[1:])]
)
def test_every_head_dimension(E: int, way: str) -> None:
    shape = Shape(1, 1, 2, 33, 47, E, HEAD_DIMS[-1 - HEAD_DIMS.index(E)], (32, 32), False)
    assert_backend_equals_reference("triton", None, CAUSAL, shape, torch.float32, E, way)


@pytest.mark.parametrize("way", ["", "OVERLAP=True,UPRIGHT=True,USE_TMA=True"])
@pytest.mark.parametrize("size", [(6, 6), (20, 16), (16, 100), (100, 24), (1, 1), (7, 128), (1 << 20, 1 << 20)])
def test_blocks_of_any_size(size: tuple[int, int], way: str) -> None:
    """Blocks that no tile divides, blocks smaller than a tile, a block larger than the sequence."""
    L, S = (45, 61) if max(size) > 1 else (9, 11)
    shape = Shape(1, 2, 1, L, S, 8, 8, size, False)
    window = Mod("b, h, q_idx, kv_idx", "((q_idx - kv_idx < 20) & (kv_idx - q_idx < 9))")
    assert_backend_equals_reference(
        "triton", Mod("score, b, h, q_idx, kv_idx", SLOPES), window, shape, torch.float32, 1, way
    )


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-3, 7.0])
def test_any_scale(scale: float) -> None:
    q, k, v = (torch.randn(1, 1, 40, 16) for _ in range(3))
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 40, 40, BLOCK_SIZE=32)
    ours, exact = (flex_attention(q, k, v, block_mask=mask, scale=scale, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_keys_that_batch_entries_and_heads_share(way: str) -> None:
    per_batch = Mod("b, h, q_idx, kv_idx", "(kv_idx < 20 + 9 * b)")
    assert_backend_equals_reference(
        "triton", None, per_batch, Shape(2, 2, 2, 40, 50, 16, 16, (16, 16), True), torch.float32, 5, way
    )


def test_inputs_of_any_strides() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(2, 50, 3, 4, 24, generator=g)  # [B, L, 3, H, D], as a fused projection gives it
    q = base[:, :, 0].transpose(1, 2).requires_grad_()
    k = base[:, :, 1].transpose(1, 2)[:, ::2]
    v = (
        torch.randn(24, 2, 50, generator=g).permute(1, 2, 0)[:, None].expand(2, 2, 50, 24)
    )  # columns far apart, heads shared
    weight = torch.randn(2, 1, 1, 24, generator=g).expand(2, 4, 50, 24)
    results = []
    for backend in ("triton", "reference"):
        out = flex_attention(q, k, v, enable_gqa=True, backend=backend)
        results.append((out, *torch.autograd.grad(out, q, weight)))
    assert results[0][0].stride() == results[1][0].stride()
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((1, 1, 3, 65), (0, 0, 1, 1 << 25)), ((1, 1, 18, 16), (0, 0, 1 << 27, 1)),
     ((1, 1, 2100, 16), (0, 0, 1 << 20, 1)), ((1, 3, 4, 16), (0, 1 << 30, 16, 1)),
     ((3, 1, 4, 16), (1 << 30, 0, 16, 1))],
    ids=["columns", "rows", "tiles", "heads", "batch"],
)  # fmt: skip
def test_offsets_that_need_64_bits(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Keys far apart along one axis: the last of them is beyond 2**31 elements."""
    B, H, _, D = shape
    reach = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    assert reach >= 1 << 31
    memory = torch.empty(reach + 1, dtype=torch.float16)  # pages that are not touched are not in memory
    k = memory.as_strided(shape, stride)
    k.copy_(torch.randn(shape))
    q, v = torch.randn(B, H, 4, D, dtype=torch.float16), torch.randn(shape, dtype=torch.float16)
    results = []
    for backend in ("triton", "reference"):
        leaf = q.detach().requires_grad_()
        out = flex_attention(leaf, k, v, backend=backend)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaf)))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=3e-3, atol=3e-3)


def test_auxiliary_outputs_and_rows_that_attend_to_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 48, 16, requires_grad=True) for _ in range(3))
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: (kv_idx < 20) & (q_idx > 3), None, None, 48, 48, BLOCK_SIZE=16)
    out, aux = flex_attention(
        q, k, v, block_mask=mask, backend="triton", return_aux=AuxRequest(lse=True, max_scores=True)
    )
    assert aux.lse is not None and aux.max_scores is not None
    assert bool((out[:, :, :4] == 0).all()) and bool((aux.lse[:, :, :4] == -float("inf")).all())
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    assert bool((grads[0][:, :, :4] == 0).all()) and all(bool(torch.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_lengths(lengths: tuple[int, int], masked: bool) -> None:
    L, S = lengths
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (L, S, S))
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, L, S) if masked else None
    out = flex_attention(q, k, v, block_mask=mask, backend="triton")
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    assert out.shape == (1, 2, L, 8) and bool((out == 0).all())
    assert all(bool((g == 0).all()) for g in grads)


def test_nan_and_infinity_reach_the_rows_that_read_them_and_no_other() -> None:
    q, k, v = (torch.randn(1, 1, 40, 16) for _ in range(3))
    q[0, 0, 5], q[0, 0, 7] = float("nan"), float("inf")
    aux = AuxRequest(lse=True, max_scores=True)
    results = [flex_attention(q, k, v, backend=b, return_aux=aux) for b in ("triton", "reference")]
    for ours, exact in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_scores_that_are_infinite_are_the_largest() -> None:
    q, k, v = torch.zeros(1, 1, 20, 16), torch.ones(1, 1, 20, 16), torch.randn(1, 1, 20, 16)
    q[0, 0, 3], q[0, 0, 4] = float("inf"), -float("inf")
    aux = AuxRequest(lse=True, max_scores=True)
    ours, exact = (flex_attention(q, k, v, backend=b, return_aux=aux) for b in ("triton", "reference"))
    assert exact[1].max_scores is not None and exact[1].max_scores[0, 0, 3] == float("inf")
    for found, wanted in zip((ours[0], *ours[1]), (exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.parametrize("block", [16, 32])
def test_derivatives_that_are_nan_where_nothing_is_attended_to_never_leak(block: int) -> None:
    """Beyond the mask, and beyond the last query and the last key, where a tile computes all the same."""
    L, S = 21, 27
    leaves = [torch.randn(1, 2, n, 16, requires_grad=True) for n in (L, S, S)]
    gain, bias = torch.rand(2, requires_grad=True), torch.rand(L, requires_grad=True)

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        rest = torch.sqrt(L - q_idx) * torch.sqrt(S - kv_idx) / 25
        return score * torch.sqrt(q_idx - kv_idx + 1) + gain[h] * rest + bias[q_idx] * rest

    causal = create_block_mask(flexattn.masks.causal_mask, None, None, L, S, BLOCK_SIZE=block)
    results = []
    for backend in ("triton", "reference"):
        out = flex_attention(*leaves, mod, causal, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, gain, bias])])
    for ours, exact in zip(*results, strict=True):
        assert bool(exact.isfinite().all())
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_lists_are_followed_where_the_mask_function_says_otherwise() -> None:
    """A full block is not masked, a block that is not listed not attended, and lists need not be sorted."""
    count = torch.tensor([[[1, 2, 0]]], dtype=torch.int32)
    index = torch.tensor([[[[2, 9, 9], [1, 0, 9], [9, 9, 9]]]], dtype=torch.int32)
    full_count = torch.tensor([[[2, 1, 3]]], dtype=torch.int32)
    full_index = torch.tensor([[[[1, 0, 9], [2, 9, 9], [2, 0, 1]]]], dtype=torch.int32)
    never = BlockMask.from_kv_blocks(
        count, index.clamp(max=2), full_count, full_index.clamp(max=2), 16,
        lambda b, h, q_idx, kv_idx: q_idx > kv_idx + 10, (48, 41),
    )  # fmt: skip
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for n in (48, 41, 41))
    results = []
    for backend in ("triton", "reference"):
        out = flex_attention(q, k, v, block_mask=never, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), [q, k, v])))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_lists_that_are_written_to_are_read_anew() -> None:
    q, k, v = (torch.randn(1, 1, 32, 16, requires_grad=True) for _ in range(3))
    mask = create_block_mask(flexattn.masks.causal_mask, None, None, 32, 32, BLOCK_SIZE=16)

    def gradient(backend: str) -> torch.Tensor:
        out = flex_attention(q, k, v, block_mask=mask, backend=backend)
        return torch.autograd.grad(out.square().sum(), k)[0]

    before = gradient("triton")
    assert mask.full_kv_num_blocks is not None
    mask.full_kv_num_blocks.zero_()
    assert not torch.allclose(gradient("triton"), before)
    torch.testing.assert_close(gradient("triton"), gradient("reference"), rtol=1e-5, atol=1e-5)


def test_options_never_change_a_result_beyond_rounding() -> None:
    q, k, v = (torch.randn(1, 2, 150, 16, requires_grad=True) for _ in range(3))
    # Lists of adjacent blocks, partial ones and full ones that do not begin at the first block; and others.
    partial = create_block_mask(lambda b, h, q, k: (q - k).abs() < 24, None, None, 150, 150, BLOCK_SIZE=32)
    full = create_block_mask(lambda b, h, q, k: (q // 32 - k // 32).abs() < 2, None, None, 150, 150, BLOCK_SIZE=32)

    def ends(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        edge = (kv_idx < 32) | (q_idx < 32) | (kv_idx >= 128) | (q_idx >= 128)
        return edge | ((q_idx - kv_idx).abs() < 20)

    gapped = create_block_mask(ends, None, None, 150, 150, BLOCK_SIZE=32)
    adjacent, small = {"BLOCKS_ARE_CONTIGUOUS": True}, {f"BLOCK_{x}{i}": 16 for x in "MN" for i in ("", 1, 2)}
    for mask, is_so in ((partial, True), (full, True), (gapped, False)):
        lists = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
        assert [contiguous(lists, 5, by_key) for by_key in (False, True)] == [is_so] * 2
        exact = flex_attention(q, k, v, block_mask=mask, backend="reference")
        wanted = torch.autograd.grad(exact.square().sum(), [q, k, v])
        for chosen in (adjacent, adjacent | small, {"BLOCK_M": 16, "BLOCK_N": 32}, {"PRESCALE_QK": True}):
            out = flex_attention(q, k, v, block_mask=mask, kernel_options=chosen, backend="triton")
            torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
            for ours, grad in zip(torch.autograd.grad(out.square().sum(), [q, k, v]), wanted, strict=True):
                torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-5)
