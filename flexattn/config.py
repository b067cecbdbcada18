"""Configurations of the kernels: tiles, warps and pipeline depth, by pass, head dimension, dtype and architecture.

A *chain* is a list to be tried in order: the first configuration that fits the device's shared memory and compiles
without spilled registers is taken. It begins with what the table recommends and goes down to what fits anywhere.
*Candidates* are a wider list, to be timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Pass = Literal["forward", "dq", "dkdv", "one_pass"]  # the last: dK, dV and dQ by one kernel
Product = Literal["half", "tf32", "ieee"]  # 16-bit operands; float32 on the matrix units; float32 without them


class KernelConfig(NamedTuple):
    """One way to compile a kernel.

    Attributes:
        BLOCK_M: query rows of a tile, a power of two, at least 16.
        BLOCK_N: keys of a tile, likewise.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        tma: whether tiles are loaded by the tensor memory accelerator, where the operands permit it.
        overlap: whether the forward adds values one tile late, while it computes the next softmax; only with `tma`.
        upright: whether tiles of the dK/dV kernel have queries as rows; not where sums of columns are collected.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    tma: bool = False
    overlap: bool = False
    upright: bool = False


class Pinned(NamedTuple):
    """The parts of a configuration that the caller insists on; None is free."""

    BLOCK_M: int | None = None
    BLOCK_N: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    tma: bool | None = None
    overlap: bool | None = None
    upright: bool | None = None


BY_KEY: tuple[Pass, ...] = ("dkdv", "one_pass")  # a program's own side is the keys'; it walks over queries
FREE = Pinned()
_C = KernelConfig

# By (pass, family, kind of product), then by the padded head dimension up to which a row serves.
# Starting points: the heuristics of PyTorch's flex_attention for the same GPUs, corrected by what compiles without spills.
RECOMMENDED: dict[tuple[Pass, str, Product], dict[int, KernelConfig]] = {
    ("forward", "hopper", "half"): {64: _C(128, 64, 4, 3), 128: _C(128, 64, 8, 3), 256: _C(128, 64, 8, 2)},
    ("forward", "datacenter", "half"): {64: _C(128, 64, 4, 3), 128: _C(128, 64, 8, 3), 256: _C(64, 64, 4, 2)},
    ("forward", "consumer", "half"): {64: _C(128, 64, 4, 3), 128: _C(128, 32, 4, 3), 256: _C(64, 32, 4, 2)},
    ("forward", "amd", "half"): {64: _C(128, 64, 4, 1), 128: _C(128, 64, 4, 1), 256: _C(64, 32, 4, 1)},
    ("dq", "hopper", "half"): {
        64: _C(128, 64, 8, 3),
        128: _C(128, 64, 8, 3),
        192: _C(128, 64, 8, 2),
        256: _C(64, 64, 8, 2),
    },
    ("dq", "datacenter", "half"): {64: _C(128, 64, 8, 3), 128: _C(64, 64, 4, 2), 256: _C(64, 32, 4, 1)},
    ("dq", "consumer", "half"): {64: _C(64, 64, 4, 2), 128: _C(64, 32, 4, 2), 256: _C(32, 32, 4, 1)},
    ("dq", "amd", "half"): {64: _C(64, 64, 4, 1), 128: _C(64, 32, 4, 1), 256: _C(32, 32, 4, 1)},
    ("dkdv", "hopper", "half"): {
        64: _C(64, 128, 8, 2),
        128: _C(32, 128, 8, 2),
        192: _C(32, 64, 8, 2),
        256: _C(16, 64, 8, 2),
    },
    ("dkdv", "datacenter", "half"): {64: _C(64, 128, 8, 2), 128: _C(64, 64, 8, 2), 256: _C(32, 64, 8, 1)},
    ("dkdv", "consumer", "half"): {64: _C(64, 64, 4, 2), 128: _C(32, 64, 4, 2), 256: _C(16, 32, 4, 1)},
    ("dkdv", "amd", "half"): {64: _C(64, 64, 4, 1), 128: _C(32, 64, 4, 1), 256: _C(16, 32, 4, 1)},
    ("one_pass", "hopper", "half"): {
        80: _C(64, 128, 8, 2)
    },  # at 96 and more, this tile spills; whether others are worth it is to be measured
    ("forward", "any", "tf32"): {64: _C(64, 64, 8, 2), 128: _C(32, 64, 4, 2), 256: _C(32, 32, 4, 2)},
    ("dq", "any", "tf32"): {64: _C(64, 32, 4, 2), 128: _C(32, 32, 4, 2), 256: _C(16, 32, 4, 1)},
    ("dkdv", "any", "tf32"): {64: _C(32, 32, 4, 2), 128: _C(32, 32, 4, 2), 256: _C(16, 16, 4, 1)},
    ("forward", "any", "ieee"): {64: _C(64, 32, 8, 2), 128: _C(32, 32, 8, 1), 256: _C(32, 32, 8, 2)},
    ("dq", "any", "ieee"): {64: _C(64, 32, 8, 2), 128: _C(32, 32, 8, 1), 256: _C(16, 32, 8, 1)},
    ("dkdv", "any", "ieee"): {64: _C(32, 64, 8, 2), 128: _C(32, 32, 8, 2), 256: _C(16, 32, 8, 1)},
}

# What is tried before the recommendation, where registers allow it: larger tiles, products that a softmax overlaps.
AHEAD: dict[tuple[Pass, str, Product], dict[int, tuple[KernelConfig, ...]]] = {
    ("forward", "hopper", "half"): {
        64: (_C(128, 128, 8, 2, overlap=True),),
        128: (_C(128, 128, 8, 2, overlap=True), _C(128, 64, 8, 3, overlap=True)),
        256: (_C(128, 64, 8, 2, overlap=True),),
    },
    ("dkdv", "hopper", "half"): {128: (_C(128, 64, 8, 2, upright=True),)},
}

# What is tried after the recommendation, largest first.
LADDER = (
    _C(128, 64, 8, 2),
    _C(64, 64, 8, 2),
    _C(128, 32, 8, 2),
    _C(64, 64, 4, 2),
    _C(64, 32, 8, 2),
    _C(64, 32, 4, 2),
    _C(32, 64, 4, 2),
    _C(32, 32, 4, 2),
    _C(32, 32, 4, 1),
    _C(16, 32, 4, 1),
    _C(32, 16, 4, 1),
    _C(16, 16, 4, 1),
)


def family(backend: str, arch: int | str) -> str:
    """The row of the table for a target: backend "cuda" with compute capability 90, or "hip" with "gfx942"."""
    if backend == "hip":
        return "amd"
    if arch in (90, 100, 103):
        return "hopper"
    return "datacenter" if arch == 80 else "consumer"


def chain(
    which: Pass,
    backend: str,
    arch: int | str,
    product: Product,
    head_dim: int,
    pinned: Pinned = FREE,
    ahead: bool = True,
) -> tuple[KernelConfig, ...]:
    """Configurations to try, in order. `head_dim` is the larger of the two padded head dimensions.

    What is pinned is the same in all of them. `ahead`: whether to begin with those that need most registers.
    """
    place = which, family(backend, arch) if product == "half" else "any", product
    rows = RECOMMENDED.get(place) or RECOMMENDED["dkdv", place[1], product]
    row = min((d for d in rows if d >= head_dim), default=max(rows))
    first = rows[row]
    stages = 1 if backend == "hip" else 2
    smaller = [c for c in LADDER if c.BLOCK_M * c.BLOCK_N <= first.BLOCK_M * first.BLOCK_N]
    candidates = [first, first._replace(num_stages=min(first.num_stages, stages)), *smaller]
    if which in BY_KEY:  # the program's own side is the keys'
        candidates[2:] = [c._replace(BLOCK_M=c.BLOCK_N, BLOCK_N=c.BLOCK_M) for c in smaller]
    candidates[:0] = AHEAD.get(place, {}).get(row, ()) if ahead else ()
    by_tma = family(backend, arch) == "hopper" and product == "half"
    fixed = {name: value for name, value in pinned._asdict().items() if value is not None}
    return tuple(dict.fromkeys(c._replace(**{"tma": by_tma, **fixed}) for c in candidates))


def prefers_one_pass(backend: str, arch: int | str, product: Product, head_dim: int) -> bool:
    """Whether a backward in one pass is expected to be faster than one in two."""
    rows = RECOMMENDED.get(("one_pass", family(backend, arch), product), {})
    return any(d >= head_dim for d in rows)


# What candidates vary, beside those of the chain: the values of a part of a configuration, in steps of one.
AXES: dict[str, tuple[Any, ...]] = {
    "BLOCK_M": (32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
}
BY_TMA: dict[Pass, dict[str, tuple[Any, ...]]] = {  # where the recommendation loads by TMA
    "forward": {"tma": (False, True), "overlap": (False, True)},
    "dq": {"tma": (False, True)},
    "dkdv": {"tma": (False, True), "upright": (False, True)},
    "one_pass": {"tma": (False, True), "upright": (False, True)},
}


def candidates(
    which: Pass, backend: str, arch: int | str, product: Product, head_dim: int, pinned: Pinned = FREE
) -> tuple[KernelConfig, ...]:
    """Configurations to time, without regard to what fits: the chain's, and all that `AXES` has.

    They begin with the recommendation and go on in order of their distance from it, counted in steps along the axes; at
    the same distance the larger tile is first. What is pinned is the same in all of them.
    """
    rungs = chain(which, backend, arch, product, head_dim, pinned)
    fixed = {name: value for name, value in pinned._asdict().items() if value is not None}
    axes = AXES | (BY_TMA[which] if rungs[0].tma else {})
    every = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    wider = [rungs[0]._replace(**{**values, **fixed}) for values in every]
    found = tuple(dict.fromkeys((*rungs, *wider)))
    steps = {name: sorted({getattr(c, name) for c in found}) for name in KernelConfig._fields}

    def rank(config: KernelConfig) -> tuple[int, int]:
        places = [
            (steps[n].index(value), steps[n].index(getattr(rungs[0], n))) for n, value in config._asdict().items()
        ]
        return sum(abs(own - first) for own, first in places), -config.BLOCK_M * config.BLOCK_N

    return tuple(sorted(found, key=rank))


def least_shared_memory(which: Pass, config: KernelConfig, row_bytes: int) -> int:
    """Bytes of shared memory that a kernel needs at least: all stages but one of the pipeline hold a tile of both operands.

    `row_bytes` is the size of a row of both. Saves compiling what cannot fit.
    """
    rows = config.BLOCK_M if which in BY_KEY else config.BLOCK_N
    return (config.num_stages - 1) * rows * row_bytes


def pinned(which: Pass, options: Mapping[str, Any]) -> Pinned:
    """What checked kernel options, those of the forward or of the backward, say about one pass."""
    found = Pinned(**{part: options.get(name) for part, name in option_names(which).items()})
    if which not in BY_KEY:
        found = found._replace(upright=None)
    if which != "forward":
        return found._replace(overlap=None)
    return found._replace(tma=True) if found.overlap and found.tma is None else found  # values are late only by TMA


def option_names(which: Pass) -> dict[str, str]:
    """The kernel option that pins each part of a configuration of a pass."""
    suffix = {"forward": "", "dkdv": "1", "one_pass": "1", "dq": "2"}[which]
    switches = {"tma": "USE_TMA", "overlap": "OVERLAP", "upright": "UPRIGHT"}
    return {name: name + suffix if name.startswith("BLOCK_") else switches.get(name, name) for name in Pinned._fields}


def fitted(tile: int, block: int) -> int:
    """The size of a tile inside a sparse block: `tile`, halved until it divides the block.

    A block that no power of two from 16 on divides is covered by tiles that reach beyond it.
    """
    dividing = tile
    while dividing > 16 and block % dividing:
        dividing //= 2
    if block % dividing == 0:
        return dividing
    return min(tile, max(16, 1 << (min(block, 64) - 1).bit_length()))


def covered(block: int, length: int, tile: int) -> int:
    """The part of a block that tiles cover: no more than the whole axis needs, if it is a single block."""
    return min(block, max(tile, 1 << (length - 1).bit_length())) if block >= length > 0 else block
