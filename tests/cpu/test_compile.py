"""Inside torch.compile: one graph, the same results and gradients as eager."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn import BlockMask, create_block_mask, flex_attention, masks
from flexattn.notices import say_once

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention.mask_mod:UserWarning")
BACKENDS = ["eager", "aot_eager", "inductor"]
slopes = torch.rand(4, requires_grad=True)
docs = torch.arange(70) // 20
mask = create_block_mask(masks.causal_mask, None, None, 70, 70, "cpu", 32)


def outside(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + slopes[h] * (kv_idx - q_idx)


def mod_defined_outside(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return flex_attention(q, k, v, outside, mask)


def mod_defined_inside(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    gate = w.sigmoid()
    return flex_attention(q * 2, k, v, lambda s, b, h, i, j: torch.where(i > j, s * gate[h], s) - 0.5, mask).sin()


def mask_inside(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return flex_attention(q, k, v, mask_mod=lambda b, h, i, j: (docs[i] == docs[j]) & (i >= j))


def block_mask_inside(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    made = create_block_mask(lambda b, h, i, j: i - j < 9 + h, None, 4, 70, 70, device="cpu", BLOCK_SIZE=16)
    return flex_attention(q, k, v, block_mask=made)


def lse_used(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    out, lse = flex_attention(q, k, v, mask_mod=masks.sliding_window(5), return_lse=True)
    return out * lse.unsqueeze(-1)


FUNCTIONS = [mod_defined_outside, mod_defined_inside, mask_inside, block_mask_inside, lse_used]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_compiled_equals_eager(function: Any, backend: str) -> None:
    leaves = [torch.randn(2, 4, 70, 8, requires_grad=True) for _ in range(3)] + [torch.randn(4, requires_grad=True)]
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend=backend)):
        out = f(*leaves)
        grads = torch.autograd.grad(out.square().sum(), [*leaves, slopes], allow_unused=True)
        results.append([out, *(g for g in grads if g is not None)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_new_value_of_a_captured_tensor_neither_recompiles_nor_goes_stale() -> None:
    graphs = 0

    def counting(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def call(q: Tensor, ids: Tensor) -> Tensor:
        return flex_attention(q, q, q, mask_mod=lambda b, h, i, j: ids[i] == ids[j])

    compiled = torch.compile(call, fullgraph=True, backend=counting)
    q = torch.randn(1, 2, 70, 8)
    for size in (20, 7, 35):
        ids = torch.arange(70) // size
        torch.testing.assert_close(compiled(q, ids), call(q, ids))
    assert graphs == 1


def test_a_mask_rebuilt_at_every_call_is_said_once() -> None:
    say_once.cache_clear()
    q = torch.randn(1, 2, 70, 8)
    with pytest.warns(UserWarning, match="builds the block mask anew at every call"):
        torch.compile(mask_inside, fullgraph=True, backend="eager")(q, q, q, q)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(mask_inside, fullgraph=True, backend="eager")(q, q, q, q)


def test_a_block_mask_can_be_an_argument() -> None:
    def call(q: Tensor, made: BlockMask) -> Tensor:
        return flex_attention(q, q, q, block_mask=made)

    q = torch.randn(1, 2, 70, 8)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, mask), call(q, mask))


def test_an_error_in_a_compiled_mod_still_teaches() -> None:
    def call(q: Tensor) -> Tensor:
        return flex_attention(q, q, q, lambda s, b, h, i, j: s + slopes)

    with pytest.raises(Exception, match=r"captured tensor of shape \(4,\)"):
        torch.compile(call, fullgraph=True, backend="eager")(torch.randn(1, 4, 8, 8))
