"""The Triton kernels give a document the same bits alone, packed and in batches; the CPU's tests say what that means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexattn import Documents, flex_attention, masks
from flexattn.testing import Sizes, assert_batch_invariant

SHAPE = Sizes(Hq=2, Hkv=1, E=16, Ev=16)
SLOPES = torch.tensor([0.5, 0.25])
# Large tiles, since the interpreter's time is that of their number.
TILES = {name: 64 for name in ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")}


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + SLOPES[h] * (kv_idx - q_idx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_document_gets_the_same_bits_wherever_it_stands(dtype: torch.dtype) -> None:
    packed = Documents.from_lengths([3, 140])
    options = {"shape": SHAPE, "dtype": dtype, "backend": "triton", "kernel_options": TILES}
    assert_batch_invariant(alibi, masks.causal_mask, packed, **options)


def test_without_the_option_bits_differ() -> None:
    packed = Documents.from_lengths([40, 30])
    options = {"shape": SHAPE, "backend": "triton", "kernel_options": TILES | {"BLOCK_M": 32, "BLOCK_N": 32}}
    with pytest.raises(AssertionError, match="pass batch_invariant=documents"):
        assert_batch_invariant(None, None, packed, batch_invariant=False, **options)


def test_lengths_that_differ_and_a_dense_bias_learned_for_all_entries() -> None:
    """The gradient of such a bias has another way for one entry than for two, which must not show in dQ."""
    q, k, v, dout = (torch.randn(2, 2, n, 16) for n in (20, 40, 40, 20))
    found = []
    for batch in (slice(0, 2), slice(0, 1)):
        leaves = [t[batch].clone().requires_grad_() for t in (q, k, v)]
        bias = torch.linspace(-1, 1, 1600).view(2, 20, 40).requires_grad_()
        out = flex_attention(
            *leaves,
            lambda s, b, h, q, kv, t=bias: s + t[h, q, kv],
            backend="triton",
            batch_invariant=True,
            kernel_options=TILES,
        )
        found.append([out, *torch.autograd.grad(out, leaves, dout[batch])])
    for together, alone in zip(*found, strict=True):
        assert torch.equal(together[:1].view(torch.int32), alone.view(torch.int32))
