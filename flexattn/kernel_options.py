"""Options of the kernels that a user may pin, as one table: name, type, and what it does.

The names are those of `torch.nn.attention.flex_attention`. Options tune GPU kernels and never change a result beyond rounding,
but for FAST_TANH. The kernels follow what is pinned; where the operands or the GPU do not permit it, the call raises
`ValueError`, and says why. The tiled and reference backends have nothing to tune: they accept all options without effect, but
for BATCH_INVARIANT, so that code with options for a GPU runs on a CPU too.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Option(NamedTuple):
    """What a value of the option must be, and its meaning."""

    kind: str  # power of two, positive integer, bool or backend, as `_fits` reads it
    meaning: str


_TILE, _COUNT = "power of two from 16 to 512", "positive integer"
_IGNORED = "accepted without effect: "

OPTIONS: dict[str, Option] = {
    "BLOCK_M": Option(_TILE, "query rows of a forward tile; it must divide the blocks of the mask"),
    "BLOCK_N": Option(_TILE, "keys of a forward tile, likewise"),
    "BLOCK_M1": Option(_TILE, "query rows of a tile in the dK/dV pass"),
    "BLOCK_N1": Option(_TILE, "keys of a tile in the dK/dV pass"),
    "BLOCK_M2": Option(_TILE, "query rows of a tile in the dQ pass; pinned, the backward has two passes"),
    "BLOCK_N2": Option(_TILE, "keys of a tile in the dQ pass, likewise"),
    "num_warps": Option("power of two, at most 32", "warps of a program"),
    "num_stages": Option(_COUNT, "depth of the software pipeline"),
    "BLOCKS_ARE_CONTIGUOUS": Option(
        "bool",
        "a statement: the full blocks of every list are adjacent. Checked once for each mask; where it is true they are "
        "counted, not read. Set by itself where `create_block_mask` found it so",
    ),
    "DETERMINISTIC": Option(
        "bool",
        "the backward gives the same bits in every run: it has two passes, and gradients of captured tensors that are read "
        "at arbitrary indices are stored and sorted, instead of added by atomics; the same as under "
        "torch.use_deterministic_algorithms(True)",
    ),
    "BATCH_INVARIANT": Option(
        "bool",
        "what a batch entry gets depends on nothing but itself, to the bit; includes DETERMINISTIC. Set by "
        "flex_attention(batch_invariant=), which also brings documents to the beginnings of blocks. All backends obey it",
    ),
    "AUTOTUNE": Option(
        "bool",
        "configurations are chosen by timing them, at the first call of a kind; the choice is kept on disk. What else is "
        "pinned stays so",
    ),
    "USE_TMA": Option(
        "bool",
        "tiles are loaded by the tensor memory accelerator, which NVIDIA GPUs have from compute capability 9.0 on; on by "
        "itself for 9.0, 10.0 and 10.3 and 16-bit types, where strides, alignment and the blocks of the mask permit",
    ),
    "OVERLAP": Option(
        "bool",
        "the forward adds values one tile late, so that a softmax overlaps a product; tiles are loaded by TMA then",
    ),
    "UPRIGHT": Option(
        "bool",
        "tiles of the dK/dV pass have queries as rows: fewer registers, more shared memory; not where gradients of captured "
        "tensors are summed by keys",
    ),
    "PIECES": Option(
        "bool",
        "head dimensions such as 80, 96 and 192 are computed as 64 + 16, 64 + 32 and 128 + 64 columns instead of being padded "
        "to a power of two, where that saves a quarter; on by itself",
    ),
    "ONE_PASS": Option(
        "bool",
        "the backward computes dQ with dK and dV in one kernel, added by atomics, in an order that differs from run to run; on "
        "by itself for compute capability 9.0, 10.0 and 10.3, 16-bit types and head dimensions up to 80, but not where learned "
        "tensors are read by head, row or element",
    ),
    "WARP_SPECIALIZED": Option(
        "bool",
        "the forward runs the warp-specialised kernel for GPUs of compute capability 9.0, an error on a GPU where it cannot; "
        "off by default, since it has not been measured on a GPU",
    ),
    "FAST_TANH": Option(
        "bool",
        "tanh in a mod, of a softcap for example, is the GPU's own instruction, with a relative error of 2^-11, as small as "
        "the rounding of 16-bit inputs; NVIDIA only. The interpreter, which has no such instruction, computes it exactly",
    ),
    "kpack": Option(_COUNT, "AMD only: packing of the matrix operands"),
    "matrix_instr_nonkdim": Option(_COUNT, "AMD only: shape of the matrix instruction"),
    "waves_per_eu": Option(_COUNT, "AMD only: occupancy target"),
    "BACKEND": Option("backend", 'PyTorch\'s choice of kernel; "AUTO" and "TRITON" are accepted'),
    "SPLIT_KV": Option(_COUNT, _IGNORED + "there is no decoding kernel that splits the keys"),
    "FORCE_USE_FLEX_ATTENTION": Option("bool", _IGNORED + "there is no decoding kernel to avoid"),
    "PRESCALE_QK": Option("bool", _IGNORED + "the scale is part of the exponent wherever no mod needs it earlier"),
    "ROWS_GUARANTEED_SAFE": Option("bool", _IGNORED + "rows that attend to nothing are always handled"),
    "WRITE_DQ": Option("bool", _IGNORED + "the dQ pass writes dQ and the gradients of captured tensors"),
}
_TILES = frozenset(name for name, option in OPTIONS.items() if option.kind == _TILE)
PREFIXES = ("fwd_", "bwd_")
_FORWARD, _BACKWARD = "it is about the forward alone", "it is about the backward alone"
_BOTH = "gradients are of the same documents as results"
_TIMED = "a choice by time depends on the batch that was timed"
_MEANINGLESS = {
    "fwd_FAST_TANH": "the backward computes the scores of the forward again, by the same tanh",
    "bwd_FAST_TANH": "the backward computes the scores of the forward again, by the same tanh",
    "fwd_DETERMINISTIC": "it is the backward that may differ from run to run",
    "fwd_BATCH_INVARIANT": _BOTH,
    "bwd_BATCH_INVARIANT": _BOTH,
    "bwd_WARP_SPECIALIZED": "only the forward has such a kernel",
    "bwd_OVERLAP": _FORWARD,
    "fwd_UPRIGHT": _BACKWARD,
    "fwd_ONE_PASS": _BACKWARD,
}
_ATOMICS = "one pass adds to dQ by atomics, in an order that differs from run to run"
_NO_DQ_PASS = "a backward in one pass has no dQ pass"


class _Contradiction(NamedTuple):
    """An option that is True, and another one of the same direction whose value it contradicts: any, if `against` is None."""

    name: str
    forward: bool
    other: str
    against: bool | None
    why: str


_CONTRADICTIONS = (
    _Contradiction("ONE_PASS", False, "DETERMINISTIC", True, _ATOMICS),
    _Contradiction("ONE_PASS", False, "BATCH_INVARIANT", True, _ATOMICS),
    _Contradiction("ONE_PASS", False, "BLOCK_M2", None, _NO_DQ_PASS),
    _Contradiction("ONE_PASS", False, "BLOCK_N2", None, _NO_DQ_PASS),
    _Contradiction("AUTOTUNE", True, "BATCH_INVARIANT", True, _TIMED),
    _Contradiction("AUTOTUNE", False, "BATCH_INVARIANT", True, _TIMED),
    _Contradiction(
        "OVERLAP", True, "USE_TMA", False, "values are added late only where TMA reads zeros beyond the end"
    ),
    _Contradiction("WARP_SPECIALIZED", True, "USE_TMA", False, "the warp-specialised kernel loads by TMA"),
    _Contradiction("WARP_SPECIALIZED", True, "OVERLAP", False, "the warp-specialised kernel adds values one tile late"),
)


def check_kernel_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options as a dict. Raises `ValueError` for an unknown name or a value it cannot take."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"kernel_options is a {type(options).__name__}; pass a dict such as {{'BLOCK_M': 64}}")
    for name, value in options.items():
        bare = name[4:] if isinstance(name, str) and name.startswith(PREFIXES) else name
        if bare not in OPTIONS:
            close = difflib.get_close_matches(str(bare), OPTIONS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"unknown kernel option {name!r}; {hint}Known options, each with an optional prefix fwd_ or bwd_: "
                + ", ".join(OPTIONS)
            )
        if name != bare and bare in _TILES and (bare[-1] in "12") == name.startswith("fwd_"):
            raise ValueError(
                f"kernel option {name!r} has no meaning: BLOCK_M and BLOCK_N are tiles of the forward, BLOCK_M1 and BLOCK_N1 "
                "of the backward's dK/dV pass, BLOCK_M2 and BLOCK_N2 of its dQ pass"
            )
        if name != bare and name in _MEANINGLESS:
            raise ValueError(f"kernel option {name!r} has no meaning: {_MEANINGLESS[name]}; write {bare!r}")
        kind = OPTIONS[bare].kind
        if not _fits(kind, value):
            allowed = '"AUTO" or "TRITON"' if kind == "backend" else f"a {kind}"
            raise ValueError(f"kernel option {name!r} is {value!r}; it must be {allowed}")
    of = {forward: options_of(options, forward) for forward in (True, False)} if options else {}
    for c in _CONTRADICTIONS if options else ():
        said = of[c.forward]
        if said.get(c.name) is True and c.other in said and c.against in (None, said[c.other]):
            raise ValueError(
                f"kernel options {c.name}=True and {c.other}={said[c.other]}: {c.why}; leave one of them out"
            )
    return dict(options)


def options_of(options: Mapping[str, Any], forward: bool) -> dict[str, Any]:
    """What checked options say about the forward, or the backward: a prefixed name goes before the bare one."""
    own = PREFIXES[0] if forward else PREFIXES[1]
    bare = {name: value for name, value in options.items() if not name.startswith(PREFIXES)}
    return bare | {name[len(own) :]: value for name, value in options.items() if name.startswith(own)}


def unfollowed(options: Mapping[str, Any], forward: bool, name: str, why: str) -> ValueError:
    """The error for an option, named without its prefix, that cannot be followed: `why`, and what to write instead."""
    prefixed = PREFIXES[0 if forward else 1] + name
    written = prefixed if prefixed in options else name
    return ValueError(
        f'kernel_options={{"{written}": {options.get(written)}}} cannot be followed: {why}; or leave the option out'
    )


def options_text(options: Mapping[str, Any]) -> str:
    """Checked options as the operators take them: "BLOCK_M=64,USE_TMA=True", sorted."""
    if torch.compiler.is_compiling():  # Dynamo warns of caches
        return _text.__wrapped__(tuple(options.items()))
    return _text(tuple(options.items())) if options else ""


@lru_cache(maxsize=256)
def _text(options: tuple[tuple[str, Any], ...]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(options))


@lru_cache(maxsize=256)
def parsed_options(text: str) -> Mapping[str, Any]:
    """The options of a text. Raises `ValueError` for what `check_kernel_options` refuses."""
    words = {"True": True, "False": False}
    pairs = (item.split("=", 1) for item in text.split(",") if item)
    return check_kernel_options({k: words[v] if v in words else int(v) if v.isdigit() else v for k, v in pairs})


def _fits(kind: str, value: Any) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "backend":
        return value in ("AUTO", "TRITON")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return False
    if not kind.startswith("power of two"):
        return True
    return value & (value - 1) == 0 and (16 <= value <= 512 if kind == _TILE else value <= 32)
