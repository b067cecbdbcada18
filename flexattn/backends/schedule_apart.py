"""The order of work of a blocked backend under BATCH_INVARIANT: blocks of one batch entry, joined with nothing.

What `schedule` joins depends on the lists of neighbours, and the shape of a matrix product on what is joined.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..block_lists import dense
from .schedule import Group, Leg, Span, Split, Tile

PIECE = 128  # queries and keys of a product, at most: a block of the mask may be as large as all there is


def legs_apart(
    block_mask: Sequence[Tensor],
    block_size: tuple[int, int],
    shape: tuple[int, int, int, int],
    group_size: int,
    shared: bool,
) -> tuple[Leg, ...]:
    """As `schedule.legs`: every batch entry alone, all heads at once or, where lists are those of a head, each alone.

    Tiles and spans are blocks, or pieces of a block, whatever lists their neighbours have.
    """
    B, H, L, S = shape
    kinds = [dense(n, i, -(-S // block_size[1])).cpu() for n, i in zip(block_mask[0::2], block_mask[1::2], strict=True)]
    single = bool(kinds) and kinds[0].shape[1] > 1
    found = []
    for b in range(B):
        for h in range(H if single else min(1, H)):
            lists = [kind[min(b, kind.shape[0] - 1), h] for kind in kinds]
            heads = slice(h, h + 1) if single else slice(0, H)
            keys = slice(h // group_size, h // group_size + 1) if single else slice(0, H // group_size)
            tiles = _tiles(lists, block_size if kinds else (PIECE, PIECE), L, S)
            group = Group(b, b + 1, heads.start, heads.stop, tiles)
            lead = 1, keys.stop - keys.start, 1 if single else group_size
            batches = slice(b, b + 1)
            found.append(Leg(group, (Split(slice(0, 1) if shared else batches, batches, keys, heads, lead),)))
    return tuple(found)


def _tiles(lists: Sequence[Tensor], block_size: tuple[int, int], L: int, S: int) -> tuple[Tile, ...]:
    """Tiles of lists [rows, columns] of partial and of full blocks; without lists, of everything."""
    tiles = []
    for row, first in enumerate(range(0, L, block_size[0])):
        if lists:
            listed = sorted((c, kind == 0) for kind, t in enumerate(lists) for c in t[row].nonzero()[:, 0].tolist())
        else:
            listed = [(c, True) for c in range(-(-S // block_size[1]))]
        spans = tuple(
            Span(*piece, partial)
            for column, partial in listed
            for piece in _pieces(column * block_size[1], min((column + 1) * block_size[1], S))
        )
        tiles += [Tile(*piece, spans) for piece in _pieces(first, min(first + block_size[0], L))]
    return tuple(tiles)


def _pieces(start: int, stop: int) -> list[tuple[int, int]]:
    return [(at, min(at + PIECE, stop)) for at in range(start, stop, PIECE)]
