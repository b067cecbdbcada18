"""From a kernel call to a launch: choose the configuration once, then run.

A configuration is chosen by compiling: one that needs more shared memory than the device has, or that spills registers,
gives way to the next of its chain. The choice is kept for all later calls of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError, OutOfResources, PTXASError

from ..codegen.jit import function_of_file, function_of_source
from ..config import KernelConfig, Pass, Pinned, Product, chain, least_shared_memory, option_names
from ..errors import KernelError
from . import recording
from .resources import Resources, resources
from .target import Target, current, interpreted
from .unspecialised import unspecialised


def whole(programs: int, shaped: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """One launch."""
    yield programs, {}


class Tuning(NamedTuple):
    """That a configuration shall be chosen by timing, and what that choice depends on besides a call's key.

    Attributes:
        place: what the host knows, for choices that are remembered in the process.
        facts: all of it in words and numbers that JSON has, for choices that are kept on disk. May wait for the device.
        search: makes the choice for a call on the current device, which is the target.
    """

    place: tuple[Any, ...]
    facts: Callable[[], dict[str, Any]]
    search: Callable[[Call, Target], Chosen]


class Call(NamedTuple):
    """One kernel call, before its configuration is known.

    Attributes:
        kernel: the Triton function.
        which: the pass whose configurations are tried.
        key: all that the choice depends on besides the target.
        product, head_dim: how products are computed, and the larger padded head dimension: rows of the table.
        row_bytes: size of a row of both operands that a loop streams.
        pinned: what the caller insists on.
        arguments: name to value, those that a configuration does not change.
        shaped: the rest, given a configuration: tiles and what follows from them. `grid` is the number of programs.
        device: where the tensors are.
        compiler_options: what the caller tells Triton's compiler for one make of GPU.
        configurations: what is tried in the place of the table's, in order.
        parts: the launches that cover the grid, given what `shaped` gave: the number of programs, and more arguments.
        prepare: brings the buffers that the kernel adds to into the state it needs. Runs before every run of the call.
        outputs: the tensors that a run has written.
        tuning: None where the first configuration that fits is taken.
        invariant: whether the choice may depend on no length and no batch.
        ahead: whether configurations that need many registers are tried first, see `config.AHEAD`.
    """

    kernel: Any
    which: Pass
    key: tuple[Any, ...]
    product: Product
    head_dim: int
    row_bytes: int
    pinned: Pinned
    arguments: dict[str, Any]
    shaped: Callable[[KernelConfig], dict[str, Any]]
    device: torch.device
    compiler_options: Mapping[str, Any] = MappingProxyType({})
    configurations: tuple[KernelConfig, ...] = ()
    parts: Callable[[int, dict[str, Any]], Iterator[tuple[int, dict[str, Any]]]] = whole
    prepare: Callable[[], object] | None = None
    outputs: Callable[[], Sequence[Tensor]] = tuple
    tuning: Tuning | None = None
    ahead: bool = True
    invariant: bool = False


class Chosen(NamedTuple):
    """A configuration, what its kernel needs, and the kernel."""

    config: KernelConfig
    resources: Resources
    kernel: Any


ENOUGH = 6  # configurations compiled in search of one that does not spill, if one that does has been found

_CHOSEN: dict[tuple[Any, ...], Chosen] = {}


def launch(call: Call) -> None:
    """Run a call with the best configuration for the device of its tensors."""
    with on_device(call.device):
        if interpreted():
            return run(call, _interpreted(call.pinned))
        try:
            run(call, choose(call, None).config)
        except OutOfResources:  # chosen for operands whose alignment needs less
            _CHOSEN.pop(place_of(call, None), None)
            recording.abandon("a launch failed")
            run(call, choose(call, None).config)


def run(call: Call, config: KernelConfig) -> None:
    """Run a call with a given configuration."""
    shaped = call.shaped(config)
    programs = shaped.pop("grid")
    if programs == 0:
        return
    with on_device(call.device):
        try:
            if call.prepare is not None:
                call.prepare()
            for grid, more in call.parts(programs, shaped):
                arguments = {**call.arguments, **shaped, **more}
                kernel = call.kernel[(grid,)](**arguments, **_options(call, config))
                recording.launched(call.kernel, kernel, grid, arguments)
        except (CompilationError, InterpreterError) as error:
            found = explained(error)
            raise found from (error.__cause__ if found is error else error)


def _options(call: Call, config: KernelConfig) -> dict[str, Any]:
    """What Triton's compiler is told, beside the arguments."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, **call.compiler_options}


def place_of(call: Call, target: Target | None) -> tuple[Any, ...]:
    """Where the choice of a call is remembered: equal for calls that take the same configuration."""
    tuned = None if call.tuning is None else call.tuning.place
    return (*call.key, call.pinned, *call.compiler_options.items(), tuned, target or call.device)


def choose(call: Call, target: Target | None) -> Chosen:
    """The configuration of a call for a target, by default the current device: the first of its chain that fits.

    If all that fit spill, the one that spills least. Raises `ValueError` if what the caller pinned fits nowhere.
    A call that asks for tuning gets what its search has found fastest; during a CUDA graph's capture nothing is timed.
    """
    place = place_of(call, target)
    chosen = _CHOSEN.get(place)
    if chosen is None:
        recording.abandon("a kernel was chosen")
        if call.tuning is None:
            chosen = _search(call, target or current(), loads=target is None)
        elif target is not None or capturing(call.device):
            return choose(call._replace(tuning=None), target)  # not remembered as tuned
        else:
            chosen = call.tuning.search(call, current())
        _CHOSEN[place] = chosen
    return chosen


def capturing(device: torch.device) -> bool:
    """Whether what is launched on the device becomes part of a CUDA graph, instead of being run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _search(call: Call, target: Target, loads: bool) -> Chosen:
    best: Chosen | None = None
    tried = 0
    needed: list[int] = []
    table = chain(call.which, target.backend, target.arch, call.product, call.head_dim, call.pinned, call.ahead)
    for config in call.configurations or table:
        least = least_shared_memory(call.which, config, call.row_bytes)
        if least > target.shared_memory:
            needed.append(least)
            continue
        if best is not None and tried == ENOUGH:
            break
        tried += 1
        try:
            found = attempt(call, config, target, loads)
        except (OutOfResources, PTXASError) as error:
            needed.append(getattr(error, "required", 0))
            continue
        if best is None or found.resources.spilled < best.resources.spilled:
            best = found
        if best.resources.spilled == 0:
            break
    if best is None:
        names = option_names(call.which)
        said = {names[part]: value for part, value in call.pinned._asdict().items() if value is not None}
        pinned = ", ".join(f"{name}={value}" for name, value in said.items())
        lower = ", ".join(said) or "nothing: head_dim is too large"
        raise ValueError(
            f"no configuration of the {call.which} kernel with {pinned or 'any tile'} fits: the smallest needs at least "
            f"{min(needed, default=0)} bytes of shared memory, {target.backend} {target.arch} has "
            f"{target.shared_memory}. In kernel_options leave out or lower {lower}"
        )
    return best


def attempt(call: Call, config: KernelConfig, target: Target, loads: bool) -> Chosen:
    """The kernel of a configuration, compiled and if `loads` is set loaded. Raises `OutOfResources` if it does not fit."""
    kernel = compiled(call, config)
    if kernel.metadata.shared > target.shared_memory:
        raise OutOfResources(kernel.metadata.shared, target.shared_memory, "shared memory")
    if loads:
        kernel._init_handles()
    return Chosen(config, resources(kernel), kernel)


def compiled(call: Call, config: KernelConfig) -> Any:
    """The kernel compiled for the active target, not launched."""
    shaped = call.shaped(config)
    _, more = next(call.parts(shaped.pop("grid"), shaped))
    arguments = {**call.arguments, **shaped, **more}
    if call.invariant:
        arguments = unspecialised(arguments)
    try:
        return call.kernel.run(grid=(1,), warmup=True, **arguments, **_options(call, config))
    except CompilationError as error:
        found = explained(error)
        raise found from (error.__cause__ if found is error else error)


def explained(error: BaseException) -> Exception:
    """An error of Triton's as one that names the generated function, its line, and the operation."""
    function, line, reason = None, 0, str(error)
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, CompilationError):
            found = function_of_source(inner.src)
            if found is not None and inner.node is not None:
                function, line = found, inner.node.lineno + found.first_line - 1
            reason = inner.error_message or reason
        trace = inner.__traceback__
        while trace is not None:
            found = function_of_file(trace.tb_frame.f_code.co_filename)
            if found is not None:
                function, line = found, trace.tb_lineno
            trace = trace.tb_next
        reason = str(inner) if inner.__cause__ is None and not isinstance(inner, CompilationError) else reason
        inner = inner.__cause__
    if function is None:
        return error if isinstance(error, Exception) else RuntimeError(reason)
    return KernelError(function.role, function.lines.get(line), function.source.splitlines()[line - 1].strip(), reason)


def _interpreted(pinned: Pinned) -> KernelConfig:
    """Small tiles, so that small shapes have several."""
    fixed = {name: value for name, value in pinned._asdict().items() if value is not None}
    return KernelConfig(32, 32, 4, 1)._replace(**fixed)


def on_device(device: torch.device) -> Any:
    """Inside, the current device is that of a call's tensors."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)
