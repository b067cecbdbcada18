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
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return make()  # a graph must contain the work
    key = (what, *map(id, tensors), *rest)
    entry = _CACHE.get(key)
    if entry is not None:
        for reference, version, t in zip(entry.tensors, entry.versions, tensors, strict=True):
            if reference() is not t or version_of(t) != version:
                break
        else:
            return cast(Made, entry.made)
    if any(t.is_inference() for t in tensors):
        return make()  # such a tensor does not tell when it is written to
    versions = tuple(map(version_of, tensors))
    made = make()
    pop = _CACHE.pop  # which is there even when the module is not any more
    references = tuple(weakref.ref(t, lambda _: pop(key, None)) for t in tensors)
    _CACHE[key] = _Entry(references, versions, made)
    return made
