"""The fastest configuration of a call, found by running it on its own operands with each candidate.

What is timed is what will run: the same tensors, block lists and captured values. A run overwrites the call's outputs, so
the caller runs it once more afterwards. A candidate must compute what the table's configuration computes, up to rounding.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from .. import tuning_cache
from ..config import KernelConfig, candidates, least_shared_memory
from ..notices import say_once
from ..tuning_cache import Entry, Machine
from .agreement import agree
from .launch import Call, Chosen, attempt, capturing, choose, on_device, place_of, run
from .target import Target, current, interpreted
from .timer import Timer, event_timer

COMPILED = 16  # candidates that are compiled at most
SECONDS = 2.0  # after which no more candidates are timed; compiling does not count
ROUNDS = 10  # in which every contender is run once
HOPELESS = 1.5  # times the fastest, in the first round: not run again
GAIN = 0.02  # by which another must be faster than the table's
# Parts of a configuration that reach the kernel as operands only.
IN_SHAPE = ("BLOCK_M", "BLOCK_N", "tma", "overlap", "upright")
SPILLED = 512  # bytes of a thread: one that spills more is not timed

Key = TypeVar("Key")
Step = Call | Callable[[], object]
LOG = logging.getLogger("flexattn.autotune")
_FASTEST: dict[tuple[Any, ...], int] = {}


class Measured(NamedTuple):
    """The fastest of several, and the median milliseconds of each."""

    chosen: Chosen
    milliseconds: dict[KernelConfig, float]


def search(call: Call, target: Target) -> Chosen:
    """The choice for a call that asks for tuning: the one on disk, or else the fastest candidate, which is then kept."""
    assert call.tuning is not None
    machine, facts = machine_of(call.device, target), call.tuning.facts()
    entry = tuning_cache.find(machine, facts)
    if entry is not None:
        # A file that was edited may have a choice that does not exist, or does not fit.
        with suppress(Exception):
            return attempt(call, KernelConfig(**entry.choice), target, loads=True)
    try:
        measured = measure(call, target, event_timer(call.device))
    except torch.OutOfMemoryError:
        say_once(
            f"the {call.which} kernel is not tuned, since there is no memory for a copy of its outputs: the table's "
            "configuration is used. Leave AUTOTUNE out of kernel_options, or tune with a smaller batch"
        )
        return choose(call._replace(tuning=None), None)
    times = {in_words(config): found for config, found in measured.milliseconds.items()}
    tuning_cache.store(Entry(machine, facts, measured.chosen.config._asdict(), times))
    report(call.which, in_words(measured.chosen.config), times)
    return measured.chosen


def measure(call: Call, target: Target, timer: Timer) -> Measured:
    """Times the table's configuration and the candidates that fit and compute the same."""
    first = choose(call._replace(tuning=None), None)
    run(call, first.config)
    expected = [t.clone() for t in call.outputs()]
    times = {first.config: [timer(partial(run, call, first.config))]}
    kernels = {first.config: first}
    spent = 0.0
    for config in itertools.islice(distinct(call, target, first.config), COMPILED):
        if spent > SECONDS:
            break
        try:
            found = attempt(call, config, target, loads=True)
            started = time.perf_counter()
            if found.resources.spilled <= SPILLED and _computes(call, config, expected):
                times[config] = [timer(partial(run, call, config))]
                kernels[config] = found
            spent += time.perf_counter() - started
        except Exception as error:  # whatever a compiler or a driver says of a candidate, the table's remains
            LOG.debug("%s: left out %s: %s", call.which, in_words(config), error)
    chosen, medians = _fastest_of({c: partial(run, call, c) for c in times}, times, timer, SECONDS - spent)
    return Measured(kernels[chosen], medians)


def _computes(call: Call, config: KernelConfig, expected: Sequence[Tensor]) -> bool:
    run(call, config)
    right = agree(call.outputs(), expected, call.product)
    if not right:
        say_once(f"the {call.which} kernel with {in_words(config)} computes something else, and is not used")
    return right


def distinct(call: Call, target: Target, first: KernelConfig) -> Iterator[KernelConfig]:
    """The candidates that may fit, but `first`, without those that are the same kernel inside the blocks of the mask."""
    seen = {_kernel_key(call, first)}
    head_dim, product = call.head_dim, call.product
    table = candidates(call.which, target.backend, target.arch, product, head_dim, call.pinned)
    for config in call.configurations or table:
        if least_shared_memory(call.which, config, call.row_bytes) > target.shared_memory:
            continue
        key = _kernel_key(call, config)
        if key not in seen:
            seen.add(key)
            yield config


def fastest(alternatives: Sequence[Sequence[Step]]) -> int:
    """Which of several ways to the same results takes the least time: sequences of calls, each with its own tuned
    configuration, and of functions that do what else a way needs.

    0, the default, unless every call asks for tuning; so also where kernels are interpreted, and during the capture of a
    CUDA graph if it is not known yet. An alternative that does not compile or fit is left out. All outputs are
    overwritten: the caller runs the chosen sequence afterwards.
    """
    calls = [call for sequence in alternatives for call in calls_of(sequence)]
    if len(alternatives) < 2 or not calls or interpreted() or any(call.tuning is None for call in calls):
        return 0
    place = tuple(tuple(place_of(call, None) for call in calls_of(sequence)) for sequence in alternatives)
    found = _FASTEST.get(place)
    if found is None:
        if capturing(calls[0].device):
            return 0
        with on_device(calls[0].device):
            found = _FASTEST[place] = _search_alternatives(alternatives, calls[0].device)
    return found


def calls_of(sequence: Sequence[Step]) -> list[Call]:
    """The kernel calls among the steps."""
    return [step for step in sequence if isinstance(step, Call)]


def _search_alternatives(alternatives: Sequence[Sequence[Step]], device: torch.device) -> int:
    machine = machine_of(device, current())
    parts = [[call.tuning.facts() for call in calls_of(way) if call.tuning is not None] for way in alternatives]
    facts = {"alternatives": parts}
    entry = tuning_cache.find(machine, facts)
    number = None if entry is None else entry.choice.get("alternative")
    if isinstance(number, int) and 0 <= number < len(alternatives):
        return number
    timer = event_timer(device)
    runs: dict[int, Callable[[], None]] = {}
    times: dict[int, list[float]] = {}
    for n, sequence in enumerate(alternatives):
        try:
            steps = [partial(run, s, choose(s, None).config) if isinstance(s, Call) else s for s in sequence]
            one = partial(_each, steps)
            one()
            runs[n], times[n] = one, [timer(one)]
        except Exception as error:
            LOG.debug("left out alternative %d: %s", n, error)
    if not times:
        return 0  # whose launch will say why
    number, medians = _fastest_of(runs, times, timer, SECONDS)
    named = {str(n): found for n, found in medians.items()}
    tuning_cache.store(Entry(machine, facts, {"alternative": number}, named))
    report(
        " or ".join("+".join(call.which for call in calls_of(way)) for way in alternatives), f"number {number}", named
    )
    return number


def _each(steps: Sequence[Callable[[], object]]) -> None:
    for step in steps:
        step()


def _fastest_of(
    runs: Mapping[Key, Callable[[], None]], times: dict[Key, list[float]], timer: Timer, seconds: float
) -> tuple[Key, dict[Key, float]]:
    """The fastest of those that have been timed once, in turns so that clocks and heat are the same for all.

    The first is the default, and stays unless another is faster by `GAIN`. Also the median of each.
    """
    default = next(iter(times))
    limit = HOPELESS * min(first for (first,) in times.values())
    contenders = [key for key, (first,) in times.items() if key == default or first <= limit]
    began = time.perf_counter()
    for _ in range(ROUNDS - 1):
        if time.perf_counter() - began > seconds:
            break
        for key in contenders:
            times[key].append(timer(runs[key]))
    medians = {key: median(found) for key, found in times.items()}
    best = min(contenders, key=medians.__getitem__)
    return (best if medians[best] <= (1 - GAIN) * medians[default] else default), medians


def _kernel_key(call: Call, config: KernelConfig) -> tuple[Any, ...]:
    """Equal for configurations that give the same kernel and grid: no tile is larger than a block of the mask, and TMA
    may be impossible."""
    shaped = call.shaped(config)
    if "shape" not in shaped:
        return (shaped["grid"], *config)
    # Equal shapes are one object; what is None, a descriptor too, is no operand.
    operands = tuple(value is None for value in shaped.values())
    own = [value for name, value in config._asdict().items() if name not in IN_SHAPE]
    return (shaped["grid"], id(shaped["shape"]), operands, *own)


def machine_of(device: torch.device, target: Target) -> Machine:
    """Where times are taken."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Machine(name, str(target.arch), triton.__version__)


def in_words(config: KernelConfig) -> str:
    """BLOCK_M=64, BLOCK_N=64, ..."""
    return ", ".join(f"{name}={value}" for name, value in config._asdict().items())


def report(what: str, chosen: str, milliseconds: Mapping[str, float]) -> None:
    """Tell those who listen to the logger what was chosen, and how long each took."""
    LOG.info("%s: %s is the fastest of %d", what, chosen, len(milliseconds))
    for name, found in sorted(milliseconds.items(), key=lambda item: item[1]):
        LOG.debug("%s: %.4f ms with %s", what, found, name)
