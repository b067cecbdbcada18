"""The identity among the score_mods."""

from __future__ import annotations

import torch

from flexattn import create_mask, flex_attention, mods


def test_the_identity_changes_no_score() -> None:
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    torch.testing.assert_close(flex_attention(q, k, v, mods.identity), flex_attention(q, k, v), rtol=0, atol=0)


def test_composing_nothing_is_the_identity() -> None:
    assert mods.compose() is mods.identity
    assert torch.equal(create_mask(mods.compose(), None, None, 2, 2, "cpu"), torch.zeros(1, 1, 2, 2))
