"""`assert_matches_reference` on the Triton kernels, and faults planted in them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from flexattn.backends import triton
from flexattn.testing import Sizes, assert_matches_reference

SHAPE = Sizes(B=1, Hq=4, Hkv=2, L=40, S=50, E=16, Ev=16)
TILES = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_M1": 32, "BLOCK_N1": 32, "BLOCK_M2": 32, "BLOCK_N2": 32}
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], requires_grad=True)


def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 5 * torch.tanh(score / 5) + SLOPES[h] * (kv_idx - q_idx)


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx - 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_kernels_match_their_definition(dtype: torch.dtype) -> None:
    assert_matches_reference(capped, causal, shape=SHAPE, dtype=dtype, backend="triton", kernel_options=TILES)


def test_a_normalizer_sends_its_gradient_through_lse() -> None:
    def sink(out: Tensor, lse: Tensor) -> Tensor:
        return out * torch.sigmoid(lse).unsqueeze(-1)

    assert_matches_reference(capped, causal, shape=SHAPE, backend="triton", kernel_options=TILES, normalizer=sink)


def test_a_backward_that_forgets_the_gradient_of_lse() -> None:
    backward = triton.backward

    def forgets(problem: Any, out: Tensor, lse: Tensor, dout: Tensor, dlse: Any, *rest: Any) -> Any:
        return backward(problem, out, lse, dout, None, *rest)

    with patch.object(triton, "backward", forgets), pytest.raises(AssertionError) as failure:
        assert_matches_reference(capped, shape=Sizes(1, 1, 1, 3, 4, 16, 16), backend="triton", kernel_options=TILES)
    text = str(failure.value)
    assert "dq is wrong" in text and "backend='triton'" in text and "kernel_options={'BLOCK_M': 32" in text
    assert "right: out, lse, max_scores, dv" in text
