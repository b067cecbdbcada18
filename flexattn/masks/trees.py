"""The mask of a tree of tokens, as speculative decoding verifies it: a node sees its ancestors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_lists import has_data
from ..mask_object import MaskObject
from .parameters import check_integers, described, holds_integers, per_batch

WORD = 32  # bits


@dataclass(frozen=True, eq=False, repr=False)
class tree(MaskObject):
    """Tokens of a tree behind a context: node q sees all of the context, its ancestors and itself.

    `kv_idx < context`, or node `j = kv_idx - context` is an ancestor of node `q_idx` or itself: bit `j % 32` of
    `ancestors[q_idx, j // 32]`. A context of 1, then the parents -1 0 0 1 (node 3 is a child of node 1):

        1 1 . . .
        1 1 1 . .
        1 1 . 1 .
        1 1 1 . 1

    Query q is node q, so Q_LEN is the number of nodes and KV_LEN at least context + nodes; keys beyond the words are
    not attended. A chain of nodes is `causal(context)`. SpecInfer, Medusa and EAGLE pass a dense bool mask instead, and
    FlashInfer's packed custom masks are bits as well, but of 8, of all keys and in one row.

    Args:
        ancestors: int32 words of bits, [T, W] or [B, T, W] for T nodes, W at least T / 32; `tree.from_parents` makes them.
        context: how many keys come before node 0: an int, a 0-d tensor, or one for each batch entry, [B].

    Raises:
        ValueError: for words that are not int32, and for a context that is no integer.

    Source: Miao et al., 2024 (SpecInfer), tree attention.

    Example:
        >>> import torch, flexattn
        >>> mask = flexattn.masks.tree.from_parents(torch.tensor([-1, 0, 0, 1]), context=1)
        >>> flexattn.create_mask(mask, None, None, 4, 5)[0, 0].int().tolist()
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]
    """

    ancestors: Tensor
    context: int | Tensor = 0

    def __post_init__(self) -> None:
        words = self.ancestors
        if not isinstance(words, Tensor) or words.dtype is not torch.int32 or words.dim() not in (2, 3):
            raise ValueError(
                f"ancestors must be int32 words of bits, [T, W] or [B, T, W]; got {described(words)}. Write "
                "tree.from_parents(parents) to have them made"
            )
        check_integers("context", self.context, (0, 1), "an int, or an integer tensor: 0-d, or [B]")

    @classmethod
    def from_parents(cls, parents: Tensor, context: int | Tensor = 0) -> tree:
        """The mask of a tree given by the parent of each node.

        The words are computed on the device of `parents`; checking them waits for it. They are new tensors each time: keep
        the mask while the tree is the same.

        Args:
            parents: integers [T] or [B, T]: the number of the parent, smaller than the node's own, or -1 for a root. Several
                roots are several trees behind one context.
            context: as above.

        Raises:
            ValueError: for parents that are no integers, below -1, or not before their children.

        Example:
            >>> import torch, flexattn
            >>> flexattn.masks.tree.from_parents(torch.tensor([-1, 0, 0])).ancestors.tolist()
            [[1], [3], [5]]
        """
        if not isinstance(parents, Tensor) or parents.dim() not in (1, 2) or not holds_integers(parents):
            raise ValueError(f"parents must be an integer tensor [T] or [B, T]; got {described(parents)}")
        if has_data(parents):
            _check_order(parents)
        return cls(_words(_ancestors(parents)), context)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        nodes = WORD * self.ancestors.shape[-1]
        node = kv_idx - per_batch(self.context, b)
        # Keys of the context and beyond the words are decided by comparison; the clamp keeps their reads inside.
        bit = node.clamp(0, nodes - 1)
        word = self.ancestors[q_idx, bit >> 5] if self.ancestors.dim() == 2 else self.ancestors[b, q_idx, bit >> 5]
        # The last bit alone: a word with bit 31 is negative, and shifting it right fills it with ones.
        ancestor = (word >> (bit & 31)) & 1 == 1
        return (node < 0) | ((node < nodes) & ancestor)


def _check_order(parents: Tensor) -> None:
    wrong = (parents < -1) | (parents >= torch.arange(parents.shape[-1], device=parents.device))
    if bool(wrong.any()):
        place = wrong.nonzero()[0]
        raise ValueError(
            f"parents{place.tolist()} is {int(parents[tuple(place)])}; it must be a node before node {int(place[-1])}, or -1 "
            "for a root. Number the nodes level by level, so that parents come before their children"
        )


def _ancestors(parents: Tensor) -> Tensor:
    """[..., T, T] bool: column is row itself or above it in the tree. Each product doubles the generations covered."""
    count = int(parents.shape[-1])
    nodes = torch.arange(count, device=parents.device)
    # float32 counts exactly up to 2**24 nodes, and a rounded count is still above 0.
    reach = ((parents.unsqueeze(-1) == nodes) | (nodes.unsqueeze(-1) == nodes)).float()
    for _ in range(max(count - 1, 0).bit_length()):
        reach = (reach @ reach > 0).float()
    return reach > 0


def _words(bits: Tensor) -> Tensor:
    """[..., T, W] int32: bit j % 32 of word j // 32 is bits[..., j]."""
    count = bits.shape[-1]
    words = max(-(-count // WORD), 1)
    padded = torch.nn.functional.pad(bits.to(torch.int32), (0, words * WORD - count)).unflatten(-1, (words, WORD))
    weights = torch.ones(WORD, dtype=torch.int32, device=bits.device) << torch.arange(
        WORD, dtype=torch.int32, device=bits.device
    )
    return (padded * weights).sum(-1, dtype=torch.int32)
