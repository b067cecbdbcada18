"""The registered operators with the Triton backend: what torch expects of them, run-time numbers, gradients of any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn import AuxRequest, create_block_mask, flex_attention, masks, ops
from flexattn.codegen.trace import trace
from flexattn.operands import split


def operands(bias: Tensor) -> list[Any]:
    q, k, v = (torch.randn(2, h, 40, 16) for h in (4, 2, 2))
    program, captured, ints = trace(lambda s, b, h, i, j: s * 0.5 + bias[h] * i, masks.causal_mask)
    lists = list(create_block_mask(masks.causal_mask, None, None, 40, 40, "cpu", 16).kv_lists())
    inside, floats = split(captured, program)
    return [q, k, v, inside, lists, ints, floats, [16, 16], program, 0.3, "triton", ""]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    """Among others, that results have the shapes, dtypes and strides that a traced graph was promised."""
    arguments = operands(torch.randn(4).to(dtype))
    torch.library.opcheck(ops.FORWARD, tuple(arguments))
    out, lse, _ = ops.FORWARD(*arguments)
    given = (*arguments[:3], out, lse, torch.randn_like(out), torch.randn_like(lse), *arguments[3:], [0])
    torch.library.opcheck(ops.BACKWARD, given)


def test_gradients_of_any_strides() -> None:
    """`sum().backward()` gives expanded ones; a graph of Inductor's may hand over any others."""
    arguments = operands(torch.randn(4))
    out, lse, _ = ops.FORWARD(*arguments)
    seeds = [torch.randn(1, 1, 40, 16).expand_as(out), torch.randn(2, 1, 1).expand_as(lse)]
    poisoned = torch.full((lse.numel() + 128,), float("nan"))  # what lies behind the last row
    before_nan = poisoned[: lse.numel()].view_as(lse).copy_(lse)
    results = []
    for dout, dlse, rows in (
        (*seeds, lse.mT.contiguous().mT),
        (*seeds, before_nan),
        (*(s.contiguous() for s in seeds), lse),
    ):
        dq, dk, dv, (dbias,) = ops.BACKWARD(*arguments[:3], out, rows, dout, dlse, *arguments[3:], [0])
        results.append((dq, dk, dv, dbias))
    for *ours, wanted in zip(*results, strict=True):
        for found in ours:
            torch.testing.assert_close(found, wanted)


def test_numbers_that_change_from_call_to_call() -> None:
    """Integers that are symbolic in the graph, beside floats: both are arguments of one kernel."""

    def attention(q: Tensor, width: int, far: int, gain: float, backend: str) -> list[Tensor]:
        out, aux = flex_attention(
            q, q, q, lambda score, b, h, q_idx, kv_idx: score * gain + far * (q_idx - kv_idx) * 0.01 * gain,
            mask_mod=lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() < width,
            return_aux=AuxRequest(lse=True), backend=backend,
        )  # fmt: skip
        return [out, *torch.autograd.grad(out.square().sum() + aux.lse.sum(), q)]

    compiled = torch.compile(attention, dynamic=True, fullgraph=False, backend="aot_eager")
    q = torch.randn(1, 2, 40, 16, requires_grad=True)
    for width, far, gain in ((9, 3, 0.5), (17, 5, 0.7), (12, 4, 0.3)):
        for ours, wanted in zip(
            compiled(q, width, far, gain, "triton"), attention(q, width, far, gain, "reference"), strict=True
        ):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "tiled"])
@pytest.mark.parametrize("which", ["slopes", "temperature", "cap"])
def test_the_gradient_of_a_bfloat16_tensor_is_rounded_once(backend: str, which: str) -> None:
    """After the sum over all elements: it is the bfloat16 nearest to the exact one."""
    g = torch.Generator().manual_seed(1)
    q, k, v, seed = (torch.randn(1, 4, 70, 16, generator=g) for _ in range(4))
    start = (torch.rand(() if which == "cap" else (4,), generator=g) + 1).bfloat16()
    grads = []
    for t, dtype, chosen in ((start, torch.float32, backend), (start.double(), torch.float64, "reference")):
        leaf = t.detach().requires_grad_()
        mod = {
            "slopes": lambda s, b, h, i, j, leaf=leaf: s + leaf[h].to(s.dtype) * (j - i),
            "temperature": lambda s, b, h, i, j, leaf=leaf: s * leaf[h],
            "cap": lambda s, b, h, i, j, leaf=leaf: leaf * torch.tanh(s / leaf),
        }[which]
        out = flex_attention(*(x.to(dtype) for x in (q, k, v)), mod, mask_mod=masks.causal_mask, backend=chosen)
        grads += torch.autograd.grad(out, leaf, seed.to(dtype))
    assert grads[0].dtype is torch.bfloat16
    assert torch.equal(grads[0], grads[1].bfloat16())
