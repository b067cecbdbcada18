"""From a device function for Triton kernels to the same function for Gluon kernels.

A function that a Gluon kernel calls is compiled as Gluon, in which every tensor has a layout. Triton's operations take that
of their operands, so the text stays; the two that make a tensor out of a number are Gluon's.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _broadcast_to(x, shape: gl.constexpr):
    """As Triton's, of a number as well."""
    return x + gl.full(shape, 0, x.dtype)


def _language() -> ModuleType:
    """What `tl` means in a Gluon form."""
    module = ModuleType(f"{__name__}.language")
    module.__dict__.update({name: thing for name, thing in vars(tl).items() if not name.startswith("_")})
    module.__dict__.update(full=gl.full, broadcast_to=_broadcast_to)
    return module


_LANGUAGE = _language()


@cache
def gluon_form(function: Any) -> Any:
    """The Gluon form of a generated function, an object of `jit.jitted`; None of None. Equal functions give the same object."""
    if function is None:
        return None
    plain = function.fn
    return gluon.jit(FunctionType(plain.__code__, {**plain.__globals__, "tl": _LANGUAGE}, plain.__name__))
