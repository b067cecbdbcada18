"""score_mods that are no plain functions: the identity, and a module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexattn import TraceError, create_mask, flex_attention, mods
from flexattn.backends.tiled import additive_bias
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace


def test_the_identity_changes_no_score() -> None:
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    torch.testing.assert_close(flex_attention(q, k, v, mods.identity), flex_attention(q, k, v), rtol=0, atol=0)


def test_composing_nothing_is_the_identity() -> None:
    assert mods.compose() is mods.identity
    assert torch.equal(create_mask(mods.compose(), None, None, 2, 2, "cpu"), torch.zeros(1, 1, 2, 2))


class Unreduced(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(2, 3))

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + self.table[h]


def test_an_error_of_a_module_names_the_line_of_its_forward() -> None:
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(TraceError, match=rf"`Unreduced` at test_mods.py:{Unreduced.forward.__code__.co_firstlineno}"):
        flex_attention(q, q, q, Unreduced())


def test_a_detached_value_outlives_what_it_was_made_of() -> None:
    """Of tiles large enough that their memory is used again."""
    q, k, v = (torch.randn(1, 1, 300, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        grown = torch.exp(score * 0.1)
        return grown.detach() * torch.cos(score * 5) + torch.sin(score * 7)

    results = []
    for backend in ("tiled", "reference"):
        out = flex_attention(q, k, v, mod, backend=backend)
        results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_bias_may_be_added_on_either_side_or_subtracted() -> None:
    slopes = torch.tensor([0.5, 0.25])
    added = lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)
    before = lambda score, b, h, q_idx, kv_idx: slopes[h] * (kv_idx - q_idx) + score
    taken = lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx)
    turned = lambda score, b, h, q_idx, kv_idx: slopes[h] * (q_idx - kv_idx) - score
    assert [additive_bias(variant(trace(m, None).program)) is None for m in (added, before, taken, turned)] == [
        *(False, False, False, True)
    ]
    q, k, v = (torch.randn(1, 2, 50, 8) for _ in range(3))
    assert torch.equal(flex_attention(q, k, v, taken), flex_attention(q, k, v, added))
