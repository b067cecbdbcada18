"""A mask_mod seen through an index: what a slice of a block mask uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .mask_object import MaskObject
from .masks import MaskMod


@dataclass(frozen=True, eq=False, repr=False)
class ShiftedMask(MaskObject):
    """The mask_mod of a slice of a block mask.

    `b`, `h` and `row` map new positions to old ones: None for unchanged, (start, step), or a tensor of old positions.
    `row` counts rows of query blocks of `block` queries.
    """

    mask: MaskMod
    b: tuple[int, int] | Tensor | None
    h: tuple[int, int] | Tensor | None
    row: tuple[int, int] | Tensor | None
    block: int

    @classmethod
    def of(cls, mask: MaskMod, b: Any, h: Any, row: Any, block: int) -> MaskMod:
        """`mask` with these picks (slices with known ends, or tensors); `mask` itself if they change nothing."""
        maps = [_as_map(p) for p in (b, h, row)]
        return mask if maps == [None, None, None] else cls(mask, maps[0], maps[1], maps[2], block)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The old mask at the old positions."""
        if isinstance(self.row, Tensor) or (self.row is not None and self.row[1] != 1):
            q_idx = _mapped(self.row, q_idx // self.block) * self.block + q_idx % self.block
        elif self.row is not None:
            q_idx = q_idx + self.row[0] * self.block
        return self.mask(_mapped(self.b, b), _mapped(self.h, h), q_idx, kv_idx)


def _as_map(pick: Any) -> tuple[int, int] | Tensor | None:
    if pick is None or isinstance(pick, Tensor):
        return pick
    return None if (pick.start, pick.step) == (0, 1) else (pick.start, pick.step)


def _mapped(positions: tuple[int, int] | Tensor | None, index: Tensor) -> Tensor:
    if positions is None:
        return index
    if isinstance(positions, Tensor):
        return positions.to(index.device)[index]
    return index * positions[1] + positions[0]
