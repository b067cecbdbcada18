"""The steps of one way to compute a pass: kernel calls and what runs between them, made but not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gpu_problem import Problem
from gpu_suites import Cell
from gpu_variants import Variant
from results import Record
from timing import short
from torch import Tensor

import flexattn
from flexattn.backends import hopper, work_order
from flexattn.backends import triton as backend
from flexattn.backends.launch import Call, attempt, choose, launch
from flexattn.backends.target import Target, compiling_for, current
from flexattn.codegen.pipeline import variant as variant_of
from flexattn.codegen.trace import trace
from flexattn.problem import Problem as Operands

SWITCHED: dict[str, tuple[str, Callable[..., Any]]] = {  # a function of `work_order`, and what takes its place
    "as they come": ("longest_first", lambda *args, **more: None),
    "one head at a time": ("together", lambda *args: 1),
    "groups whole": ("splits", lambda *args: 1),
}


@contextmanager
def switched(switches: Sequence[str]) -> Iterator[None]:
    """Inside, programs are ordered and divided otherwise."""
    with ExitStack() as stack:
        for name in switches:
            stack.enter_context(patch.object(work_order, *SWITCHED[name]))
        yield


class Steps(NamedTuple):
    """`before` makes what `timed` needs, and `outputs` are what that fills. A step is a kernel call or a function."""

    before: list[Any]
    timed: list[Any]
    outputs: Callable[[], Sequence[Tensor]]

    @property
    def calls(self) -> list[Call]:
        """The kernel calls that are timed, less those that have nothing to choose."""
        return [step for step in self.timed if isinstance(step, Call)]


def run_all(steps: Sequence[Any]) -> None:
    """Run the steps, in order."""
    for step in steps:
        launch(step) if isinstance(step, Call) else step()


class Ways:
    """A problem as the backend gets it."""

    def __init__(self, problem: Problem) -> None:
        score_mod, mask_mod, S = problem.score_mod(), problem.mask_mod(), problem.cell.S
        self.mask = mask_mod and flexattn.create_block_mask(mask_mod, None, None, S, S, problem.device)
        lists = () if self.mask is None else self.mask.kv_lists()
        program, captured, ints = trace(score_mod, mask_mod)
        leaves, scale = [t.detach() for t in problem.leaves], problem.cell.D**-0.5
        self.operands = Operands(*leaves, captured, lists, ints, (128, 128), variant_of(program), scale)
        self.given = {"BLOCKS_ARE_CONTIGUOUS": True} if self.mask is not None and self.mask.contiguous else {}
        self.dout = problem.dout

    def steps(self, part: str, way: Variant) -> Steps:
        """The steps of a pass."""
        options = self.given | dict(way.options)
        with switched(way.switches):
            return self._forward(options) if part == "forward" else self._backward(part, options)

    @cached_property
    def forward(self) -> backend.Forward:
        """What the backward needs."""
        return backend.forward(self.operands, self.given)

    def _forward(self, options: dict[str, Any]) -> Steps:
        calls: list[Call] = []
        with patch.object(backend, "launch", calls.append):
            result = backend.forward(self.operands, options)
        return Steps([], [*calls], lambda: result)

    def _backward(self, part: str, options: dict[str, Any]) -> Steps:
        kept: list[Any] = []

        def keep(ways: list[list[Any]]) -> int:
            kept.extend(ways[0])
            ways.append([])  # a way without steps: nothing is run
            return -1

        out, lse, _ = self.forward
        with patch.object(backend.autotune, "fastest", keep):
            result = backend.backward(self.operands, out, lse, self.dout, None, [], options)
        if part == "backward":
            return Steps([], kept, lambda: result[:3])
        (call,) = (step for step in kept if isinstance(step, Call) and step.which == part)
        return Steps(kept[:1], [call], call.outputs)  # the first step is delta


def needed(steps: Steps, target: Target | None) -> list[Record]:
    """Configuration and resources of every kernel that is timed, for a target, or the current device."""
    found = []
    for call in steps.calls:
        with nullcontext() if target is None else compiling_for(target):
            config = choose(call, target).config
            # Calls of one kind share a choice, and not all of them a kernel.
            chosen = attempt(call, config, target or current(), loads=target is None)
        found.append({"pass": call.which, "config": config._asdict(), **chosen.resources._asdict()})
    return found


def compile_one(cell: Cell, part: str, way: Variant, target: Target) -> list[Record] | str:
    """`needed` for a target, without a device; it leaves the kernels in Triton's cache. Or the error, in a line."""
    torch.set_num_threads(1)
    try:
        with patch.object(torch, "randn", torch.empty):  # no value matters; memory that is not touched costs nothing
            ways = Ways(Problem(cell, "cpu"))
        lse = torch.empty(cell.B, cell.Hq, cell.S)
        ways.forward = backend.Forward(torch.empty_like(ways.operands.query), lse, lse)
        with patch.object(hopper, "current", lambda: target), compiling_for(target):
            steps = ways.steps(part, way)
        with switched(way.switches):
            return needed(steps, target)
    except Exception as error:
        return short(error)
