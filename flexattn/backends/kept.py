"""Results kept for the tensors they were made of, for as long as these live and are not written to.

On a GPU each stream has its own: another would not wait for them, and might still read them when they are freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ..codegen.private import version_of, warms_up_for_a_graph

Made = TypeVar("Made")


class _Entry(NamedTuple):
    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    made: object


_CACHE: dict[tuple[object, ...], _Entry] = {}


def kept(what: str, tensors: Sequence[Tensor], rest: tuple[object, ...], make: Callable[[], Made]) -> Made:
    """The result of `make`, remembered for these very tensors in their present state, and for `rest`."""
    stream, on_gpu = 0, tensors[0].is_cuda
    if on_gpu:
        if torch.cuda.is_current_stream_capturing():
            return make()  # a graph must contain the work
        stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
    key = (what, stream, *map(id, tensors), *rest)
    entry = _CACHE.get(key)
    if entry is not None:
        for reference, version, t in zip(entry.tensors, entry.versions, tensors, strict=True):
            if reference() is not t or version_of(t) != version:
                break
        else:
            return cast(Made, entry.made)
    if any(t.is_inference() for t in tensors):
        return make()  # such a tensor does not tell when it is written to
    if on_gpu and warms_up_for_a_graph(tensors[0].device):
        return make()  # its memory is that of the graphs
    versions = tuple(map(version_of, tensors))
    made = make()
    pop = _CACHE.pop  # which is there even when the module is not any more
    references = tuple(weakref.ref(t, lambda _: pop(key, None)) for t in tensors)
    _CACHE[key] = _Entry(references, versions, made)
    return made
