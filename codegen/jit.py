"""From the text of a device function to a Triton function object.

The text comes from `emit` alone, which prints checked graphs: nothing that a user or a file wrote is executed. It is
registered in `linecache`, where Triton, tracebacks and debuggers find it, under a name derived from its content.
"""

from __future__ import annotations

import linecache
import threading
from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import device
from .emit import Function, Functions

_LOCK = threading.Lock()
_MADE: dict[str, Any] = {}
_BY_FILE: dict[str, Function] = {}


class Jitted(NamedTuple):
    """The compiled-on-demand counterparts of `Functions`; None where there is no function."""

    score_mod: Any
    mask_mod: Any
    score_mod_grad: Any
    row_grads: Any
    column_grads: Any
    tile_grads: Any


def jitted(functions: Functions) -> Jitted:
    """Triton functions for the text of a variant's functions; equal text gives the same object."""
    return Jitted(*(None if f is None else _jitted(f) for f in functions))


def function_of_file(filename: str) -> Function | None:
    """The generated function that a file name in an error message belongs to."""
    return _BY_FILE.get(filename)


def function_of_source(text: str) -> Function | None:
    """The generated function whose text, from `def` on, Triton reports."""
    name = text.removeprefix("def ").partition("(")[0]
    return _BY_FILE.get(f"<flexattn {name}>")


def _jitted(function: Function) -> Any:
    with _LOCK:
        made = _MADE.get(function.source)
        if made is None:
            filename = f"<flexattn {function.name}>"
            lines = function.source.splitlines(keepends=True)
            linecache.cache[filename] = (len(function.source), None, lines, filename)
            _BY_FILE[filename] = function
            space: dict[str, Any] = {"tl": tl, "device": device, "__name__": __name__}
            exec(compile(function.source, filename, "exec"), space)
            # Kept for ever: Triton's caches hold its kernels by these objects, and users have few variants.
            made = _MADE[function.source] = triton.jit(space[function.name])
    return made
