"""Where in a user's mod an operation of its program was written. Asked for when something has gone wrong, so it may be slow."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .diagnose import is_inside
from .formula import inline
from .ir import INDEX_INPUTS, DType, Node, Op, input_node, walk
from .recorder import Placeholder, Recorder, Value
from .trace import gradients_on


class Place(NamedTuple):
    """ "model.py:41" and the line of code there."""

    where: str
    source: str


def place_of(mod: Callable[..., Any], role: str, score_dtype: DType, wanted: Node) -> Place | None:
    """The line of `mod` that computes `wanted`, or the same operation on the same type; None if there is none."""
    places = _places(mod, role, score_dtype).places
    text = inline(wanted)
    found = [place for node, place in places.items() if node.op is wanted.op and inline(node) == text]
    found += [p for node, p in places.items() if node.op is wanted.op and node.dtype is wanted.dtype]
    return found[0] if found else None


def exact_place_of(
    mod: Callable[..., Any],
    role: str,
    score_dtype: DType,
    wanted: Node,
    captured: Sequence[Any],
    floats: Sequence[Any] = (),
) -> Place | None:
    """The line of `mod` that computes `wanted`, a node of its program, whose `captured` tensors and `floats` these are.

    Else a line that reads the same captured tensor, if `wanted` reads one; else None.
    """
    recorder = _places(mod, role, score_dtype)
    known = {id(t): f"t{i}" for i, t in enumerate(captured)}
    theirs = {f"c{i}": f"t{i}" for i in range(len(captured))}
    ours = {f"c{i}": known.get(id(t), "") for i, t in enumerate(recorder.captured)}
    theirs |= {f"f{i}": repr(number) for i, number in enumerate(floats)}
    ours |= {f"f{i}": repr(number) for i, number in enumerate(recorder.floats)}
    text = inline(wanted, theirs)
    same = [(node, place) for node, place in recorder.places.items() if node.op is wanted.op]
    found = [place for node, place in same if inline(node, ours) == text]
    if wanted.op is Op.LOAD:
        tensor = inline(wanted.args[0], theirs)
        found += [place for node, place in same if inline(node.args[0], ours) == tensor]
    return found[0] if found else None


def _places(mod: Callable[..., Any], role: str, score_dtype: DType) -> _Locating:
    recorder = _Locating(torch.device("cpu"))
    with gradients_on():
        arguments = [recorder.scalar(input_node(name, DType.INT32)) for name in INDEX_INPUTS]
        if role != "mask_mod":
            arguments.insert(0, recorder.scalar(input_node("score", score_dtype)))
        with recorder:
            mod(*arguments)
    return recorder


class _Locating(Recorder):
    """A recorder that notes the user's line of every operation."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.places: dict[Node, Place] = {}

    def placeholder(self, content: Any, shares: bool = False) -> Placeholder:
        place = next(_user_frames(), None)
        nodes = content.nodes if isinstance(content, Value) else ()
        for node in walk(*nodes):
            if place is not None:
                self.places.setdefault(node, place)
        return super().placeholder(content, shares)


def _user_frames() -> Iterator[Place]:
    """The lines of the mod, and of what it called, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _places.__code__:
        name = frame.f_code.co_filename
        # The cell of a notebook is no file, but its lines are known.
        if not is_inside(name) and (os.path.exists(name) or name in linecache.cache):
            yield Place(f"{name}:{frame.f_lineno}", linecache.getline(name, frame.f_lineno).strip())
        frame = frame.f_back  # type: ignore[assignment]
