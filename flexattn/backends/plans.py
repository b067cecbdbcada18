"""Plans: calls that have been seen before, done again without thinking.

The first call of a kind goes the whole way: it chooses kernels and builds their arguments. The next is recorded, see
`recording`; from then on a call of that kind fills in its tensors' addresses and launches. A *kind* is all that the way
depends on: dtypes, shapes, strides, devices and alignments of the tensors, every number, and torch's own settings. What
tensors hold is no part of it, nor are they kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver as drivers

from ..codegen.private import modes_are_active
from .recording import Recording, Steps
from .target import interpreted

CAPACITY = 1024
ATTEMPTS = 4  # calls of a kind of which one must have been worth recording
ALIGNED = 15  # Triton compiles a kernel of its own for addresses that are no multiples of 16

Solve = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Plan(NamedTuple):
    """What is done, the driver that the kernels are loaded by, and how many calls of the kind had been seen."""

    done: Steps
    driver: Any
    seen: int


_PLANS: OrderedDict[tuple[Any, ...], Plan | int] = OrderedDict()  # an int: so many calls, no plan
_LOCK = threading.Lock()
_NEVER = interpreted() or torch.version.hip is not None  # AMD's kernels depend on the sizes of storages as well
_enabled = True


class PlanInfo(NamedTuple):
    """Calls done by a plan, calls that went the whole way, and plans kept."""

    hits: int
    misses: int
    size: int


_COUNTS = [0, 0]

# As functions, which `map` calls without a frame for each.
_DTYPE: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]
_SHAPE: Any = Tensor.shape.__get__  # type: ignore[attr-defined]
_STRIDE, _DEVICE, _ADDRESS = Tensor.stride, Tensor.get_device, Tensor.data_ptr
_float32_precision = torch.get_float32_matmul_precision
_are_deterministic = torch.are_deterministic_algorithms_enabled
_in_inference_mode, _in_autocast = torch.is_inference_mode_enabled, torch.is_autocast_enabled


def planned(tensors: Sequence[Tensor], rest: tuple[Any, ...], numbers: Sequence[Any], solve: Solve) -> Sequence[Tensor]:
    """The tensors that `solve(tensors)` makes, without running it if such a call has a plan.

    `rest`, hashable, and `numbers` are all that it depends on besides the tensors. It must not depend on which of them are
    the same object.
    """
    runtime = knobs.runtime
    if (
        _NEVER
        or not _enabled
        or modes_are_active()
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook is not None
    ):
        return solve(tensors)
    driver = drivers.active
    key = _key(tensors, rest, numbers, driver.get_current_device())
    if key is None:
        return _whole_way(tensors, solve)
    found = _PLANS.get(key, 0)
    if isinstance(found, Plan):
        if found.driver is driver:
            values: list[Any] = [*tensors]
            for question in found.done.questions:
                if not question(values):
                    break
            else:
                for step in found.done.steps:
                    step(values)
                _COUNTS[0] += 1
                return found.done.results(values)
        found = found.seen
    if 0 < found < ATTEMPTS:
        return _recorded(key, found + 1, tensors, solve, driver)
    _keep(key, found or 1)
    return _whole_way(tensors, solve)


def _key(
    tensors: Sequence[Tensor], rest: tuple[Any, ...], numbers: Sequence[Any], device: Any
) -> tuple[Any, ...] | None:
    """The kind of a call; None if it has none."""
    for number in numbers:
        if type(number) is not float:
            if type(number) is not int:
                return None
        elif number != number:  # equal to nothing, so never found again
            return None
        elif number == 0:  # -0.0 equals 0.0, and is another number
            rest = (*rest, *map(repr, numbers))
    runtime, compilation = knobs.runtime, knobs.compilation
    apart = None
    if reduce(or_, map(_ADDRESS, tensors)) & ALIGNED:
        apart = tuple([t.data_ptr() & ALIGNED for t in tensors])
    return (
        rest,
        *numbers,
        device,
        tensors[0].is_cuda and torch.cuda.is_current_stream_capturing(),
        apart,
        runtime.debug,
        compilation.instrumentation_mode,
        _float32_precision() if tensors[0].dtype is torch.float32 else None,
        _are_deterministic(),
        _in_inference_mode(),
        _in_autocast("cuda"),
        *map(_DTYPE, tensors),
        *map(_SHAPE, tensors),
        *map(_STRIDE, tensors),
        *map(_DEVICE, tensors),
    )


def _recorded(
    key: tuple[Any, ...], seen: int, tensors: Sequence[Tensor], solve: Solve, driver: Any
) -> Sequence[Tensor]:
    distinct: list[Tensor] = []
    for t in tensors:  # a tensor that is given twice may be two tensors in another call
        distinct.append(t.detach() if any(t is other for other in distinct) else t)
    _COUNTS[1] += 1
    with Recording(distinct) as recording:
        results = solve(distinct)
    done = recording.finish(results)
    device = tensors[0].device
    if done is None or not done.launches or (device.type == "cuda" and device.index != driver.get_current_device()):
        _keep(key, seen)
    else:
        _keep(key, Plan(done, driver, seen))
    return results


def _whole_way(tensors: Sequence[Tensor], solve: Solve) -> Sequence[Tensor]:
    _COUNTS[1] += 1
    return solve(tensors)


def _keep(key: tuple[Any, ...], what: Plan | int) -> None:
    with _LOCK:
        _PLANS[key] = what
        while len(_PLANS) > CAPACITY:
            _PLANS.popitem(last=False)


def plan_info() -> PlanInfo:
    """Counts since the process started, or since `clear`."""
    return PlanInfo(_COUNTS[0], _COUNTS[1], sum(type(found) is Plan for found in _PLANS.values()))


@contextmanager
def whole_way() -> Iterator[None]:
    """Inside, no call is done by a plan, or recorded."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def clear() -> None:
    """Forget all plans."""
    with _LOCK:
        _PLANS.clear()
        _COUNTS[:] = [0, 0]
