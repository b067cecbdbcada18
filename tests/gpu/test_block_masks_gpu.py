"""Block masks on a GPU: lists of every kind and block size, rows without a key, and what masked elements may hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu.cases import DEVICE, Case, Mod, assert_results, assert_right, qkv
from torch import Tensor

from flexattn import AuxRequest, BlockMask, and_masks, create_block_mask, flex_attention, masks

B, H, LENGTH = 2, 4, 515


def scattered(size: tuple[int, int], full: bool) -> tuple[BlockMask, Mod]:
    """A block mask with other lists for each batch entry and head, in random order, and its meaning by element."""
    rows, columns = (-(-LENGTH // n) for n in size)
    kind = torch.randint(0, 3, (B, H, rows, columns), device=DEVICE)  # empty, partial, full
    kind[:, :, 1] = 0  # rows of blocks that attend to nothing
    mask = lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 3 != 0

    def listed(which: int) -> tuple[Tensor, Tensor]:
        chosen = kind == which
        # Listed blocks first, shuffled; what lies past the count means nothing and is no valid block.
        order = torch.argsort(chosen + torch.rand(chosen.shape, device=DEVICE) / 2, dim=-1, descending=True)
        count = chosen.sum(-1, dtype=torch.int32)
        past = torch.arange(columns, device=DEVICE) >= count.unsqueeze(-1)
        return count, order.masked_fill(past, 2**30).to(torch.int32)

    made = BlockMask.from_kv_blocks(
        *listed(1), *(listed(2) if full else ()), BLOCK_SIZE=size, mask_mod=mask, seq_lengths=(LENGTH, LENGTH)
    )

    def meaning(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        block = kind[b, h, q_idx // size[0], kv_idx // size[1]]
        partial = (block == 1) & mask(b, h, q_idx, kv_idx)
        return partial | (block == 2) if full else partial

    return made, meaning


@pytest.mark.parametrize("full", [True, False], ids=["full blocks", "partial blocks only"])
def test_lists_are_followed_in_any_order_and_differ_by_batch_and_head(full: bool) -> None:
    block_mask, meaning = scattered((128, 128), full)
    assert_right(Case(*qkv(B, H, L=LENGTH), mask=meaning, block_mask=block_mask))


@pytest.mark.parametrize("size", [(64, 256), (32, 16), (100, 40)], ids=str)
def test_blocks_of_any_size_are_right(size: tuple[int, int]) -> None:
    block_mask, meaning = scattered(size, True)
    assert_right(Case(*qkv(B, H, 2, L=LENGTH), mask=meaning, block_mask=block_mask))


def test_a_mask_made_for_each_batch_entry_and_head_is_right() -> None:
    ids = (torch.rand(B, LENGTH, device=DEVICE) < 0.01).cumsum(-1)
    reach = torch.tensor([30, 100, 300, 515], device=DEVICE)
    window = lambda b, h, q_idx, kv_idx: q_idx - kv_idx < reach[h]
    mask = and_masks(masks.document_mask(ids), masks.causal_mask, window)
    block_mask = create_block_mask(mask, B, H, LENGTH, LENGTH, DEVICE)
    assert block_mask.kv_num_blocks.shape[:2] == (B, H)
    assert_right(Case(*qkv(B, H, L=LENGTH), mask=mask, block_mask=block_mask))


def test_a_slice_of_a_block_mask_is_right() -> None:
    mask = masks.sliding_window(200)
    block_mask = create_block_mask(mask, None, None, LENGTH, LENGTH, DEVICE)[:, :, 2:]
    q, k, v = qkv(B, H, L=LENGTH)
    shifted = lambda b, h, q_idx, kv_idx: mask(b, h, q_idx + 256, kv_idx)
    assert_right(Case(q[:, :, 256:], k, v, mask=shifted, block_mask=block_mask))


def test_a_row_that_attends_to_nothing_is_zero_with_zero_gradients() -> None:
    def later_half(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= 200) & (kv_idx < 200) & (h != 2)

    case = Case(*qkv(B, H, L=LENGTH), mask=later_half)
    results = case.run()
    for t in (results["out"], results["dq"]):
        assert not t[:, :, :200].any() and not t[:, 2].any()
    for t in (results["lse"], results["max_scores"]):
        assert (t[:, :, :200] == -math.inf).all() and (t[:, 2] == -math.inf).all()
    for t in (results["dk"], results["dv"]):
        assert not t[:, :, 200:].any() and not t[:, 2].any()
    assert_results(case, results)


def test_nothing_attended_at_all_is_zero() -> None:
    results = Case(*qkv(B, H, L=LENGTH), mask=lambda b, h, q_idx, kv_idx: q_idx < kv_idx - LENGTH).run()
    assert (results.pop("lse") == -math.inf).all() and (results.pop("max_scores") == -math.inf).all()
    assert {name: bool(t.any()) for name, t in results.items()} == dict.fromkeys(("out", "dq", "dk", "dv"), False)


def test_scores_of_minus_infinity_are_as_if_masked() -> None:
    def hidden(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where((q_idx >= kv_idx) & (q_idx >= 70), score, -math.inf)

    case = Case(*qkv(B, H, L=LENGTH), score=lambda: hidden)
    results = case.run()
    assert not results["out"][:, :, :70].any() and not results["dq"][:, :, :70].any()
    masked = Case(case.query, case.key, case.value, mask=lambda b, h, i, j: (i >= j) & (i >= 70))
    masked.dout, masked.dlse = case.dout, case.dlse
    assert_results(masked, results)


def test_nan_in_masked_places_of_a_captured_tensor_does_not_leak() -> None:
    lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).tril()
    bias = torch.randn(LENGTH, LENGTH, device=DEVICE).masked_fill(~lower, math.nan).requires_grad_()
    leaves = [t.requires_grad_() for t in qkv(1, 2, L=LENGTH)]
    mod = lambda score, b, h, q_idx, kv_idx: score * bias[q_idx, kv_idx].exp() + bias[q_idx, kv_idx]
    out = flex_attention(*leaves, mod, mask_mod=masks.causal_mask)
    grads = torch.autograd.grad(out.float().square().sum(), [*leaves, bias])
    assert all(t.isfinite().all() for t in (out, *grads))
    assert not grads[3][~lower].any() and grads[3][lower].any()


def test_nan_and_infinity_reach_the_rows_that_read_them_and_no_other() -> None:
    q, k, v = (t.float() for t in qkv(1, 2, L=LENGTH))
    q[0, 0, 5], q[0, 0, 7, 0], q[0, 1, 9, 3] = math.nan, math.inf, -math.inf
    mask = create_block_mask(masks.causal_mask, None, None, LENGTH, LENGTH, DEVICE)
    aux = AuxRequest(lse=True, max_scores=True)
    results = [flex_attention(q, k, v, block_mask=mask, backend=b, return_aux=aux) for b in ("triton", "reference")]
    for ours, exact in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_nan_passes_through_the_maximum_of_a_mod() -> None:
    q, k, v = (t.float() for t in qkv(1, 2, L=LENGTH))
    least = torch.zeros(LENGTH, device=DEVICE)
    least[5] = math.nan

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.maximum(score, least[q_idx])

    ours, exact = (flex_attention(q, k, v, mod, backend=b) for b in ("triton", "reference"))
    assert bool(ours[:, :, 5].isnan().all())
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_keys_of_blocks_that_are_not_listed_are_never_read() -> None:
    q, k, v = qkv(1, 2, L=512)
    mask = create_block_mask(masks.causal_mask, None, None, 512, 512, DEVICE)
    k[:, :, 384:] = v[:, :, 384:] = math.nan  # the last of four key blocks
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = flex_attention(*leaves, block_mask=mask)
    assert out[:, :, :384].isfinite().all() and not out[:, :, 384:].isfinite().all()
    (dq,) = torch.autograd.grad(out[:, :, :384].float().square().sum(), q)
    assert dq[:, :, :384].isfinite().all()


IDS = torch.arange(2000) // 137
NAMES = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
SCATTERED = torch.randint(0, 9, (2000,), generator=torch.Generator().manual_seed(0))
NOISE = torch.rand(2000, 2000, generator=torch.Generator().manual_seed(0)) > 0.001
BUILT = [
    *(masks.causal_mask, masks.causal(-40), masks.sliding_window(300), masks.window(100, 30), masks.chunked(333)),
    *(masks.prefix_lm(torch.tensor([100, 1200])), masks.document_mask(IDS), masks.document_mask(NAMES[IDS])),
    *(
        masks.document_mask(SCATTERED),
        masks.transfusion(torch.where(IDS % 3 == 0, IDS, -1)),
        masks.natten_2d(40, 50, 7),
    ),
    *(and_masks(masks.causal_mask, masks.document_mask(IDS)), masks.dilated(20, 7), masks.streaming(5, 200)),
]


class Noise(masks.document_mask):
    """A dense boolean mask: nothing but its elements tells of it."""

    def __post_init__(self) -> None:
        pass

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.document_ids[q_idx, kv_idx]


@pytest.mark.parametrize("mask", [*BUILT, Noise(NOISE)], ids=range(len(BUILT) + 1))
@pytest.mark.parametrize("block", [128, (64, 32)])
def test_masks_built_on_the_gpu_have_the_lists_of_the_cpu(mask: Any, block: Any) -> None:
    here = create_block_mask(mask, 2, None, 2000, 2000, "cpu", block)
    moved = mask.to(DEVICE) if hasattr(mask, "to") else mask
    there = create_block_mask(moved, 2, None, 2000, 2000, DEVICE, block)
    assert there.device.type == torch.device(DEVICE).type and there.contiguous == here.contiguous
    for ours, theirs in zip(here.kv_lists(), there.kv_lists(), strict=True):
        assert torch.equal(ours, theirs.cpu())


def test_a_mask_is_not_built_while_a_graph_is_captured() -> None:
    create_block_mask(masks.causal_mask, None, None, 256, 256, DEVICE)
    with pytest.raises(RuntimeError, match="before the graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        create_block_mask(masks.causal_mask, None, None, 256, 256, DEVICE)
