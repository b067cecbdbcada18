"""Masks with one small mistake: every way to change one operation of a mask's graph that a person might get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexattn import and_masks, masks, or_masks
from flexattn.codegen.ir import DType, Node, Op, const, walk
from flexattn.codegen.spec import apply, substitute
from flexattn.testing.traced_mask import TracedMask

LENGTH = 40
_ids = torch.arange(LENGTH) // 9
_batched = torch.stack([_ids, (torch.arange(LENGTH) + 5) // 7])
_spans = torch.where(_ids % 2 == 1, _ids, -1)

ORIGINALS: dict[str, Any] = {
    "causal": masks.causal(2),
    "sliding_window": masks.sliding_window(7),
    "window": masks.window(4, 3),
    "chunked": masks.chunked(8),
    "dilated": masks.dilated(3, 4),
    "streaming": masks.streaming(2, 6),
    "prefix_lm": masks.prefix_lm(torch.tensor([3, 11])),
    "padding": masks.padding(torch.tensor([29, 17])),
    "global_tokens": or_masks(masks.global_tokens(2), masks.window(1, 1)),
    "natten_2d": masks.natten_2d(5, 8, 3),
    "transfusion": masks.transfusion(_spans),
    "document_mask": and_masks(masks.document_mask(_batched), masks.causal_mask),
    "shared_prefix": masks.shared_prefix(_ids % 3, _ids // 3),
    "block_diffusion": masks.block_diffusion(20, 4),
}


class Mutant(NamedTuple):
    """A mask with one change, and what was changed."""

    change: str
    mask_mod: Callable[..., Tensor]


_SWAPPED = {Op.LT: Op.LE, Op.LE: Op.LT, Op.EQ: Op.NE, Op.NE: Op.EQ, Op.AND: Op.OR, Op.OR: Op.AND, Op.XOR: Op.OR}
_SWAPPED |= {Op.ADD: Op.SUB, Op.SUB: Op.ADD, Op.MAXIMUM: Op.MINIMUM, Op.MINIMUM: Op.MAXIMUM, Op.FLOORDIV: Op.MOD}


def _changes(node: Node) -> Iterator[tuple[str, Node]]:
    """What a node may become."""
    op, args = node.op, node.args
    if op in _SWAPPED and not (op in (Op.ADD, Op.SUB) and not node.dtype.is_int):
        yield f"{op.value} is {_SWAPPED[op].value}", apply(_SWAPPED[op], *args)
    if op in (Op.LT, Op.LE, Op.SUB) and args[0] is not args[1]:
        yield f"sides of {op.value} exchanged", apply(op, args[1], args[0])
    if op in (Op.AND, Op.OR) and node.dtype is DType.BOOL:
        for i, side in enumerate(args):
            yield f"only side {i} of {op.value}", side
    if node.dtype is DType.BOOL and op is not Op.CONST:
        yield f"not {op.value}", apply(Op.NOT, node)
    if op is Op.CONST and node.dtype.is_int:
        for step in (-1, 1):
            yield f"{node.value} is {int(node.value) + step}", const(int(node.value) + step, node.dtype, node.kind)  # type: ignore[arg-type]
    if op is Op.INPUT and node.value == "b":
        yield "b is 0", const(0, node.dtype)
    if op is Op.INPUT and node.value in ("q_idx", "kv_idx"):
        other = "kv_idx" if node.value == "q_idx" else "q_idx"
        yield f"{node.value} is {other}", Node(Op.INPUT, (), node.dtype, node.kind, other)


def mutants(mask: Any) -> Iterator[Mutant]:
    """All masks that are one change away."""
    traced = TracedMask.of(mask)
    for number, node in enumerate(walk(traced.node)):
        for what, changed in _changes(node):
            if any(n.op in (Op.FLOORDIV, Op.MOD) and n.rhs.is_const and n.rhs.value == 0 for n in walk(changed)):
                continue
            (whole,) = substitute([traced.node], {node: changed})
            yield Mutant(f"node {number}: {what}", TracedMask(whole, traced.inputs).mask_mod)
