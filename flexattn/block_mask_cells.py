"""What a picture of a block mask shows: its blocks gathered into cells, and the elements of one block.

In: a mask, a batch entry and a head, and how many cells a side may have. Out: counts on the CPU and the words around
them, for `svg` and `plot` to draw. Neither the blocks nor the elements of a mask are ever all in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .codegen.evaluate import Inputs, evaluate
from .codegen.pipeline import variant
from .codegen.trace import trace
from .mask_object import name_of

if TYPE_CHECKING:
    from .block_mask import BlockMask

EMPTY, PARTIAL, FULL = 0, 1, 2
KINDS = ("empty", "partial", "full")
MEANINGS = ("empty: skipped", "partial: the mask decides", "full: all attended")
COLORS = ("#F2F2F2", "#E69F00", "#0072B2")  # after Okabe and Ito: told apart by colour-blind readers and in grey
PALEST = 0.2  # opacity of a cell with next to nothing in it, which must not look empty

_CHUNK = 1 << 22  # blocks or elements looked at at once
_LONGEST_NAME = 64


@dataclass(frozen=True)
class Cells:
    """Things, blocks or elements, gathered into R x C cells. An attended element counts as full.

    Attributes:
        q_edges, kv_edges: positions of elements at which the rows (columns) of cells begin, and where the last one ends.
        rows, columns: [R] and [C] int64, rows (columns) of things in a row (column) of cells.
        partial, full: [R, C] int64, how many things of a cell are partial (full).
    """

    q_edges: list[int]
    kv_edges: list[int]
    rows: Tensor
    columns: Tensor
    partial: Tensor
    full: Tensor

    @property
    def things(self) -> Tensor:
        """[R, C] int64: how many things a cell holds."""
        return self.rows.unsqueeze(1) * self.columns

    @property
    def visited(self) -> Tensor:
        """[R, C] int64: how many of them are not empty."""
        return self.partial + self.full

    @property
    def kind(self) -> Tensor:
        """[R, C] int64: EMPTY where nothing is visited, else the commoner of PARTIAL and FULL."""
        commoner = torch.where(self.full > self.partial, FULL, PARTIAL)
        return torch.where(self.visited > 0, commoner, EMPTY)

    @property
    def opacity(self) -> Tensor:
        """[R, C] float64: 1 where everything is visited, towards `PALEST` the less is, 0 where nothing is."""
        share = self.visited.double() / self.things
        return torch.where(share > 0, PALEST + (1 - PALEST) * share, 0.0)

    @property
    def largest(self) -> tuple[int, int]:
        """(rows, columns) of things in the largest cell."""
        return (max(self.rows.tolist(), default=0), max(self.columns.tolist(), default=0))


@dataclass(frozen=True)
class Block:
    """One block: its place, its kind, its elements."""

    row: int
    column: int
    kind: int
    elements: Cells

    @property
    def caption(self) -> str:
        """Which block it is, and how much of it is attended."""
        share = self.elements.full.sum().item() / self.elements.things.sum().item()
        return f"block ({self.row}, {self.column}), {KINDS[self.kind]}: {100 * share:.4g} % attended"


@dataclass(frozen=True)
class View:
    """What is drawn of a mask.

    Attributes:
        name: of the mask function, and of the batch entry and head where there are several.
        facts: lengths, block size and sparsity in words.
        seq_lengths, block_size: of the mask, (queries, keys).
        sparsity: percentage of elements of this batch entry and head that lie in skipped blocks.
        blocks: the grid.
        zoom: the block that is drawn apart, if any.
    """

    name: str
    facts: str
    seq_lengths: tuple[int, int]
    block_size: tuple[int, int]
    sparsity: float
    blocks: Cells
    zoom: Block | None

    def visited_by_row(self) -> tuple[Tensor, Tensor]:
        """How many partial and full blocks a row visits, [R] float64 each: the mean where a cell holds several rows."""
        cells = self.blocks
        return cells.partial.sum(1) / cells.rows.double(), cells.full.sum(1) / cells.rows.double()

    @property
    def note(self) -> str:
        """What a cell stands for, if it is not one block."""
        down, across = self.blocks.largest
        if max(down, across) <= 1:
            return ""
        return f"cells of up to {down} × {across} blocks: the commoner colour, paler where fewer are visited"


def view(mask: BlockMask, batch: int, head: int, zoom: Any, max_cells: int) -> View:
    """What is drawn of a batch entry and a head. `zoom`: (row, column) of a block, "auto" for the first partial one."""
    if not isinstance(max_cells, int) or max_cells < 1:
        raise ValueError(f"max_cells is {max_cells!r}; it must be a number of cells a side, at least 1")
    _check_member("batch", batch, mask.sizes[0])
    _check_member("head", head, mask.sizes[1])
    place = _place(mask, batch, head, zoom)
    blocks, sparsity = gathered_blocks(mask, batch, head, (max_cells, max_cells))
    (Q, KV), (block_q, block_kv) = mask.seq_lengths, mask.BLOCK_SIZE
    name = name_of(mask.mask_mod)
    name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    sizes = zip(("batch", "head"), (batch, head), mask.sizes, strict=True)
    return View(
        ", ".join([name, *(f"{what} {index}" for what, index, size in sizes if size > 1)]),
        f"{Q} × {KV} elements, blocks of {block_q} × {block_kv}, sparsity {sparsity:.2f} %",
        (Q, KV),
        (block_q, block_kv),
        sparsity,
        blocks,
        None if place is None else _block(mask, batch, head, place, max_cells),
    )


def gathered_blocks(mask: BlockMask, batch: int, head: int, limits: tuple[int, int]) -> tuple[Cells, float]:
    """The blocks in at most `limits` rows and columns of cells, -1 for one cell a block; the sparsity in percent."""
    rows, columns = _grid(mask)
    row_edges, column_edges = _edges(rows, limits[0]), _edges(columns, limits[1])
    heights, widths = (_sizes(n, size) for n, size in zip(mask.seq_lengths, mask.BLOCK_SIZE, strict=True))
    R, C = len(row_edges) - 1, len(column_edges) - 1
    cell_rows = _cell_of(torch.arange(rows, device="cpu"), row_edges)
    cell_columns = _cell_of(torch.arange(columns + 1, device="cpu"), column_edges)  # the last one is of no block
    widths = torch.nn.functional.pad(widths, (0, 1))
    sums = torch.zeros(2, R, C, dtype=torch.int64, device="cpu")
    visited = 0.0
    for start, kinds in _listed_blocks(mask, batch, head):
        for kind, listed in enumerate(kinds):
            stop = start + len(listed)
            counted = torch.zeros(len(listed), C + 1, dtype=torch.int64, device="cpu")
            counted.scatter_add_(
                1, cell_columns[listed], torch.ones((), dtype=torch.int64, device="cpu").expand_as(listed)
            )
            sums[kind].index_add_(0, cell_rows[start:stop], counted[:, :C])
            visited += (heights[start:stop] @ widths[listed].sum(-1)).item()
    elements = mask.seq_lengths[0] * mask.seq_lengths[1]
    cells = _cells(sums, (row_edges, column_edges), (0, 0), mask.BLOCK_SIZE, mask.seq_lengths)
    return cells, 100.0 * (1.0 - visited / elements) if elements else 0.0


def ticks(start: int, stop: int, unit: int, most: int) -> list[int]:
    """Where an axis is labelled: its ends, and between them every 1, 2, 4, ... units, at most `most` times."""
    step = unit
    while (stop - start) > most * step:
        step *= 2
    inner = [at for at in range(start + step, stop, step) if stop - at >= step / 2]
    return [start, *inner, stop] if stop > start else [start]


# ---- blocks


def _grid(mask: BlockMask) -> tuple[int, int]:
    return -(-mask.seq_lengths[0] // mask.BLOCK_SIZE[0]), -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1])


def _edges(things: int, limit: int) -> list[int]:
    cells = things if limit == -1 else min(things, limit)
    return [things * i // max(cells, 1) for i in range(cells + 1)]


def _sizes(length: int, block: int) -> Tensor:
    return (length - torch.arange(0, length, block, device="cpu")).clamp_max(block).double()


def _of(lists: Tensor, batch: int, head: int) -> Tensor:
    """Lists of one batch entry and head; what is the same for all is held once."""
    return lists[min(batch, lists.shape[0] - 1), min(head, lists.shape[1] - 1)]


def _listed_blocks(mask: BlockMask, batch: int, head: int) -> Iterator[tuple[int, list[Tensor]]]:
    """The first of some rows of blocks, and the columns of their partial and of their full blocks, [n, any] int64.

    Each block is there once, as partial if it is in both lists; entries without meaning are the number of columns.
    """
    rows, columns = _grid(mask)
    lists = [_of(t, batch, head) for t in mask.kv_lists()]
    step = max(1, _CHUNK // max(1, *(index.shape[-1] for index in lists[1::2])))
    for start in range(0, rows, step):
        some = [t[start : start + step].cpu() for t in lists]
        partial, *more = [_ascending(n, i, columns) for n, i in zip(some[0::2], some[1::2], strict=True)]
        for full in more:
            if full.numel():
                at = torch.searchsorted(full, partial).clamp_max(full.shape[-1] - 1)
                row, twice = (full.gather(-1, at) == partial).nonzero().unbind(-1)
                full[row, at[row, twice]] = columns
        yield start, [partial, *more]


def _ascending(count: Tensor, index: Tensor, columns: int) -> Tensor:
    """The columns that rows list, ascending and each once; then `columns`."""
    used = torch.arange(index.shape[-1], device="cpu") < count.unsqueeze(-1)
    found = torch.where(used, index, columns).long()
    if bool(((found[:, 1:] > found[:, :-1]) | (found[:, 1:] == columns)).all()):
        return found
    found = found.sort(-1).values
    found[:, 1:][found[:, 1:] == found[:, :-1]] = columns
    return found.sort(-1).values


def _cell_of(places: Tensor, edges: list[int]) -> Tensor:
    return torch.searchsorted(torch.tensor(edges[1:], device="cpu"), places, right=True)


def _add(sums: Tensor, band: Tensor, start: int, row_edges: list[int], column_edges: list[int]) -> None:
    """Add a band [..., n, columns] of bools, whose first row is `start`, to the cells [..., R, C] that it lies in."""
    if sums.numel() == 0:
        return
    before = torch.nn.functional.pad(band.cumsum(-1, dtype=torch.int32), (1, 0))
    at = torch.tensor(column_edges, device="cpu")
    cell = _cell_of(torch.arange(start, start + band.shape[-2], device="cpu"), row_edges)
    sums.index_add_(-2, cell, (before[..., at[1:]] - before[..., at[:-1]]).long())


def _cells(
    sums: Tensor,
    edges: tuple[list[int], list[int]],
    offsets: tuple[int, int],
    sizes: tuple[int, int],
    ends: tuple[int, int],
) -> Cells:
    """Cells from counts [2, R, C], with edges in things of `sizes` elements that begin at the element `offsets`."""
    rows, columns = (torch.tensor(e, dtype=torch.int64, device="cpu").diff() for e in edges)
    q_edges, kv_edges = (
        [min(offset + at * size, end) for at in e]
        for e, offset, size, end in zip(edges, offsets, sizes, ends, strict=True)
    )
    return Cells(q_edges, kv_edges, rows, columns, sums[0], sums[1])


# ---- elements


def _block(mask: BlockMask, batch: int, head: int, place: tuple[int, int], max_cells: int) -> Block:
    row, column = place
    partial, full = _listed(mask, batch, head, row, column)
    kind = PARTIAL if partial else FULL if full else EMPTY
    spans = [
        (i * size, min((i + 1) * size, length))
        for i, size, length in zip(place, mask.BLOCK_SIZE, mask.seq_lengths, strict=True)
    ]
    (q_start, q_stop), (kv_start, kv_stop) = spans
    row_edges, column_edges = _edges(q_stop - q_start, max_cells), _edges(kv_stop - kv_start, max_cells)
    sums = torch.zeros(2, len(row_edges) - 1, len(column_edges) - 1, dtype=torch.int64, device="cpu")
    for start, attended in _attended(mask, batch, head, spans, kind):
        _add(sums[1], attended, start, row_edges, column_edges)
    cells = _cells(sums, (row_edges, column_edges), (q_start, kv_start), (1, 1), (q_stop, kv_stop))
    return Block(row, column, kind, cells)


def _listed(mask: BlockMask, batch: int, head: int, row: int, column: int) -> tuple[bool, bool]:
    """Whether a block is in the partial list, and in the full one."""
    lists = [_of(t, batch, head)[row].cpu() for t in mask.kv_lists()]
    found = [bool((i[: int(n)] == column).any()) for n, i in zip(lists[0::2], lists[1::2], strict=True)]
    return found[0], len(found) > 1 and found[1]


def _attended(
    mask: BlockMask, batch: int, head: int, spans: list[tuple[int, int]], kind: int
) -> Iterator[tuple[int, Tensor]]:
    """Some rows of a block's elements, as many at a time as memory allows: the first one's number, and [n, keys] bool."""
    (q_start, q_stop), (kv_start, kv_stop) = spans
    step = max(1, _CHUNK // (kv_stop - kv_start))
    if kind != PARTIAL:
        for q in range(q_start, q_stop, step):
            shape = (min(step, q_stop - q), kv_stop - kv_start)
            yield q - q_start, torch.full(shape, kind == FULL, dtype=torch.bool, device="cpu")
        return
    device = mask.device
    program, captured, ints = trace(None, mask.mask_mod, device=device)
    parsed = variant(program)
    n = len(captured) - parsed.n_floats
    named = {
        "b": torch.full((), batch, dtype=torch.int32, device=device),
        "h": torch.full((), head, dtype=torch.int32, device=device),
        "kv_idx": torch.arange(kv_start, kv_stop, dtype=torch.int32, device=device),
    }
    base = Inputs(named, captured[:n], captured[n:], ints, device)
    for q in range(q_start, q_stop, step):
        q_idx = torch.arange(q, min(q + step, q_stop), dtype=torch.int32, device=device).view(-1, 1)
        shape = (len(q_idx), kv_stop - kv_start)
        if parsed.mask is None:
            yield q - q_start, torch.ones(shape, dtype=torch.bool, device="cpu")
        else:
            (keep,) = evaluate([parsed.mask], base.fork({"q_idx": q_idx}))
            yield q - q_start, keep.expand(shape).cpu()


# ---- what was asked for


def _check_member(what: str, index: Any, size: int) -> None:
    """Raise unless `index` is a batch entry, or a head, of the mask."""
    valid = _valid(size)
    if not isinstance(index, int) or isinstance(index, bool):
        raise ValueError(f"{what} is {index!r}; it must be an int, valid: {valid}")
    if 0 <= index < size:
        return
    raise IndexError(f"{what} {index} is out of range; valid: {valid}")


def _valid(size: int) -> str:
    return "none, the mask is empty" if size == 0 else "0" if size == 1 else f"0 to {size - 1}"


def _place(mask: BlockMask, batch: int, head: int, zoom: Any) -> tuple[int, int] | None:
    """Row and column of the block to zoom into."""
    if zoom is None:
        return None
    if isinstance(zoom, str) and zoom == "auto":
        count = _of(mask.kv_num_blocks, batch, head)
        rows = count.nonzero()
        if len(rows) == 0:
            return None
        row = int(rows[0])
        return row, int(_of(mask.kv_indices, batch, head)[row, : int(count[row])].min())
    fits = isinstance(zoom, (tuple, list)) and len(zoom) == 2
    if not fits or any(not isinstance(i, int) or isinstance(i, bool) for i in zoom):
        raise ValueError(f'zoom is {zoom!r}; it must be (row, column) of a block, "auto" or None')
    for what, i, n in zip(("row", "column"), zoom, _grid(mask), strict=True):
        if not 0 <= i < n:
            raise IndexError(f"zoom {what} {i} is out of range; the mask has {n} {what}s of blocks, valid: {_valid(n)}")
    return zoom[0], zoom[1]
