"""How the kernels of one backward collect the gradients of captured tensors: the method of each load, and its buffer.

Only an INDIRECT load is collected by atomics, and not even that if the result shall be repeatable. Gradients of single
elements that do not go straight to their entries are stored to a workspace; where one for the whole grid would be large,
the grid is launched in parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codegen.access import USUAL, WORKSPACES, Access, Method, Methods, Pattern
from ..codegen.ir import Op
from ..codegen.linear import collect
from ..problem import Problem
from .captured_gradients import Block, CapturedGradients, block_of, inputs_of, scatter
from .invariant import is_invariant

# Bytes of all workspaces together. More if one program needs more, or BUSY ones do where the gradient itself is as large.
WORKSPACE = 256 << 20
BUSY = 264  # programs: two for each of the 132 multiprocessors of a Hopper GPU
FARTHEST = 2**31 - 1  # what 32 bits hold
SORTED = 1 << 22  # elements that are sorted at once
# Entries for what tiles that nobody visited have left: many, since the values of one are added one after another.
UNUSED = 1 << 10
NOWHERE = -(2**31)  # the first diagonal of such a tile


class Tiling(NamedTuple):
    """What a configuration makes of a grid: sizes of tiles and blocks, and tiles of queries a head.

    blocks: how many blocks of keys a program may visit.
    """

    BLOCK_M: int
    BLOCK_N: int
    SPARSE_Q: int
    SPARSE_KV: int
    tiles: int
    blocks: int

    def slots(self) -> int:
        """Tiles that a program may visit."""
        return self.blocks * -(-self.SPARSE_KV // self.BLOCK_N)

    def diagonals(self) -> int:
        """Sums that `store_diagonals` writes for a tile."""
        return (self.BLOCK_M + 2 * self.BLOCK_N - 2) // self.BLOCK_N * self.BLOCK_N

    def step(self) -> int:
        """What divides the first diagonal of every tile."""
        return math.gcd(self.BLOCK_M, self.BLOCK_N, self.SPARSE_Q, self.SPARSE_KV)

    def start(self, t: int) -> int:
        """The first query of tile `t`."""
        of_block = -(-self.SPARSE_Q // self.BLOCK_M)
        return t // of_block * self.SPARSE_Q + t % of_block * self.BLOCK_M


class _Piece(NamedTuple):
    """Programs `first` to `first + programs`, and the lines, of B * Hq * L, that they cover."""

    first: int
    programs: int
    line: int
    lines: int


class Collection:
    """The buffers that the gradients of `wanted` captured tensors are collected in.

    The methods are chosen for the problem's sizes, unless they are given, or the choice shall be `invariant`.

    Attributes:
        methods: how that of each of the derivative's loads is; None where it is not wanted, or zero.
        rows, columns: sums over keys [B, Hq, L] and over queries [B, Hq, S], float32, one for each load with the method.
    """

    def __init__(
        self,
        problem: Problem,
        wanted: Sequence[int],
        deterministic: bool = False,
        methods: Methods | None = None,
        invariant: bool = False,
    ) -> None:
        self.problem = problem
        self.gradients = CapturedGradients(problem, wanted, torch.float32)
        found = {c.access.load: c.access for c in self.gradients.contributions}
        self.blocks = {load: block_of(problem, to) for load, to in found.items()}
        loads = [load for load, _ in problem.variant.derivative.loads]
        if methods is None:
            blocks = {load: None if invariant else block for load, block in self.blocks.items()}
            chosen = {load: _method(problem, to, blocks[load], deterministic) for load, to in found.items()}
            methods = tuple(chosen.get(load) for load in loads)
        self.methods = methods
        self._by_method = [(found[load], m) for load, m in zip(loads, self.methods, strict=True) if m is not None]
        B, H, L, _ = problem.query.shape
        # Zeros, since nothing is written where there are no queries.
        self.rows = tuple(self._zeros(B, H, L) for _ in self._with("row"))
        self.columns = tuple(self._zeros(B, H, problem.key.shape[2]) for _ in self._with("column"))
        self._diagonals: list[_Diagonals] = []
        self._stored = [self._place_of(to) for to in self._with("store")]

    def parts(self, tiling: Tiling, programs: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Launches of the dQ kernel: programs, and arguments. What a launch has left is added up before the next."""
        widths = [n for to, method in self._by_method for n in self._widths(to, method, tiling)]
        if not widths:
            yield programs, {"dcaptured": self._flat([]), "first": 0, "first_line": 0, "slots": 0}
            return
        pieces = self._pieces(tiling, programs, self._most(tiling, sum(widths)))
        most = max(piece.programs for piece in pieces)
        buffers = [torch.empty(most * n, dtype=torch.float32, device=self.problem.query.device) for n in widths]
        self._diagonals = [_Diagonals.of(self.problem, tiling) for _ in self._with("diagonal")]
        self._name_entries(buffers)
        for piece in pieces:
            self._clear(buffers)
            place = {"first": piece.first, "first_line": piece.line, "slots": tiling.slots()}
            yield piece.programs, {"dcaptured": self._flat(buffers), **place}
            self._reduce(buffers, piece, tiling)

    def restart(self) -> None:
        """Forget what an earlier run of the dQ kernel has added up, which a further run would add to."""
        for total in self.gradients.totals():
            total.zero_()

    def of_queries(self) -> tuple[Tensor, ...]:
        """All that a run of the dQ kernel has left."""
        diagonals = (d.result(self.problem) for d in self._diagonals)
        return (*self.rows, *diagonals, *self._stored, *self.gradients.totals())

    def results(self) -> list[Tensor]:
        """The gradients, once all kernels have run."""
        put: dict[Method, Callable[[Access, Tensor], None]] = {
            "row": self.gradients.add_rows,
            "column": self.gradients.add_columns,
            "diagonal": self.gradients.add_diagonals,
            "store": self._add_stored,
        }
        own = {"row": iter(self.rows), "column": iter(self.columns), "store": iter(self._stored)}
        own["diagonal"] = iter([d.result(self.problem) for d in self._diagonals])
        for to, method in self._by_method:
            if method in put and (method != "diagonal" or self._diagonals):  # none without queries
                put[method](to, next(own[method]))
        return self.gradients.results()

    def _with(self, method: Method) -> list[Access]:
        return [to for to, m in self._by_method if m == method]

    def _place_of(self, to: Access) -> Tensor:
        """Where each element is stored: the sums themselves, if no other tile writes to them."""
        others = [
            m for other, m in self._by_method if other.number == to.number and m not in ("row", "column", "diagonal")
        ]
        sums = self.gradients.sums[to.number]
        return sums if len(others) == 1 else torch.zeros_like(sums)

    def _add_stored(self, to: Access, stored: Tensor) -> None:
        if stored is not self.gradients.sums[to.number]:
            self.gradients.sums[to.number] += stored

    def _each(self, buffers: Sequence[Tensor]) -> Iterator[tuple[Access, Method, list[Tensor]]]:
        """Each load, its method, and those of the workspaces that are its own."""
        rest = iter(buffers)
        for to, method in self._by_method:
            own = [next(rest) for _ in range(WORKSPACES.get(method, 0))]
            if len(own) == 2:
                own[1] = own[1].view(self._entry_type(to) if method == "sorted" else torch.int32)
            yield to, method, own

    def _flat(self, buffers: Sequence[Tensor]) -> tuple[Any, ...]:
        """The tuple that `tile_grads` unpacks, see `codegen.emit`."""
        flat: list[Any] = []
        stored = iter(self._stored)
        for to, method, own in self._each(buffers):
            flat += own
            if method in ("store", "atomic"):
                target = next(stored) if method == "store" else self.gradients.sums[to.number]
                if not target.numel():
                    target = target.new_zeros((1,) * target.dim())
                flat += [target, *target.stride()]
        return tuple(flat)

    def _widths(self, to: Access, method: Method, tiling: Tiling) -> list[int]:
        """Elements, of 4 bytes, that a program has in each workspace of a load."""
        match method:
            case "diagonal":
                return [tiling.slots() * tiling.diagonals(), tiling.slots()]
            case "workspace":
                return [tiling.BLOCK_M * self.problem.key.shape[2]]
            case "sorted":
                elements = tiling.slots() * tiling.BLOCK_M * tiling.BLOCK_N
                return [elements, elements * self._entry_type(to).itemsize // 4]
        return []

    def _entry_type(self, to: Access) -> torch.dtype:
        """What holds the number of an entry."""
        return torch.int64 if self.gradients.sums[to.number].numel() > FARTHEST else torch.int32

    def _clear(self, buffers: Sequence[Tensor]) -> None:
        """Set what must be known of tiles that nobody visits."""
        for _, method, own in self._each(buffers):
            if method == "diagonal":
                own[1].fill_(NOWHERE)
            elif own:
                own[0].zero_()

    def _name_entries(self, buffers: Sequence[Tensor]) -> None:
        """Spread what is not visited, and has the value 0, over all entries: a sum is as slow as its longest run."""
        for to, method, own in self._each(buffers):
            if method == "sorted":
                numbers = torch.arange(len(own[1]), dtype=own[1].dtype, device=own[1].device)
                own[1].copy_(numbers % max(1, self.gradients.sums[to.number].numel()))

    def _most(self, tiling: Tiling, width: int) -> int:
        """Programs of a part, each of which has `width` elements in workspaces."""
        indices = sum(8 * 4 * tiling.slots() * tiling.diagonals() // tiling.step() for _ in self._with("diagonal"))
        each = max(1, 4 * width + indices)
        largest = max(4 * self.gradients.sums[to.number].numel() for to, _ in self._by_method)
        # As much as a gradient takes may a workspace take, if that is what keeps the device busy.
        return max(1, WORKSPACE // each, min(largest // each, BUSY))

    def _pieces(self, tiling: Tiling, programs: int, most: int) -> list[_Piece]:
        """The grid in parts of at most `most` programs: whole heads, or parts of one."""
        L, tiles = self.problem.query.shape[2], tiling.tiles
        step = most // tiles * tiles or max(1, most // 16 * 16 or most)
        pieces = []
        first = 0
        while first < programs:
            stop = min(first + step, programs if step >= tiles else (first // tiles + 1) * tiles)
            begin, end = (p // tiles * L + tiling.start(p % tiles) for p in (first, stop))
            pieces.append(_Piece(first, stop - first, begin, end - begin))
            first = stop
        return pieces

    def _reduce(self, buffers: Sequence[Tensor], piece: _Piece, tiling: Tiling) -> None:
        """Add up what a launch has left in its workspaces."""
        diagonals = iter(self._diagonals)
        for to, method, own in self._each(buffers):
            if method == "diagonal":
                next(diagonals).add(own[0], own[1], piece, tiling)
            elif method == "workspace":
                self._add_heads(to, own[0], piece)
            elif method == "sorted":
                n = piece.programs * tiling.slots() * tiling.BLOCK_M * tiling.BLOCK_N
                self._add_sorted(to, own[0][:n], own[1][:n])

    def _add_heads(self, to: Access, workspace: Tensor, piece: _Piece) -> None:
        """Add the lines of a DENSE load: whole heads, or a part of one."""
        L, S = self.problem.query.shape[2], self.problem.key.shape[2]
        lines, H = min(piece.lines, L), self.problem.query.shape[1]
        first, number = piece.line // L, piece.lines // lines
        head = torch.arange(first, first + number, dtype=torch.int32, device=workspace.device).view(-1, 1, 1)
        inputs = inputs_of(self.problem, {"b": head // H, "h": head % H})
        values = workspace[: piece.lines * S].view(number, lines, S)
        block = self.blocks[to.load]
        if block is None:
            self.gradients.add_dense_beyond(to, values, inputs, piece.line % L)
        else:
            self.gradients.add_dense(to, block, values, inputs, (piece.line % L, 0))

    def _add_sorted(self, to: Access, values: Tensor, entries: Tensor) -> None:
        """Add elements, each to the entry that it has read."""
        for some, their in zip(values.split(SORTED), entries.split(SORTED), strict=True):
            self.gradients.add_entries(to, some, their)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.problem.query.device)


class _Diagonals(NamedTuple):
    """Sums [B * Hq * pieces + UNUSED, step]: those of a head, in pieces of `step`, begin `before` diagonals below 0."""

    sums: Tensor
    heads: int
    pieces: int
    before: int

    @classmethod
    def of(cls, problem: Problem, tiling: Tiling) -> _Diagonals:
        """Zeros, for whatever the tiles of a problem may reach."""
        (B, H, L, _), S, step = problem.query.shape, problem.key.shape[2], tiling.step()
        before = -(-(L + tiling.diagonals()) // step) * step
        pieces = -(-(before + S + tiling.diagonals()) // step)
        sums = torch.zeros(B * H * pieces + UNUSED, step, dtype=torch.float32, device=problem.query.device)
        return cls(sums, B * H, pieces, before)

    def add(self, workspace: Tensor, firsts: Tensor, piece: _Piece, tiling: Tiling) -> None:
        """Add what `store_diagonals` has written for each tile of a part of the grid."""
        n, step = piece.programs * tiling.slots(), self.sums.shape[1]
        each = tiling.diagonals() // step  # pieces of a tile
        first = firsts[:n].long()
        number = torch.arange(n, device=first.device)
        head = (piece.first + number // max(1, tiling.slots())) // tiling.tiles
        visited = first != NOWHERE
        row = torch.where(
            visited, head * self.pieces + (first + self.before) // step, self.heads * self.pieces + number % UNUSED
        )
        rows = row.view(-1, 1) + visited.view(-1, 1) * torch.arange(each, device=first.device)
        scatter(self.sums, rows.view(-1), workspace[: n * tiling.diagonals()].view(-1, step))

    def result(self, problem: Problem) -> Tensor:
        """The sums with kv_idx - q_idx = -(L - 1), ..., S - 1: [B, Hq, L + S - 1]."""
        (B, H, L, _), S = problem.query.shape, problem.key.shape[2]
        used = self.sums[: self.heads * self.pieces].view(B, H, -1)
        return used[..., self.before - (L - 1) : self.before + S]


def is_deterministic(options: Mapping[str, Any]) -> bool:
    """Whether gradients shall be the same bits in every run, by checked options of the backward or by torch's setting."""
    return bool(options.get("DETERMINISTIC")) or is_invariant(options) or torch.are_deterministic_algorithms_enabled()


def _method(problem: Problem, to: Access, block: Block | None, deterministic: bool) -> Method:
    if to.pattern is Pattern.DENSE and (block is None or not _is_exclusive(problem, to)):
        return "workspace"
    if to.pattern is Pattern.INDIRECT and deterministic:
        return "sorted"
    return USUAL[to.pattern]


def _is_exclusive(problem: Problem, to: Access) -> bool:
    """Whether no two batch entries or heads read one entry of a DENSE tensor."""
    B, H = problem.query.shape[:2]
    shape = problem.captured[to.number].shape
    own = {name: n for name, n in zip(map(_only_input, to.indices), shape, strict=True) if name is not None}
    return all(n == 1 or own.get(name, 0) >= n for name, n in (("b", B), ("h", H)))


@lru_cache(maxsize=1024)
def _only_input(index: Any) -> str | None:
    """The name of the input that an index is, if it is nothing else."""
    terms, constant = collect(index)
    alone = [n for n, times in terms.items() if n.op is Op.INPUT and times == 1]
    return str(alone[0].value) if len(terms) == len(alone) == 1 and constant == 0 else None
