"""A mod with a gradient of its own is refused: the derivative is generated from its operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexattn
from flexattn.codegen.errors import TraceError
from flexattn.codegen.trace import trace


class Clamped(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Reversed(torch.autograd.Function):
    """A gradient reversal, whose forward records no operation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


class Apart(torch.autograd.Function):
    """As transforms of torch.func want it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * grad


slopes = torch.ones(4, requires_grad=True)


def partly(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    with torch.no_grad():
        double = 2 * score
    return score + double


@torch.no_grad()
def wholly(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 2 * score


MODS = {
    "straight through": lambda score, b, h, q_idx, kv_idx: Clamped.apply(score),
    "reversal": lambda score, b, h, q_idx, kv_idx: Reversed.apply(score),
    "of a sum": lambda score, b, h, q_idx, kv_idx: Reversed.apply(score + q_idx),
    "of what was read": lambda score, b, h, q_idx, kv_idx: score + Reversed.apply(slopes[h]),
    "with a context apart": lambda score, b, h, q_idx, kv_idx: Apart.apply(score),
    "no_grad inside": partly,
    "no_grad around": wholly,
}


@pytest.mark.parametrize("name", MODS)
def test_a_gradient_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(TraceError, match=r"gradients are off|applies a torch.autograd.Function") as raised:
        trace(MODS[name], None)
    assert "detach()" in str(raised.value) and "test_own_gradients.py" in str(raised.value)


def test_the_callers_no_grad_is_no_concern_of_the_mod() -> None:
    query = torch.randn(1, 4, 16, 8)
    with torch.no_grad():
        out = flexattn.flex_attention(query, query, query, lambda score, b, h, q_idx, kv_idx: score * slopes[h])
        with pytest.raises(TraceError, match="gradients are off"):
            trace(wholly, None)
    with torch.inference_mode():
        assert torch.equal(
            out, flexattn.flex_attention(query, query, query, lambda score, b, h, q_idx, kv_idx: score * slopes[h])
        )


def test_a_function_of_captured_tensors_alone_keeps_its_gradient() -> None:
    learned = torch.rand(4, requires_grad=True)
    query = torch.randn(1, 4, 16, 8, dtype=torch.float32)

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + Apart.apply(learned)[h] * (kv_idx - q_idx)

    def plain(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + (2 * learned)[h] * (kv_idx - q_idx)

    found, expected = (
        torch.autograd.grad(flexattn.flex_attention(query, query, query, m).square().sum(), learned)[0]
        for m in (mod, plain)
    )
    torch.testing.assert_close(found, 1.5 * expected)


def test_detach_is_the_way_to_write_a_straight_through_estimator() -> None:
    query = torch.randn(1, 2, 16, 8, requires_grad=True)

    def through(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + (score.clamp(-1, 1) - score).detach()

    scores = query @ query.detach().mT / 8**0.5
    exact = torch.softmax(scores + (scores.clamp(-1, 1) - scores).detach(), -1) @ query.detach()
    out = flexattn.flex_attention(query, query.detach(), query.detach(), through)
    torch.testing.assert_close(out, exact)
    (found,), (expected,) = (torch.autograd.grad(o.square().sum(), query) for o in (out, exact))
    torch.testing.assert_close(found, expected)
