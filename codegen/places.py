"""Where in a user's mod an operation of its program was written. Asked for when something has gone wrong, so it may be slow."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .diagnose import is_inside
from .formula import inline
from .ir import INDEX_INPUTS, DType, Node, input_node, walk
from .recorder import Placeholder, Recorder, Value


class Place(NamedTuple):
    """ "model.py:41" and the line of code there."""

    where: str
    source: str


def place_of(mod: Callable[..., Any], role: str, score_dtype: DType, wanted: Node) -> Place | None:
    """The line of `mod` that computes `wanted`, or the same operation on the same type; None if there is none."""
    recorder = _Locating(torch.device("cpu"))
    arguments = [recorder.scalar(input_node(name, DType.INT32)) for name in INDEX_INPUTS]
    if role != "mask_mod":
        arguments.insert(0, recorder.scalar(input_node("score", score_dtype)))
    with recorder:
        mod(*arguments)
    text = inline(wanted)
    found = [place for node, place in recorder.places.items() if node.op is wanted.op and inline(node) == text]
    found += [p for node, p in recorder.places.items() if node.op is wanted.op and node.dtype is wanted.dtype]
    return found[0] if found else None


class _Locating(Recorder):
    """A recorder that notes the user's line of every operation."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.places: dict[Node, Place] = {}

    def placeholder(self, content: Any) -> Placeholder:
        place = next(_user_frames(), None)
        nodes = content.nodes if isinstance(content, Value) else ()
        for node in walk(*nodes):
            if place is not None:
                self.places.setdefault(node, place)
        return super().placeholder(content)


def _user_frames() -> Iterator[Place]:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not is_inside(name) and os.path.exists(name):
            yield Place(f"{name}:{frame.f_lineno}", linecache.getline(name, frame.f_lineno).strip())
        frame = frame.f_back  # type: ignore[assignment]
