"""What `bench_variants.py` times: problems, and the ways through our own kernels that each pass has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from gpu_suites import LARGE, LLAMA, SMALL, TINY, TINYLLAMA, Cell, Shape

from flexattn.backends import hopper
from flexattn.config import KernelConfig, option_names

# Products of a pass, in units of the forward's two; dQ and dK/dV alone compute scores again, which a whole backward
# does not get credit for.
WORK = {"forward": 1.0, "dq": 1.5, "dkdv": 2.0, "backward": 2.5}
PASSES = tuple(WORK)
TWO_PASSES: Mapping[str, Any] = {"ONE_PASS": False}
ONE_PASS: Mapping[str, Any] = {"ONE_PASS": True}
ORDINARY: Mapping[str, Any] = {hopper.OPTION: False}
WIDE = Shape(1, 16, 16, 256)
ODD = tuple(Shape(4, 16, 16, D) for D in (96, 192))


class Variant(NamedTuple):
    """One way to compute a pass.

    Attributes:
        name: in words; the first of a pass, "default", is what the library chooses by itself.
        options: kernel options.
        switches: what no option can say, by the names of `variant_steps.SWITCHED`.
    """

    name: str
    options: Mapping[str, Any]
    switches: tuple[str, ...] = ()


def _c(M: int, N: int, warps: int, stages: int, upright: bool = False) -> KernelConfig:
    return KernelConfig(M, N, warps, stages, upright=upright)


# By padded head dimension: the tiles that are tried with each way to load them.
FORWARD = {
    64: (_c(128, 64, 4, 2), _c(128, 64, 4, 3), _c(128, 128, 8, 2), _c(128, 64, 8, 3)),
    128: (_c(128, 128, 8, 2), _c(128, 64, 8, 3), _c(128, 64, 8, 2)),
    256: (_c(128, 64, 8, 2), _c(64, 64, 4, 2)),
}
DQ = {
    64: (_c(128, 64, 8, 2), _c(128, 64, 8, 3), _c(128, 128, 8, 2), _c(64, 64, 4, 2)),
    128: (_c(128, 64, 8, 2), _c(128, 64, 8, 3), _c(128, 128, 8, 2), _c(64, 64, 4, 2)),
    256: (_c(64, 64, 8, 2), _c(128, 64, 8, 1), _c(64, 32, 4, 2)),
}
DKDV = {
    64: (_c(64, 128, 8, 2), _c(128, 64, 8, 2, True), _c(64, 64, 4, 2, True), _c(64, 64, 4, 2)),
    128: (_c(64, 128, 8, 2), _c(32, 128, 8, 2), _c(128, 64, 8, 2, True), _c(64, 64, 4, 2, True)),
    256: (_c(16, 64, 8, 2), _c(64, 64, 8, 1, True), _c(32, 64, 8, 2)),
}
IN_ONE_PASS = {
    64: (_c(64, 128, 8, 2), _c(64, 64, 4, 2, True), _c(128, 64, 8, 1, True)),
    128: (_c(64, 128, 8, 2), _c(64, 64, 4, 2, True), _c(128, 64, 8, 1, True)),
    256: (_c(32, 64, 8, 1), _c(64, 64, 8, 1, True)),
}
SPECIALIZED = {64: ((128, 3), (128, 2), (64, 4)), 128: ((128, 2), (64, 4), (64, 2))}  # keys of a tile, stages
BY = {"pointers": {"tma": False}, "tma": {"tma": True}}
LATE = {"tma overlap": {"tma": True, "overlap": True}}


def variants(part: str, cell: Cell) -> list[Variant]:
    """The ways of a pass, the default first."""
    return list({v.name: v for v in _OF_PASS[part](cell)}.values())


def pinned(which: Any, ways: Mapping[str, Mapping[str, bool]], tiles: Any, more: Any, D: int) -> Iterator[Variant]:
    """Every tile for a head dimension, loaded in every way."""
    names = option_names(which)
    row = min((d for d in tiles if d >= D), default=max(tiles))
    for config, (way, parts) in product(tiles[row], ways.items()):
        options = {name: getattr(config._replace(**parts), part) for part, name in names.items()}
        tile = f"{config.BLOCK_M}x{config.BLOCK_N} w{config.num_warps} s{config.num_stages}"
        words = [*(["one pass"] if which == "one_pass" else []), tile, *(["upright"] if config.upright else []), way]
        yield Variant(" ".join(words), options | dict(more))


def forward(cell: Cell) -> Iterator[Variant]:
    yield Variant("default", {})
    yield from pinned("forward", BY | LATE, FORWARD, ORDINARY, cell.D)
    for keys, stages in SPECIALIZED.get(cell.D, ()):
        options = {hopper.OPTION: True, "BLOCK_N": keys, "num_stages": stages}
        yield Variant(f"warp specialized {hopper.BLOCK_M}x{keys} s{stages}", options)
    yield from orders(cell, {})
    yield from padded(cell, {})


def dq(cell: Cell) -> Iterator[Variant]:
    yield Variant("default", TWO_PASSES)
    yield from pinned("dq", BY, DQ, TWO_PASSES, cell.D)
    yield from padded(cell, TWO_PASSES)


def dkdv(cell: Cell) -> Iterator[Variant]:
    yield Variant("default", TWO_PASSES)
    yield from pinned("dkdv", BY, DKDV, TWO_PASSES, cell.D)
    yield from padded(cell, TWO_PASSES)


def backward(cell: Cell) -> Iterator[Variant]:
    """The whole of it, from delta to the last sum: what two passes and one are compared by."""
    yield Variant("default", {})
    yield Variant("two passes", TWO_PASSES)
    yield Variant("two passes pointers", {**TWO_PASSES, "USE_TMA": False})
    yield from pinned("one_pass", BY, IN_ONE_PASS, ONE_PASS, cell.D)
    yield from orders(cell, TWO_PASSES)
    yield from padded(cell, {})
    if cell.Hq != cell.Hkv:
        yield Variant("two passes, groups whole", TWO_PASSES, ("groups whole",))
        yield Variant("one pass", ONE_PASS)
        yield Variant("one pass, groups whole", ONE_PASS, ("groups whole",))


def orders(cell: Cell, options: Mapping[str, Any]) -> Iterator[Variant]:
    """Other orders of the programs. Without a mask all rows are equally long."""
    if cell.case != "noop":
        yield Variant("tiles as they come", options, ("as they come",))
        yield Variant("tiles as they come, one head at a time", options, ("as they come", "one head at a time"))
    yield Variant("one head at a time", options, ("one head at a time",))


def padded(cell: Cell, options: Mapping[str, Any]) -> Iterator[Variant]:
    """Head dimensions that are no power of two, padded to one."""
    if cell.D & (cell.D - 1):
        yield Variant("padded", {**options, "PIECES": False})


_OF_PASS = {"forward": forward, "dq": dq, "dkdv": dkdv, "backward": backward}


def cells(lengths: list[int], cases: tuple[str, ...], shape: Shape) -> list[Cell]:
    return [Cell(case, "bfloat16", shape.B, shape.Hq, shape.Hkv, S, shape.D) for S, case in product(lengths, cases)]


# In order of what they decide: a run may end anywhere.
CELLS = [
    *cells([8192], ("causal",), LARGE),
    *cells([8192], ("causal",), SMALL),
    *cells([2048], ("causal",), TINYLLAMA),
    *cells([8192], ("noop",), LARGE),
    *cells([8192], ("noop",), SMALL),
    *cells([8192], ("document", "alibi", "softcap"), LLAMA),
    *cells([8192], ("document", "alibi", "softcap"), SMALL),
    *cells([8192], ("causal",), WIDE),
    *cells([2048], ("causal", "noop"), LARGE),
    *cells([2048], ("causal", "noop", "document"), SMALL),
    *cells([32768], ("causal",), SMALL),
    *cells([2048], ("noop",), WIDE),
    *(cell for shape in ODD for cell in cells([4096], ("causal",), shape)),
]
SMOKE = cells([40], ("causal", "noop", "document"), TINY)


def cell_name(cell: Cell) -> str:
    """As --cells has it: causal-B1H64/8D128-S8192."""
    return f"{cell.case}-{cell.shape}-S{cell.S}"
