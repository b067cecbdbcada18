"""The Triton kernels give a document the same bits alone, packed and in batches; the CPU's tests say what that means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexattn import Documents, flex_attention, masks
from flexattn.backends import work_order
from flexattn.testing import Sizes, assert_batch_invariant

SHAPE = Sizes(Hq=2, Hkv=1, E=16, Ev=16)
SLOPES = torch.tensor([0.5, 0.25])
# Large tiles, since the interpreter's time is that of their number.
TILES = {name: 128 for name in ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")}


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


@pytest.mark.parametrize("option", [False, True])
def test_the_heads_of_a_group_are_divided_among_programs_by_the_batch_only_without_the_option(
    option: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_order, "USUAL", work_order.Device(1, 1 << 20))  # busy with two programs
    work_order.device.cache_clear()
    q, k, v, dout = (torch.randn(2, heads, 40, 16) for heads in (8, 1, 1, 8))
    found = []
    for batch in (slice(0, 2), slice(0, 1)):
        leaves = [t[batch].clone().requires_grad_() for t in (q, k, v)]
        said = {"batch_invariant": option, "backend": "triton", "kernel_options": TILES, "enable_gqa": True}
        out = flex_attention(*leaves, **said)
        found.append(torch.autograd.grad(out, leaves, dout[batch])[1])
    work_order.device.cache_clear()
    together, alone = found
    assert torch.equal(together[:1].view(torch.int32), alone.view(torch.int32)) is option
