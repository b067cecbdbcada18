"""Rows, matrices and views inside a mod: the values and gradients are those of torch.vmap over the same function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn import TraceError, flex_attention

B, H, L, S, D = 2, 3, 5, 7, 4
Mod = Callable[..., Any]


def learned(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


u, v, mix = learned(S, D), learned(S, D, seed=1), learned(H, D, D, seed=2)
tall, grid = learned(H, 3, D, seed=3), learned(H, S, S, seed=4)
half = learned(S, 24, seed=5, dtype=torch.float16)

MODS: dict[str, Mod] = {
    "a bilinear form": lambda s, b, h, q, k: s + u[q] @ mix[h] @ v[k],
    "a matrix times a vector": lambda s, b, h, q, k: s + (mix[h] @ u[q]).amax(),
    "a vector times a matrix": lambda s, b, h, q, k: s + (u[q] @ mix[h]).amin(),
    "a matrix times a vector, times a vector": lambda s, b, h, q, k: s + mix[h] @ u[q] @ v[k],
    "matrices": lambda s, b, h, q, k: s + (tall[h] @ mix[h] @ tall[h].mT @ tall[h, :, 1]).amax(),
    "a captured matrix": lambda s, b, h, q, k: s + mix[0] @ u[q] @ v[k] + (v[1] @ u[k]),
    "a captured matrix on the left, by name": lambda s, b, h, q, k: s + torch.matmul(mix[1], u[q]).prod(),
    "dot": lambda s, b, h, q, k: s * torch.dot(u[q], v[k]),
    "inner of a matrix and a row": lambda s, b, h, q, k: s + torch.inner(tall[h], u[q]).amax(),
    "inner of matrices": lambda s, b, h, q, k: s + torch.inner(tall[h], mix[h]).amax(),
    "a row of a matrix transposed": lambda s, b, h, q, k: s + tall[h].T[k % D].sum(),
    "an element of a matrix transposed": lambda s, b, h, q, k: s + grid[h].T[k, q] + grid[h].mT[q, k],
    "a part of a matrix transposed": lambda s, b, h, q, k: s + grid[h, 1:].mT[k, q],
    "a computed matrix transposed": lambda s, b, h, q, k: s + ((2 * tall[h]).T @ tall[h, :, 0]).amax(),
    "the sum over all dimensions by name": lambda s, b, h, q, k: s + tall[h].sum((0, 1)) + tall[h].sum(dim=(-1, -2)),
    "a sum of another type": lambda s, b, h, q, k: s + (3 * u[q]).sum(dtype=torch.float32),
    "a sum in float16": lambda s, b, h, q, k: s + half[q].sum() + half[k].mean(),
}


def by_vmap(mod: Mod, scores: Tensor) -> Tensor:
    """The scores that `mod` gives, element by element."""
    axes = [(None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)]
    for axis in axes:
        mod = torch.vmap(mod, in_dims=(0, *axis))
    return mod(scores, *(torch.arange(n) for n in (B, H, L, S)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODS)
def test_a_row_means_what_it_means_to_torch(name: str) -> None:
    g = torch.Generator().manual_seed(9)
    q, k, val = (torch.randn(B, H, n, D, generator=g, dtype=torch.float64) for n in (L, S, S))
    leaves = [q.requires_grad_(), u, v, mix, tall, grid, half]
    out, lse = flex_attention(q, k, val, MODS[name], return_lse=True)
    scores = by_vmap(MODS[name], q @ k.mT / D**0.5).double()
    wanted = torch.softmax(scores, -1) @ val, torch.logsumexp(scores, -1)
    seeds = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in wanted]
    gradients = [torch.autograd.grad(made, leaves, seeds, allow_unused=True) for made in ((out, lse), wanted)]
    for found, exact in zip((out, lse, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        assert (found is None) == (exact is None)
        if found is not None:
            assert found.dtype is exact.dtype
            rounding = 2e-3 if found.dtype is torch.float16 else 1e-6 if "another type" in name else 1e-12
            assert (found - exact).abs().max() <= rounding * exact.abs().max(), name


def test_data_has_no_gradient() -> None:
    q = learned(1, 1, L, D)
    for mod in (
        lambda s, b, h, q_idx, kv_idx: s.data + u[kv_idx, 0],
        lambda s, b, h, q_idx, kv_idx: s.detach() + u[kv_idx].data[0] + u[kv_idx, 0],
    ):
        out = flex_attention(q, q.detach(), q.detach(), mod)
        assert not torch.autograd.grad(out.square().sum(), q, retain_graph=True)[0].any()
        assert torch.autograd.grad(out.square().sum(), u)[0].any()
    out = flex_attention(q, q, q, lambda s, b, h, q_idx, kv_idx: s + u[kv_idx].data.sum())
    assert not torch.autograd.grad(out.sum(), u)[0].any()


ITSELF: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: x.to(x.dtype),
    "double": lambda x: x.double(),
    "type_as": lambda x: x.type_as(x),
    "contiguous": lambda x: x.contiguous(),
    "view": lambda x: x.view(()),
    "positive": lambda x: +x,
    "float, another type": lambda x: x.float(),
    "clone": lambda x: x.clone(),
    "add zero": lambda x: x + 0,
}


@pytest.mark.parametrize("name", ITSELF)
def test_what_is_the_value_itself_changes_with_it(name: str) -> None:
    def mod(score: Tensor, *_: Tensor) -> Tensor:
        other = ITSELF[name](score)
        other += 0.5
        return score * other

    q = learned(1, 1, 3, 1, seed=6).detach()
    _, lse = flex_attention(q, torch.ones_like(q), q, mod, scale=1.0, return_lse=True)
    wanted = torch.stack([mod(x.clone()) for x in q.flatten()]) + math.log(3)
    assert torch.allclose(lse.flatten(), wanted.double(), rtol=1e-6 if "float" in name else 1e-12)


@pytest.mark.parametrize(
    ("mod", "what"),
    [
        (lambda s, b, h, q, k: s + tall[h].sum((0,)).amax(), "reduces part of a 2-d value with `sum`"),
        (lambda s, b, h, q, k: s + tall[h].sum(axis=0).amax(), "reduces part of a 2-d value with `sum`"),
        (lambda s, b, h, q, k: s + u[q].sum(-1, True), "reduces part of a 1-d value with `sum`"),
        (
            lambda s, b, h, q, k: s + tall[h] @ mix[h].T[0, :3],
            r"multiplies values of shapes (3, 4) and (3,) with `matmul`",
        ),
        (lambda s, b, h, q, k: s + torch.dot(u[q], v[k, :1]), "multiplies values of shapes (4,) and (1,) with `dot`"),
        (lambda s, b, h, q, k: s @ s, "multiplies values of shapes () and () with `matmul`"),
        (lambda s, b, h, q, k: s + s.expand(3).sum(), "calls `expand`"),
        (lambda s, b, h, q, k: s + s.expand_as(u[q]).sum(), "calls `expand_as`"),
        (lambda s, b, h, q, k: s + torch.zeros(3, 2, 2, 2)[h].T[0, 0, 0], "calls `.T of more than two dimensions`"),
        (lambda s, b, h, q, k: s.detach().add_(1) + s, "writes with `add` to what `detach`"),
        (lambda s, b, h, q, k: s.type(torch.IntTensor), "calls `type` without a torch.dtype"),  # type: ignore[attr-defined]
        (lambda s, b, h, q, k: s.type("torch.IntTensor"), "calls `type` without a torch.dtype"),
    ],
)
def test_what_has_another_meaning_is_refused(mod: Mod, what: str) -> None:
    q = torch.randn(1, H, L, D)
    with pytest.raises(TraceError) as caught:
        flex_attention(q, q, q, mod)
    assert what in str(caught.value)
