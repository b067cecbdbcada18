"""What the fastest configuration of a call depends on: the program, the operands, and the block mask, in classes.

Sizes are rounded up to powers of two, so that a choice serves all lengths of a class.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..codegen.jit import Jitted
from ..config import Pinned
from ..problem import Problem
from .kept import kept
from .launch import Call, Chosen, Tuning
from .target import Target

TEMPLATES = f"{__package__.rpartition('.')[0]}.templates"
DEVICE_CODE = f"{__package__.rpartition('.')[0]}.codegen.device"


def tuning(
    problem: Problem,
    made: Jitted,
    pinned: Pinned,
    constants: Mapping[str, Any],
    search: Callable[[Call, Target], Chosen],
) -> Tuning:
    """The tuning of a call, whose choices `search` makes.

    made: the generated functions, whose names are digests of their texts. constants: further facts, hashable.
    """
    B, H, L, D = problem.query.shape
    keys = problem.key.shape
    sizes = {"batch and heads": power_of_two(B * H), "L": power_of_two(L), "S": power_of_two(keys[2])}
    # In eager code lists are as wide as the longest row, which says much about their density, and the host knows it.
    widths = tuple(power_of_two(t.shape[-1]) for t in problem.block_mask[1::2])
    group = (H // keys[1], B // keys[0])

    def facts() -> dict[str, Any]:
        return {
            "flexattn": __version__,
            "templates": templates_digest(),
            "program": problem.variant.text.splitlines(),
            "functions": {name: f.fn.__name__ for name, f in made._asdict().items() if f is not None},
            "dtype": str(problem.query.dtype).removeprefix("torch."),
            "D": D,
            "DV": problem.value.shape[-1],
            "group": group[0],
            "batches of a key": group[1],
            "sizes": sizes,
            "block size": list(problem.block_size) if problem.block_mask else None,
            "blocks": density(problem.block_mask, problem.key.shape[2], problem.block_size[1]),
            "pinned": {name: value for name, value in pinned._asdict().items() if value is not None},
            **constants,
        }

    return Tuning((*sizes.values(), *group, widths, *constants.values()), facts, search)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def density(block_mask: Sequence[Tensor], S: int, block: int) -> dict[str, str] | None:
    """Which part of all blocks is attended, and which part of those is partial: the nearest powers of two, as "1/8".

    None without block lists. Reads the counts, once for each block mask: the device is waited for.
    """
    if not block_mask:
        return None

    def found() -> dict[str, str]:
        partial, *full = torch.stack([count.sum(dtype=torch.int64) for count in block_mask[0::2]]).tolist()
        attended = partial + sum(full)
        blocks = block_mask[0].numel() * -(-S // block)
        return {"attended": _fraction(attended, blocks), "partial": _fraction(partial, attended)}

    return kept("density", block_mask, (S, block), found)


def templates_digest() -> str:
    """A digest of the sources of the kernels, so that another kernel is timed anew."""
    return sources_digest((Path(str(sys.modules[TEMPLATES].__path__[0])), Path(str(sys.modules[DEVICE_CODE].__file__))))


@cache
def sources_digest(places: tuple[Path, ...]) -> str:
    """A digest of files, and of the Python files in folders."""
    hashed = hashlib.sha256()
    for place in places:
        for path in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


def _fraction(part: int, whole: int) -> str:
    if part == 0 or whole == 0:
        return "0"
    halvings = round(math.log2(whole / part))
    return f"1/{1 << halvings}" if halvings else "1"
