"""`describe`: the program that makes a generated value again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..create import create_block_mask
from ..documents import Documents
from ..masks import noop_mask
from .generated import Generated, GeneratedMask
from .inputs import AttentionInputs


def describe(value: Any) -> str:
    """A program that makes the value again, imports included.

    Args:
        value: what a strategy of `flexattn.testing.strategies` gave: a mod, `AttentionInputs`, document ids, `Documents`, or
            a `BlockMask`. Lists of a block mask are written out where its mask_mod alone does not give them.

    Raises:
        TypeError: for anything else, and for a block mask of a mask_mod that was not generated.

    Example:
        >>> import torch
        >>> from flexattn.testing import describe
        >>> print(describe(torch.tensor([0, 0, 1, -1], dtype=torch.int32)))
        import torch
        <BLANKLINE>
        document_ids = torch.tensor([0, 1, -1], dtype=torch.int32).repeat_interleave(torch.tensor([2, 1, 1]))
    """
    if isinstance(value, (Generated, AttentionInputs)):
        return value.describe()
    if isinstance(value, Tensor) and value.dim() in (1, 2) and not value.is_floating_point():
        return f"import torch\n\ndocument_ids = {_ids(value)}"
    if isinstance(value, Documents):
        made = f"documents = flexattn.Documents.from_document_ids({_ids(value.document_ids)})"
        return f"import torch\nimport flexattn\n\n{made}"
    if isinstance(value, BlockMask) and (value.mask_mod is noop_mask or isinstance(value.mask_mod, GeneratedMask)):
        return _block_mask(value, value.mask_mod if isinstance(value.mask_mod, GeneratedMask) else None)
    raise TypeError(
        f"describe takes what the strategies of flexattn.testing.strategies give, got {type(value).__name__}"
        + (" of a mask_mod that was not generated" if isinstance(value, BlockMask) else "")
    )


def _ids(ids: Tensor) -> str:
    if ids.dim() == 2:
        return f"torch.stack([{', '.join(map(_ids, ids))}])" if len(ids) else _literal(ids)
    runs, counts = torch.unique_consecutive(ids, return_counts=True)
    return f"{_literal(runs)}.repeat_interleave(torch.tensor({counts.tolist()}))" if len(ids) else _literal(ids)


def _literal(t: Tensor) -> str:
    device = f', device="{t.device}"' if t.device.type != "cpu" else ""
    empty = f".reshape({tuple(t.shape)})" if t.numel() == 0 and t.dim() > 1 else ""
    return f"torch.tensor({t.tolist()}, dtype={t.dtype}{device}){empty}"


def _block_mask(value: BlockMask, mask_mod: GeneratedMask | None) -> str:
    mod = "" if mask_mod is None else mask_mod.describe()
    defined = "\n".join(line for line in mod.splitlines() if not line.startswith("import ")).strip()
    (Q_LEN, KV_LEN), size, device = value.seq_lengths, value.BLOCK_SIZE, str(value.kv_num_blocks.device)
    if mask_mod is not None and _follows_from(value, mask_mod):
        B, H = value.sizes
        made = f'flexattn.create_block_mask(mask_mod, {B}, {H}, {Q_LEN}, {KV_LEN}, "{device}", BLOCK_SIZE={size})'
    else:
        lists = (value.kv_num_blocks, value.kv_indices, value.full_kv_num_blocks, value.full_kv_indices)
        given = "".join(f"    {'None' if t is None else _literal(t)},\n" for t in lists)
        name = "None" if mask_mod is None else "mask_mod"
        made = (
            f"flexattn.BlockMask.from_kv_blocks(\n{given}    BLOCK_SIZE={size},\n    mask_mod={name},\n"
            f"    seq_lengths=({Q_LEN}, {KV_LEN}),\n)"
        )
    return "\n\n".join(part for part in ("import torch\nimport flexattn", defined, f"block_mask = {made}") if part)


def _follows_from(value: BlockMask, mask_mod: GeneratedMask) -> bool:
    """Whether its lists are those that `create_block_mask` makes of its mask_mod."""
    if not value.is_exact:
        return False
    B, H = value.sizes
    made = create_block_mask(mask_mod, B, H, *value.seq_lengths, value.kv_num_blocks.device, value.BLOCK_SIZE)
    for a, b in zip(made.as_tuple()[:-1], value.as_tuple()[:-1], strict=True):
        if not (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b):
            return False
    return True
