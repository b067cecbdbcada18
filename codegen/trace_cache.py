"""Traces that are not made again: the same results as `trace`, found by everything that a trace depends on.

The key is made anew at every call, see `mod_key`, and captured tensors are those that are found on the way. A mod that
reaches something opaque is traced at every call, and so is one that computes with captured tensors alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .mod_key import Opaque, Reached
from .private import modes_are_active
from .trace import MaskMod, ScoreMod, Trace, record, trace

CAPACITY = 512


class _Entry(NamedTuple):
    """A trace: its program, which of the tensors on the way it captured, and its run-time floats."""

    program: str
    captured: tuple[int, ...]
    floats: tuple[float, ...]


class CacheInfo(NamedTuple):
    """How many calls found their trace, made one to keep, and made one that could not be kept; how many are kept."""

    hits: int
    misses: int
    uncached: int
    size: int


_ENTRIES: OrderedDict[tuple[Any, ...], _Entry | str] = OrderedDict()  # a string: why it cannot be kept
_LOCK = threading.Lock()
_COUNTS = [0, 0, 0]


def cached_trace(
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    *,
    score_dtype: torch.dtype = torch.float32,
    device: torch.device,
) -> Trace:
    """What `trace` returns for the same arguments, without running the mods where that is safe."""
    try:
        key, tensors = _key(score_mod, mask_mod, score_dtype, device)
    except _REFUSED:
        _COUNTS[2] += 1
        return trace(score_mod, mask_mod, score_dtype=score_dtype, device=device)
    entry = _ENTRIES.get(key)
    if entry is None:
        return _made(key, tensors, score_mod, mask_mod, score_dtype, device)
    if len(_ENTRIES) > CAPACITY // 2:  # the order tells what to forget, which is far until then
        with _LOCK:
            if key in _ENTRIES:
                _ENTRIES.move_to_end(key)
    if isinstance(entry, str):
        _COUNTS[2] += 1
        return trace(score_mod, mask_mod, score_dtype=score_dtype, device=device)
    _COUNTS[0] += 1
    return Trace(entry.program, [*[tensors[i] for i in entry.captured], *entry.floats], [])


# What reading the attributes of objects of the user's may raise: then the trace itself says what is wrong.
_REFUSED = (Opaque, AttributeError, KeyError, TypeError, ValueError, RecursionError)


def _key(
    score_mod: Any, mask_mod: Any, score_dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Any, ...], list[Tensor]]:
    if modes_are_active():
        raise Opaque("a mode or a transform of torch's is active")
    reached = Reached()
    if score_mod is not None:
        reached.mod(score_mod)
    reached.parts.append("mask")
    if mask_mod is not None:
        reached.mod(mask_mod)
    reached.finish()
    return (score_dtype, device, torch.get_default_dtype(), *reached.parts), reached.tensors


def _made(
    key: tuple[Any, ...],
    tensors: Sequence[Tensor],
    score_mod: Any,
    mask_mod: Any,
    score_dtype: torch.dtype,
    device: torch.device,
) -> Trace:
    recording = record(score_mod, mask_mod, score_dtype, device)
    number = {id(t): i for i, t in enumerate(tensors)}
    entry: _Entry | str
    if recording.hoists or any(id(t) not in number for t in recording.tensors):
        entry = "it computes with captured tensors alone"
    elif recording.ints or any(isinstance(f, Tensor) for f in recording.floats):
        entry = "it captures symbolic numbers"
    else:
        floats = tuple(f for f in recording.floats if isinstance(f, float))
        entry = _Entry(recording.program, tuple(number[id(t)] for t in recording.tensors), floats)
    try:  # whether the mods, or another thread, have changed something meanwhile
        unchanged = _key(score_mod, mask_mod, score_dtype, device)[0] == key
    except _REFUSED:
        unchanged = False
    if unchanged:
        with _LOCK:
            _ENTRIES[key] = entry
            while len(_ENTRIES) > CAPACITY:
                _ENTRIES.popitem(last=False)
    _COUNTS[2 if isinstance(entry, str) else 1] += 1
    return recording.trace()


def why_uncached(
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    *,
    score_dtype: torch.dtype = torch.float32,
    device: torch.device,
) -> str:
    """Why these mods are traced at every call; empty if they are not. Raises `TraceError` if they cannot be traced."""
    try:
        key, tensors = _key(score_mod, mask_mod, score_dtype, device)
    except _REFUSED as error:
        return str(error) if isinstance(error, Opaque) else f"{type(error).__name__}: {error}"
    if key not in _ENTRIES:
        _made(key, tensors, score_mod, mask_mod, score_dtype, device)
    entry = _ENTRIES.get(key, "it changes what it reads")
    return entry if isinstance(entry, str) else ""


def cache_info() -> CacheInfo:
    """Counts since the process started, or since `clear`."""
    return CacheInfo(_COUNTS[0], _COUNTS[1], _COUNTS[2], len(_ENTRIES))


def clear() -> None:
    """Forget all traces."""
    with _LOCK:
        _ENTRIES.clear()
        _COUNTS[:] = [0, 0, 0]
