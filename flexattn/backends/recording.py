"""A recording: the torch operations and kernel launches of one call, as steps that can be done again for other tensors.

A tensor is named by its *slot*: the call's tensors come first, then what each step has made. Which argument is which tensor
is told by identity. What cannot be repeated for other tensors of the same kind makes the recording void.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..codegen.private import TorchDispatchMode, version_of
from .launch_step import Step, Values, launch_step, picker

Question = Callable[[Values], bool]  # whether it has the answer that the steps depend on

_CONSTANTS = frozenset(
    (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
)
_UNREPEATABLE = frozenset(
    (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
)
MOST = 256  # steps: what takes more has other costs
_empty_like, _empty_strided = torch.empty_like, torch.empty_strided
_aten = torch.ops.aten
# Allocations, which all become one, the cheapest to ask for.
_EMPTY = frozenset(
    (
        *(_aten.empty.memory_format, _aten.empty_permuted.default, _aten.empty_strided.default),
        *(_aten.empty_like.default, _aten.new_empty.default, _aten.new_empty_strided.default),
    )
)


class Steps(NamedTuple):
    """What a recording has found: what to ask first, the steps, what picks the results, and the number of launches."""

    questions: tuple[Question, ...]
    steps: tuple[Step, ...]
    results: Callable[[Values], tuple[Any, ...]]
    launches: int


class Void(Exception):
    """Something that cannot be repeated for other tensors."""


class _Asked(NamedTuple):
    """A function of tensors and `rest`, and its answer."""

    function: Callable[..., Any]
    rest: tuple[Any, ...]
    answer: Any


class _Slot(NamedTuple):
    """A tensor among arguments."""

    number: int


class Recording(TorchDispatchMode):  # type: ignore[misc]
    """Records every torch operation inside its `with`, and what `launched`, `step` and `ask` are told."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._slots: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by id; a call's memory is freed as it goes
        self._number = 0
        self._name(tensors)
        self._inputs = self._number
        self._questions: dict[tuple[int, ...], list[_Asked]] = {}  # by the slots of the tensors they are about
        self._steps: list[Step] = []
        self._used: list[set[int]] = []  # by step
        self._noted: dict[tuple[Any, ...], list[int]] = {}
        self._launches = self._seen = 0
        self._thread = threading.get_ident()
        self.paused = False
        self.void = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused and not self.void:
            self._try(self._operation, func, args, kwargs or {}, result)
        return result

    def __enter__(self) -> Recording:
        _LOCAL.recording = self
        triton.knobs.runtime.launch_enter_hook.add(self._see)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        triton.knobs.runtime.launch_enter_hook.remove(self._see)
        _LOCAL.recording = None

    def _see(self, metadata: Any) -> None:
        """Count a launch, whoever makes it: one that `launched` is not told of would be left out of the steps."""
        self._seen += threading.get_ident() == self._thread

    def finish(self, results: Sequence[Tensor]) -> Steps | None:
        """The steps; None if the call cannot be repeated."""
        if self._seen != self._launches:
            self.void = self.void or "a launch from elsewhere"
        if self.void or any(not self._knows(t) for t in results):
            return None
        found = tuple(self._slot(t) for t in results)
        last: dict[int, int] = {}
        for number, used in enumerate(self._used):
            last |= dict.fromkeys(used, number)
        steps: list[Step] = []
        for number, step in enumerate(self._steps):
            done = [s for s, at in last.items() if at == number and s >= self._inputs and s not in found]
            steps.append(_forgetting(step, done) if done else step)
        questions = tuple(_question(slots, asked) for slots, asked in self._questions.items())
        return Steps(questions, tuple(steps), picker(found), self._launches)

    def note(self, function: Callable[..., Any], tensors: Sequence[Tensor], rest: tuple[Any, ...], made: Any) -> None:
        """A step that calls `function(tensors, *rest)`, which gave `made`: tensors, or an answer that shall be the same."""
        if not self.void:
            self._try(self._call, function, tensors, rest, made)

    def launched(self, kernel: Any, compiled: Any, grid: int, arguments: dict[str, Any]) -> None:
        """A launch of a compiled kernel."""
        if not self.void:
            self._try(self._launch, kernel, compiled, grid, arguments)

    def _try(self, record: Callable[..., None], *what: Any) -> None:
        self.paused = True
        try:
            record(*what)
        except Void as error:
            self.void = str(error)
        finally:
            self.paused = False

    def _name(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            self._slots[id(t)] = weakref.ref(t), self._number
            self._number += 1

    def _add(self, step: Step, used: set[int], made: Sequence[Tensor]) -> None:
        if len(self._steps) == MOST:
            raise Void("too many steps")
        start = self._number
        self._name(made)
        self._steps.append(step)
        self._used.append(used | set(range(start, self._number)))

    def _knows(self, t: Tensor) -> bool:
        named = self._slots.get(id(t))
        return named is not None and named[0]() is t

    def _slot(self, t: Tensor) -> int:
        if not self._knows(t):
            raise Void("a tensor from elsewhere")
        return self._slots[id(t)][1]

    def _operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.tags and not _UNREPEATABLE.isdisjoint(func.tags) and not _selects_by_number(func, args):
            raise Void(f"{func} depends on data")
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if not all(isinstance(t, Tensor) for t in results):
            raise Void(f"{func} gives no tensors")
        new = [number for number, t in enumerate(results) if not self._knows(t)]
        made = [results[number] for number in new]
        if not made and not func._schema.is_mutable:
            return  # nothing to do, as for a dtype that a tensor has already
        used: set[int] = set()
        if func in _EMPTY:
            (t,) = made
            return self._add(self._allocation(t, used), used, made)
        template = self._template((args, kwargs), used)
        single = not isinstance(result, (tuple, list))

        def step(values: Values) -> None:
            args, kwargs = _filled(template, values)
            again = func(*args, **kwargs)
            if new:
                values.append(again) if single else values.extend([again[number] for number in new])

        self._add(step, used, made)

    def _allocation(self, t: Tensor, used: set[int]) -> Step:
        """A tensor like this one, uninitialised: asked for by way of a tensor that it is like, or else by its numbers."""
        size, stride, dtype, device = t.shape, t.stride(), t.dtype, t.device
        for reference, slot in self._slots.values():
            other = reference()
            if other is None or (other.shape, other.dtype, other.device) != (size, dtype, device):
                continue
            if _empty_like(other).stride() == stride:
                used.add(slot)
                return lambda values: values.append(_empty_like(values[slot]))
        return lambda values: values.append(_empty_strided(size, stride, dtype=dtype, device=device))

    def _template(self, value: Any, used: set[int]) -> Any:
        """The arguments, with slots in the place of tensors."""
        if isinstance(value, Tensor):
            slot = self._slot(value)
            used.add(slot)
            return _Slot(slot)
        if isinstance(value, (tuple, list)):
            return type(value)([self._template(item, used) for item in value])
        if isinstance(value, dict):
            return {name: self._template(item, used) for name, item in value.items()}
        if type(value) not in _CONSTANTS:
            raise Void(f"an argument is a {type(value).__name__}")
        return value

    def _call(self, function: Callable[..., Any], tensors: Sequence[Tensor], rest: tuple[Any, ...], made: Any) -> None:
        slots = [self._slot(t) for t in tensors]
        place = (function, *slots, *rest)
        if not isinstance(made, tuple):
            if max(slots) >= self._inputs:
                raise Void("a question about what a step has made")
            return self._questions.setdefault(tuple(slots), []).append(_Asked(function, rest, made))
        known = [self._slot(t) if self._knows(t) else -1 for t in made]
        if place in self._noted and self._noted[place] == known:
            return
        if max(known) >= 0:
            raise Void("a step that gives what is there")

        def step(values: Values) -> None:
            values.extend(function([values[s] for s in slots], *rest))

        self._add(step, set(slots), made)
        self._noted[place] = [self._slot(t) for t in made]

    def _launch(self, kernel: Any, compiled: Any, grid: int, arguments: dict[str, Any]) -> None:
        if compiled is None or kernel.pre_run_hooks or type(kernel) is not triton.JITFunction:
            raise Void("a launch that is not only a launch")
        try:
            step, used = launch_step(compiled, grid, [arguments[name] for name in kernel.arg_names], self._slot)
        except TypeError as error:
            raise Void(str(error)) from error
        self._launches += 1
        self._add(step, used, ())


def _question(slots: Sequence[int], asked: Sequence[_Asked]) -> Question:
    """Whether functions of these tensors have the answers that they had, asked once for tensors in one state."""
    pick = picker(slots)
    right: tuple[tuple[weakref.ref[Tensor], int], ...] = ()

    def question(values: Values) -> bool:
        nonlocal right
        tensors: tuple[Tensor, ...] = pick(values)
        for (reference, version), t in zip(right, tensors, strict=False):
            if reference() is not t or version_of(t) != version:
                break
        else:
            if right:
                return True
        if any(function(tensors, *rest) != answer for function, rest, answer in asked):
            return False
        if not any(t.is_inference() for t in tensors):  # which do not tell when they are written to
            right = tuple((weakref.ref(t), version_of(t)) for t in tensors)
        return True

    return question


def _filled(template: Any, values: Values) -> Any:
    if type(template) is _Slot:
        return values[template.number]
    if type(template) is tuple:
        return tuple([_filled(item, values) for item in template])
    if type(template) is list:
        return [_filled(item, values) for item in template]
    if type(template) is dict:
        return {name: _filled(item, values) for name, item in template.items()}
    return template


def _forgetting(step: Step, done: Sequence[int]) -> Step:
    def shorter(values: Values) -> None:
        step(values)
        for slot in done:
            values[slot] = None

    return shorter


def _selects_by_number(func: Any, args: Any) -> bool:
    """Whether this is an indexing whose result has the same shape for all data: no index is a mask."""
    return func is _aten.index.Tensor and all(t is None or t.dtype not in (torch.bool, torch.uint8) for t in args[1])


class _Local(threading.local):
    recording: Recording | None = None


_LOCAL = _Local()


def launched(kernel: Any, compiled: Any, grid: int, arguments: dict[str, Any]) -> None:
    """Tell the recording that is going on, if there is one, of a launch."""
    recording = _LOCAL.recording
    if recording is not None:
        recording.launched(kernel, compiled, grid, arguments)


def step(function: Callable[..., Any], tensors: Sequence[Tensor], *rest: Any) -> Any:
    """`function(tensors, *rest)`, which a plan repeats as a whole: what it does inside may depend on anything.

    It gives a tuple of tensors, or else an answer that decides what is done next: with another answer a plan is of no use.
    """
    recording = _LOCAL.recording
    if recording is None or recording.paused:
        return function(tensors, *rest)
    recording.paused = True
    try:
        made = function(tensors, *rest)
    finally:
        recording.paused = False
    recording.note(function, tensors, rest, made)
    return made


def abandon(why: str) -> None:
    """Make the recording that is going on, if there is one, void."""
    recording = _LOCAL.recording
    if recording is not None:
        recording.void = why
