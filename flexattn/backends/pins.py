"""Options of the kernels that a caller pins and that cannot be followed: the reason, for a pass of a problem on a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import triton
from torch import Tensor

from ..config import Pass, fitted
from ..kernel_options import options_of, unfollowed
from ..problem import Problem
from .descriptors import LARGEST_BOX, describable, indescribable
from .invariant import by_one_form, is_invariant
from .launch import on_device
from .products import padded, pieces
from .target import interpreted

THREADS = 1024  # of a program, at most, on all GPUs
OPERANDS = {"q": "query", "k": "key", "v": "value", "dout": "the gradient of the output"}


class Tiles(NamedTuple):
    """Queries and keys of a tile, and of the blocks that tiles cover."""

    BLOCK_M: int
    BLOCK_N: int
    SPARSE_Q: int
    SPARSE_KV: int


class Facts(NamedTuple):
    """What a pass is asked to do.

    Attributes:
        which: the pass.
        problem: its operands.
        read: those that it reads by tiles, named as in `OPERANDS`.
        tiles: of a configuration of ordinary size, with what is pinned.
        target: backend and architecture, as Triton says them; None in its interpreter.
        invariant: whether the choice may depend on no length.
        sums_columns: whether gradients of captured tensors are summed by keys.
    """

    which: Pass
    problem: Problem
    read: Mapping[str, Tensor]
    tiles: Tiles
    target: Any
    invariant: bool
    sums_columns: bool

    @property
    def place(self) -> str:
        """The target in words."""
        return f"{self.target.backend} {self.target.arch}"


def check(
    options: Mapping[str, Any],
    which: Pass,
    problem: Problem,
    read: Mapping[str, Tensor],
    tiles: Callable[[], Tiles],
    sums_columns: bool,
) -> None:
    """Raise `ValueError` if a pass cannot follow what the caller pins. Arguments as in `Facts`; `options` are checked."""
    forward = which == "forward"
    said = options_of(options, forward)
    asked = [name for name in OBSTACLES if said.get(name)]
    if not asked:
        return
    with on_device(problem.query.device):
        target = None if interpreted() else triton.runtime.driver.active.get_current_target()
    facts = Facts(which, problem, read, tiles(), target, is_invariant(said), sums_columns)
    for name in asked:
        why = OBSTACLES[name](facts, said[name])
        if why:
            raise unfollowed(options, forward, name, why)


def _by_tma(facts: Facts, _: Any) -> str:
    if facts.target is not None and (facts.target.backend != "cuda" or facts.target.arch < 90):
        return f"NVIDIA GPUs have a tensor memory accelerator from compute capability 9.0 on, and this is {facts.place}"
    for name, t in facts.read.items():
        if t.numel() and not (describable(t) and (by_one_form(t) or not facts.invariant)):
            return f"{OPERANDS[name]} {indescribable(t)}"
    sizes = facts.tiles
    if sizes.SPARSE_Q % sizes.BLOCK_M or sizes.SPARSE_KV % sizes.BLOCK_N:
        return (
            f"TMA needs tiles that end where blocks of the mask do, and BLOCK_SIZE is {tuple(facts.problem.block_size)}; "
            "make the block mask with multiples of 16, such as the default BLOCK_SIZE=128"
        )
    if max(sizes.BLOCK_M, sizes.BLOCK_N) > LARGEST_BOX:
        return f"TMA loads at most {LARGEST_BOX} rows at once; write tiles that are no larger"
    return ""


def _late(facts: Facts, _: Any) -> str:
    return _by_tma(facts, True) if facts.which == "forward" else ""


def _upright(facts: Facts, _: Any) -> str:
    if not facts.sums_columns:
        return ""
    return "the gradient of a captured tensor that is read by key is summed over queries, which are columns of the tile then"


def _in_pieces(facts: Facts, _: Any) -> str:
    for n in (facts.problem.query.shape[-1], facts.problem.value.shape[-1]):
        if not pieces(n).rest and padded(n) != n:
            return (
                f"a head dimension of {n} is padded to {padded(n)}, since no two pieces, the first of 64 or 128 columns, have "
                "at most three quarters of that"
            )
    return ""


def _fast_tanh(facts: Facts, _: Any) -> str:
    if facts.target is None or (facts.target.backend == "cuda" and facts.target.arch >= 75):
        return ""
    return f"NVIDIA GPUs have the instruction from compute capability 7.5 on, and this is {facts.place}"


def _threads(facts: Facts, warps: int) -> str:
    if facts.target is None or warps * facts.target.warp_size <= THREADS:
        return ""
    most = THREADS // facts.target.warp_size
    return f"a program has at most {THREADS} threads, which are {most} warps of {facts.place}; write {most} or fewer"


def _of_amd(facts: Facts, _: Any) -> str:
    if facts.target is None or facts.target.backend == "hip":
        return ""
    return f"it is about AMD's GPUs, and this is {facts.place}"


def _divides(passes: tuple[Pass, ...], side: int) -> Callable[[Facts, Any], str]:
    """The obstacle of a tile's size in some passes, for queries (0) or keys (1)."""

    def why(facts: Facts, tile: int) -> str:
        block = facts.problem.block_size[side]
        if facts.which not in passes or not facts.problem.block_mask or fitted(tile, block) == tile:
            return ""
        what = ("queries", "keys")[side]
        return (
            f"the blocks of the mask have {block} {what}; write {fitted(tile, block)}, or make the block mask with a "
            f"BLOCK_SIZE of {tile} {what}"
        )

    return why


OBSTACLES: dict[str, Callable[[Facts, Any], str]] = {
    "BLOCK_M": _divides(("forward",), 0),
    "BLOCK_N": _divides(("forward",), 1),
    "BLOCK_M1": _divides(("dkdv", "one_pass"), 0),
    "BLOCK_N1": _divides(("dkdv", "one_pass"), 1),
    "BLOCK_M2": _divides(("dq",), 0),
    "BLOCK_N2": _divides(("dq",), 1),
    "num_warps": _threads,
    "USE_TMA": _by_tma,
    "OVERLAP": _late,
    "UPRIGHT": _upright,
    "PIECES": _in_pieces,
    "FAST_TANH": _fast_tanh,
    "kpack": _of_amd,
    "matrix_instr_nonkdim": _of_amd,
    "waves_per_eu": _of_amd,
}
