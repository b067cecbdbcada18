"""On a GPU: what a document gets is the same, to the bit, alone, packed in any way, and in any batch."""

from __future__ import annotations

import pytest
import torch
from gpu.cases import DEVICE
from torch import Tensor

from flexattn import Documents, flex_attention, masks, mods
from flexattn.testing import Sizes, assert_batch_invariant

PACKED = Documents.from_lengths([1, 700, 128, 37, 1500, 129])
VARIANTS = {
    "bidirectional": (None, None),
    "causal": (None, masks.causal_mask),
    "window, softcap": (mods.softcap(20.0), masks.sliding_window(300)),
}


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_gets_the_same_bits_wherever_it_stands(variant: str, dtype: torch.dtype, head_dim: int) -> None:
    shape = Sizes(Hq=8, Hkv=2, E=head_dim, Ev=head_dim)
    assert_batch_invariant(*VARIANTS[variant], PACKED, shape=shape, dtype=dtype, device=DEVICE, backend="triton")


def test_slopes_that_learn(head_dim: int = 64) -> None:
    slopes = torch.linspace(0.01, 0.5, 8, device=DEVICE, requires_grad=True)

    def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx)

    shape = Sizes(Hq=8, Hkv=8, E=head_dim, Ev=head_dim)
    assert_batch_invariant(alibi, masks.causal_mask, PACKED, shape=shape, dtype=torch.bfloat16, device=DEVICE)


def test_without_the_option_bits_differ() -> None:
    with pytest.raises(AssertionError, match="pass batch_invariant=documents"):
        assert_batch_invariant(None, None, PACKED, dtype=torch.bfloat16, device=DEVICE, batch_invariant=False)


def test_compiled_calls_have_the_bits_of_eager_ones() -> None:
    packed = PACKED.to(DEVICE)
    assert packed.aligned.moved
    q, k, v = (torch.randn(2, 4, 2495, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, mask_mod=masks.causal_mask, batch_invariant=packed)

    compiled = torch.compile(attend, fullgraph=True)
    assert torch.equal(compiled(q, k, v).view(torch.int16), attend(q, k, v).view(torch.int16))
