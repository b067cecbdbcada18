"""Where a chunk of keys is: its indices as tensors, and what follows from them alone, kept for the next call if it is small."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..codegen.evaluate import TORCH_DTYPE, Inputs, evaluate, steady, wrap_index
from ..codegen.ir import Node, Op, walk
from ..codegen.pipeline import variant

KEPT_ELEMENTS = 1 << 14  # of values that depend on indices alone: up to so many are kept


@lru_cache(maxsize=256)
def number(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-d tensor on the CPU, which an operator takes faster than a Python number."""
    return torch.full((), value, dtype=dtype, device="cpu")


class Place(NamedTuple):
    """Where a chunk is: its indices, and what follows from them alone."""

    named: dict[str, Tensor]
    memo: dict[Node, Tensor]
    wrapped: dict[tuple[Node, int], Tensor]
    hidden: Tensor | None  # the mask of the whole chunk as something to add: 0, or -inf


class Corner(NamedTuple):
    """What a `Place` depends on: ranges of the indices, and the number of heads that share a key head."""

    b: tuple[int, int]
    h: tuple[int, int]
    group: int
    q_idx: tuple[int, int]
    kv_idx: tuple[tuple[int, int], ...]
    masked: bool  # whether the mask decides about every key


def place_of(program: str, corner: Corner, device: torch.device, sizes: tuple[tuple[int, ...], ...]) -> Place:
    """The place at a corner; `sizes` are the shapes of the captured tensors."""
    parsed = variant(program)

    def positions(start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, dtype=torch.int32, device=device)

    pieces = [positions(*piece) for piece in corner.kv_idx]
    named = {
        "b": positions(*corner.b).view(-1, 1, 1, 1, 1),
        "h": positions(*corner.h).view(1, -1, corner.group, 1, 1),
        "q_idx": positions(*corner.q_idx).view(-1, 1),
        "kv_idx": pieces[0] if len(pieces) == 1 else torch.cat(pieces),
    }
    place = Place(named, {}, {}, None)
    roots = [parsed.score] + ([parsed.mask] if corner.masked and parsed.mask is not None else [])
    found = steady(roots)
    elements = sum(math.prod(named[str(axis)].numel() for axis in node.axes) for node in found)
    if not found or device.type != "cpu" or elements > KEPT_ELEMENTS:
        return place
    inputs = Inputs(named, device=device, memo=place.memo)
    evaluate(found, inputs)
    for node in walk(*roots):
        if node.op is Op.LOAD and len(node.args) == 2 and node.args[1] in place.memo:
            base, index = node.args
            assert isinstance(base.value, tuple)
            (size,) = sizes[base.value[0]]
            place.wrapped[index, size] = wrap_index(place.memo[index], size)
    if parsed.mask is None or parsed.modifies_score or parsed.mask not in place.memo:
        return place
    keep, dtype = place.memo[parsed.mask], TORCH_DTYPE[parsed.score_dtype]
    return place._replace(hidden=hidden(keep, dtype))


kept_place_of = lru_cache(maxsize=128)(place_of)


def hidden(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `keep`, else -inf."""
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, float("-inf"))
