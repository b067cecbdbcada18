"""The kernels keep documents apart to the last bit, forward and backward."""

from __future__ import annotations

import pytest
import torch

from flexattn import and_masks, flex_attention, masks
from flexattn.testing import assert_causal, assert_no_leak

ids = torch.tensor([0] * 9 + [1] * 14 + [-1] * 3)


def test_documents_are_kept_apart_by_the_kernels() -> None:
    mask = and_masks(masks.document_mask(ids), masks.causal_mask)
    assert_no_leak(mask, ids, backend="triton", heads=1, max_documents=2)


def test_a_lost_mask_leaks_through_the_kernels() -> None:
    lost = lambda q, k, v: flex_attention(q, k, v, mask_mod=masks.causal_mask, backend="triton")
    with pytest.raises(AssertionError, match="document 0 of b=0 leaks into document 1 of b=0"):
        assert_no_leak(masks.document_mask(ids), ids, attention=lost, heads=1)


def test_the_kernels_are_causal() -> None:
    assert_causal(attention=lambda q, k, v: flex_attention(q, k, v, mask_mod=masks.causal_mask, backend="triton"), shape=20)
