"""The masks of a packed sequence: several documents, or one prompt with several responses, one after another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..mask_object import MaskObject
from .parameters import at, check_ids, check_same_dims, described


@dataclass(frozen=True, eq=False, repr=False)
class document_mask(MaskObject):
    """Only within the same document of a packed sequence: `document_ids[q_idx] == document_ids[kv_idx]`.

    With ids 0 0 1 1 (combine it with `causal_mask` by `and_masks`):

        1 1 . .
        1 1 . .
        . . 1 1
        . . 1 1

    Ids are any integers, in any order. `flexattn.Documents` makes them from `cu_seqlens`, positions or lengths.
    torchtitan's `get_document_mask_mod` and Hugging Face's `packed_sequence_mask_function` are this mask; attention-gym's
    `generate_doc_mask_mod(mask_mod, offsets)` is `Documents.from_cu_seqlens(offsets).mask(mask_mod, local=True)`.

    Args:
        document_ids: integers, [S], or [B, S] for a different packing in each batch entry.
        kv_document_ids: ids of the keys where they are another sequence, as in cross-attention or with a cache, [KV] or
            [B, KV]. Default: queries and keys are the same sequence.

    Raises:
        ValueError: for ids that are no integers, and where one has a batch and the other has not, or another one.

    Example:
        >>> import torch, flexattn
        >>> ids = torch.tensor([0, 0, 1])
        >>> flexattn.create_mask(flexattn.masks.document_mask(ids), None, None, 3, 3)[0, 0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
        >>> flexattn.create_mask(flexattn.masks.document_mask(ids, torch.tensor([0, 1])), None, None, 3, 2)[0, 0].int().tolist()
        [[1, 0], [1, 0], [0, 1]]
    """

    document_ids: Tensor
    kv_document_ids: Tensor | None = None

    def __post_init__(self) -> None:
        check_ids("document_ids", self.document_ids)
        if self.kv_document_ids is not None:
            check_ids("kv_document_ids", self.kv_document_ids)
            check_same_dims("kv_document_ids", self.kv_document_ids, "document_ids", self.document_ids)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        keys = self.document_ids if self.kv_document_ids is None else self.kv_document_ids
        return at(self.document_ids, b, q_idx) == at(keys, b, kv_idx)

    def __repr__(self) -> str:
        ids = [self.document_ids] if self.kv_document_ids is None else [self.document_ids, self.kv_document_ids]
        return f"document_mask({', '.join(str(list(t.shape)) for t in ids)})"


@dataclass(frozen=True, eq=False, repr=False)
class shared_prefix(MaskObject):
    """Prompts stored once, each with its responses behind it, which do not see each other.

    `q_idx >= kv_idx and prompts[q_idx] == prompts[kv_idx] and (responses[kv_idx] == 0 or
    responses[q_idx] == responses[kv_idx])`. With responses 0 0 1 1 2 2:

        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        1 1 1 1 . .
        1 1 . . 1 .
        1 1 . . 1 1

    For GRPO (a prompt and its group) and DPO (a prompt, the chosen and the rejected answer). The prompt is computed once;
    each response sees what it would see behind a prompt of its own, provided that positional encodings continue from the
    end of the prompt in every response, not from the response stored before it.

    Args:
        responses: integers [S] or [B, S]: 0 for a token of the prompt, another number for each response. Numbers may
            come again under another prompt.
        prompts: integers of the same shape: the prompt that a token belongs to. Default: there is one.

    Raises:
        ValueError: for ids that are no integers, and for shapes that differ.

    Source: Wang and Hegde, 2024, "Accelerating Direct Preference Optimization with Prefix Sharing"; GRPO is Shao et al.,
    2024 (DeepSeekMath).

    Example:
        >>> import torch, flexattn
        >>> mask = flexattn.masks.shared_prefix(torch.tensor([0, 1, 1, 2]))
        >>> flexattn.create_mask(mask, None, None, 4, 4)[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    """

    responses: Tensor
    prompts: Tensor | None = None

    def __post_init__(self) -> None:
        check_ids("responses", self.responses)
        if self.prompts is None:
            return
        check_ids("prompts", self.prompts)
        if self.prompts.shape != self.responses.shape:
            raise ValueError(
                f"responses is {described(self.responses)} and prompts {described(self.prompts)}; they say something of "
                "the same tokens, so give them the same shape"
            )

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        key = at(self.responses, b, kv_idx)
        seen = (q_idx >= kv_idx) & ((key == 0) | (at(self.responses, b, q_idx) == key))
        if self.prompts is None:
            return seen
        return seen & (at(self.prompts, b, q_idx) == at(self.prompts, b, kv_idx))
