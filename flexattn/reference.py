"""Dense attention in plain torch: slow, obvious, and the definition of what every backend must compute.

It materialises all scores, O(L * S) memory. Plain torch operators, so every derivative and transform of torch applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .block_lists import dense
from .codegen.evaluate import TORCH_DTYPE, Inputs, evaluate
from .layout import in_order_of
from .problem import Problem


class Attention(NamedTuple):
    """Output [B, Hq, L, Ev] in the query's dtype; lse (natural log) and max_scores [B, Hq, L] in the score dtype."""

    out: Tensor
    lse: Tensor
    max_scores: Tensor


def listed_blocks(
    block_mask: Sequence[Tensor], block_size: tuple[int, int], L: int, S: int
) -> tuple[Tensor | None, Tensor | None]:
    """Elements in partial and in full blocks, bool [B', H', L, S]; None for "all of them" and "none of them"."""
    if not block_mask:
        return None, None
    elements = []
    # A block may be larger than all there is.
    block_size = (min(block_size[0], max(1, L)), min(block_size[1], max(1, S)))
    for count, index in zip(block_mask[0::2], block_mask[1::2], strict=True):
        blocks = dense(count, index, -(-S // block_size[1]))
        blocks = blocks.repeat_interleave(block_size[0], -2).repeat_interleave(block_size[1], -1)
        elements.append(blocks[..., :L, :S])
    return elements[0], elements[1] if len(elements) > 1 else None


def solve(problem: Problem) -> Attention:
    """As `attention`, with the memory layouts that every backend gives its results."""
    dense = attention(problem)
    out = in_order_of(problem.query, dense.out)
    return Attention(out, dense.lse.contiguous(), dense.max_scores.detach().contiguous())


def attention(
    problem: Problem, products: torch.dtype | None = None, origin: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> Attention:
    """Solve a problem densely.

    `origin` is the first index along each axis, (b, h, q_idx, kv_idx), where the problem is a part of one.

    `products` is the dtype of the two matrix products, by default that of the scores. With the dtype of the inputs it
    is the plain low-precision implementation whose error is a yardstick for any other.

    A row that attends to nothing has output 0, lse and max_scores -inf, and zero gradients.
    """
    query, key, value, variant = problem.query, problem.key, problem.value, problem.variant
    B, H, L, _ = query.shape
    S, group = key.shape[2], H // max(1, key.shape[1])
    dtype = TORCH_DTYPE[variant.score_dtype]
    device = query.device
    products = products or dtype
    q, k, v = (t.to(products) for t in (query, key, value))
    k, v = (t.repeat_interleave(group, dim=1).expand(B, -1, -1, -1) for t in (k, v))
    scores = (q @ k.mT).to(dtype) * problem.given_scale

    # Indices of full size, so that the gradient of each loaded element can be cut where it is masked.
    begins = zip(origin, (B, H, L, S), strict=True)
    axes = [torch.arange(first, first + n, dtype=torch.int32, device=device) for first, n in begins]
    index = [a.view([-1 if i == d else 1 for i in range(4)]).expand(B, H, L, S) for d, a in enumerate(axes)]
    named = dict(zip(("b", "h", "q_idx", "kv_idx"), index, strict=True))
    inputs = Inputs(named, problem.tensors, problem.floats, problem.ints, device)
    partial, full = listed_blocks(problem.block_mask, problem.block_size, L, S)
    keep = torch.ones(B, H, L, S, dtype=torch.bool, device=device)
    if variant.mask is not None:
        (keep,) = evaluate([variant.mask], inputs)
        keep = keep.expand(B, H, L, S)
    if partial is not None:
        keep = keep & partial
    if full is not None:
        keep = keep | full

    def cut(loaded: Tensor) -> Tensor:
        """A masked element has no gradient, not even nan."""
        loaded = loaded.expand(B, H, L, S) if loaded.is_floating_point() else loaded
        return _cut_gradient(loaded, keep) if loaded.is_floating_point() else loaded

    inputs = Inputs(
        {**named, "score": _cut_gradient(scores, keep)},
        inputs.captured,
        inputs.floats,
        inputs.ints,
        device,
        on_load=cut,
    )
    (scores,) = evaluate([variant.score], inputs)
    scores = torch.where(keep, scores, float("-inf")).expand(B, H, L, S)

    if S == 0:
        empty = scores.sum(-1) - float("inf")
        return Attention((scores.to(products) @ v).to(query.dtype), empty, empty.detach())
    max_scores = scores.detach().amax(-1, keepdim=True)
    offset = max_scores.masked_fill(max_scores == float("-inf"), 0.0)
    weights = torch.exp(scores - offset)
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = torch.where(nothing, float("-inf"), offset + torch.log(total))
    return Attention(((weights / total).to(products) @ v).to(query.dtype), lse.squeeze(-1), max_scores.squeeze(-1))


def _cut_gradient(x: Tensor, keep: Tensor) -> Tensor:
    """`x`, whose gradient is exactly zero where `keep` is False."""
    return torch.where(keep, x, x.detach())
