"""Tiles that reach beyond the end: nothing there is read as a number, and nothing there is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn import create_block_mask, flex_attention


def everything(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx > kv_idx - 1000


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("block, L", [(256, 257), (512, 257), (384, 400)])
def test_a_block_that_reaches_far_beyond_the_end_adds_nothing_to_other_heads(block: int, L: int, tile: int) -> None:
    """What a backward in one pass adds to dQ stays in its head: here the first has keys that are nan."""
    block_mask = create_block_mask(everything, None, None, L, 32, BLOCK_SIZE=(block, 32))
    q, k, v = (torch.randn(1, 2, n, 16) for n in (L, 32, 32))
    k[0, 0, 3] = torch.nan
    q.requires_grad_()

    def gradient(in_one_pass: bool) -> Tensor:
        options = {"ONE_PASS": in_one_pass, "BLOCK_M1": tile}
        out = flex_attention(q, k, v, None, block_mask, kernel_options=options, backend="triton")
        return torch.autograd.grad(out.sum(), q)[0]

    found, expected = gradient(True), gradient(False)
    assert expected[0, 0].isnan().all() and expected[0, 1].isfinite().all()
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("listed", [False, True])
def test_values_that_are_added_late_are_bounded_in_tiles_as_large_as_a_copy(listed: bool) -> None:
    S = 600
    q, k, v = (torch.randn(1, 2, n, 16) for n in (20, S, S))
    block_mask = create_block_mask(lambda b, h, i, j: i * 40 >= j, None, None, 20, S, BLOCK_SIZE=(16, 512))
    memory = torch.full((2 * S * 16 + 3 * 512 * 16,), torch.nan)  # what a read beyond the end gives
    within = memory[: 2 * S * 16].view_as(v).copy_(v)
    options = {"USE_TMA": True, "OVERLAP": True, "BLOCK_N": 256}
    arguments = q, k, within, None, block_mask if listed else None
    found = flex_attention(*arguments, kernel_options=options, backend="triton")
    torch.testing.assert_close(found, flex_attention(*arguments, backend="reference"))
