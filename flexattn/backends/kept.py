"""Results kept for the tensors they were made of, for as long as these live and are not written to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ..codegen.private import version_of

Made = TypeVar("Made")


class _Entry(NamedTuple):
    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    made: object


_CACHE: dict[tuple[object, ...], _Entry] = {}


def kept(what: str, tensors: Sequence[Tensor], rest: tuple[object, ...], make: Callable[[], Made]) -> Made:
    """The result of `make`, remembered for these very tensors in their present state, and for `rest`."""
    if (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()) or any(t.is_inference() for t in tensors):
        return make()  # a graph must contain the work; an inference tensor does not tell when it is written to
    key = (what, *map(id, tensors), *rest)
    versions = tuple(map(version_of, tensors))
    entry = _CACHE.get(key)
    if entry is not None and entry.versions == versions:
        for reference, t in zip(entry.tensors, tensors, strict=True):
            if reference() is not t:
                break
        else:
            return cast(Made, entry.made)
    made = make()
    pop = _CACHE.pop  # which is there even when the module is not any more
    references = tuple(weakref.ref(t, lambda _: pop(key, None)) for t in tensors)
    _CACHE[key] = _Entry(references, versions, made)
    return made
