"""What no backend may let happen to a learned tensor: nan from masked places, anything but zero where nobody reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexattn import create_block_mask, flex_attention, masks

ENTRIES: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "dense": lambda i, j: (i, j),
    "transposed": lambda i, j: (j, i),
    "beyond an end": lambda i, j: (i + 1, j),
}


def assert_nan_in_masked_places_of_a_bias_leaks_nowhere(
    backend: str, entry: str, block_size: int, curved: bool
) -> None:
    """`curved`: the derivative, too, is nan where the bias is."""
    n = 50
    q, k, v = (torch.randn(2, 2, n, 8, requires_grad=True) for _ in range(3))
    rows, columns = ENTRIES[entry](*torch.ones(n, n).tril().nonzero().unbind(1))
    seen = torch.zeros(n, n, dtype=torch.bool)
    seen[rows.clamp(max=n - 1), columns] = True
    bias = torch.randn(n, n).masked_fill(~seen, math.nan).requires_grad_()

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        read = bias[ENTRIES[entry](q_idx, kv_idx)]
        return score * read.exp() + read if curved else score + read

    blocks = create_block_mask(masks.causal_mask, None, None, n, n, "cpu", BLOCK_SIZE=block_size)
    out = flex_attention(q, k, v, mod, blocks, backend=backend)
    dq, dk, dv, dbias = torch.autograd.grad(out.square().sum(), (q, k, v, bias))
    for t in (out, dq, dk, dv, dbias):
        assert t.isfinite().all()
    assert (dbias[~seen] == 0).all() and (dbias[seen] != 0).any()


def assert_nan_beside_a_table_and_gates_leaks_nowhere(backend: str) -> None:
    """Of a table of distances, and of gates of keys."""
    n = 50
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for _ in range(3))
    table = torch.randn(2, 2 * n).index_fill(1, torch.arange(n), math.nan).requires_grad_()
    gate = torch.randn(n).index_fill(0, torch.arange(30, n), math.nan).requires_grad_()
    out = flex_attention(
        q,
        k,
        v,
        lambda s, b, h, i, j: s + table[h, i - j + n] * gate[j] + gate[j].exp(),
        mask_mod=lambda b, h, i, j: (i >= j) & (j < 30),
        backend=backend,
    )
    grads = torch.autograd.grad(out.square().sum(), (q, k, v, table, gate))
    assert all(t.isfinite().all() for t in grads)
    assert (grads[3][:, :n] == 0).all() and (grads[3][:, n:] != 0).all()
    assert (grads[4][30:] == 0).all() and (grads[4][:30] != 0).all()


def assert_entries_that_nothing_reads_get_exactly_zero(backend: str) -> None:
    """In every pattern."""
    n = 40
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
    long, wide, heads = (torch.randn(s, requires_grad=True) for s in ((3 * n,), (2 * n, 2 * n), (5,)))
    out = flex_attention(
        q,
        k,
        v,
        lambda s, b, h, i, j: s * heads[h + 1] + long[i + n] + wide[i + 1, j + 2] + long[abs(i - j)],
        mask_mod=masks.sliding_window(8),
        backend=backend,
    )
    d_long, d_wide, d_heads = torch.autograd.grad(out.square().sum(), (long, wide, heads))
    rows, columns = d_wide.nonzero().unbind(1)
    assert (((rows - 1) - (columns - 2)).abs() <= 8).all() and rows.min() >= 1 and rows.max() <= n
    assert d_heads.nonzero().flatten().tolist() == [1]
    assert (d_long[9:n] == 0).all() and (d_long[2 * n :] == 0).all() and (d_long[:8] != 0).all()
