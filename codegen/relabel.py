"""Ids in the order of their first appearance: what compares only equal ids is the same, and sorted where runs are whole.

`doc[q_idx] == doc[kv_idx]` says nothing of the order of ids. Counted in the order of appearance, ids of documents that
lie one after the other are ascending, whatever they were, and their ranges tell documents apart.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .evaluate import Inputs
from .ir import DType, Kind, Node, Op, walk
from .spec import apply, load, substitute


def relabelled(mask: Node, inputs: Inputs) -> tuple[Node, Inputs]:
    """The mask with the ids it compares relabelled, and the inputs with the new ids among the captured tensors."""
    captured = list(inputs.captured)
    made: dict[Node, Node] = {}
    rewrite: dict[Node, Node] = {}
    for node in walk(mask):
        if node.op not in (Op.EQ, Op.NE) or not all(_is_id(a) for a in node.args):
            continue
        base, *lead = node.lhs.args[:-1]
        if node.rhs.args[:-1] != node.lhs.args[:-1] or not lead_of_batch(lead):
            continue
        if base not in made:
            assert isinstance(base.value, tuple)
            ids = captured[base.value[0]]
            made[base] = Node(Op.CAPTURED, (), DType.INT64, Kind.ELEMENT, (len(captured), base.value[1]))
            captured.append(_by_appearance(ids))
        sides = [load(made[base], *lead, a.args[-1]) for a in node.args]
        rewrite[node] = apply(node.op, *sides)
    if not rewrite:
        return mask, inputs
    (mask,) = substitute([mask], rewrite)
    return mask, replace(inputs, captured=captured, memo={})


def _is_id(node: Node) -> bool:
    return node.op is Op.LOAD and node.dtype.is_int and len(node.args) > 1


def lead_of_batch(index: list[Node]) -> bool:
    """Whether indices depend on nothing but the batch and the head, so that queries and keys share them."""
    return all(i.axes <= {"b", "h"} for i in index)


def _by_appearance(ids: Tensor) -> Tensor:
    """Ids of the last dimension replaced by the number of the first run in their row that has them."""
    if ids.numel() == 0:
        return ids.long()
    flat = ids.reshape(-1, ids.shape[-1])
    begins = torch.ones_like(flat, dtype=torch.bool)
    begins[:, 1:] = flat[:, 1:] != flat[:, :-1]
    run = begins.view(-1).long().cumsum(0) - 1  # the number of the run of each element
    first = begins.view(-1).nonzero().view(-1)
    value, row = flat.reshape(-1)[first], first // flat.shape[1]
    # Runs with equal ids in one row are one group; stable sorts bring its first run to its front.
    order = torch.argsort(value, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = (value[order][1:] != value[order][:-1]) | (row[order][1:] != row[order][:-1])
    group = new.long().cumsum(0) - 1
    label = torch.empty_like(order)
    label[order] = order[new.nonzero().view(-1)][group]
    label -= run.view(flat.shape)[:, 0][row]
    return label[run].view(ids.shape)
