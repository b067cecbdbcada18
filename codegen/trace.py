"""From callables to a program: run the mods once on placeholders and print what they did.

In: a `score_mod`, a `mask_mod`, or either alone. Out: the canonical program text and the tensors and numbers it reads.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .diagnose import locate
from .errors import TraceError
from .evaluate import IR_DTYPE
from .ir import INDEX_INPUTS, DType, Node, input_node
from .private import DisableTorchFunction
from .program import print_program
from .promotion import cast, default_float
from .recorder import Placeholder, Recorder, Value

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_INSTEAD = {  # of what is no function, by role and type
    ("score_mod", "Tensor"): "def score_mod(score, b, h, q_idx, kv_idx): return score + t[b, h, q_idx, kv_idx]",
    ("mask_mod", "Tensor"): "def mask_mod(b, h, q_idx, kv_idx): return t[b, h, q_idx, kv_idx]",
    ("score_mod", "BlockMask"): "pass it as block_mask=",
    ("mask_mod", "BlockMask"): "pass it as block_mask=",
}
_SIGNATURES = {
    "score_mod": ("score", "b", "h", "q_idx", "kv_idx"),
    "mask_mod": ("b", "h", "q_idx", "kv_idx"),
}


class Trace(NamedTuple):
    """A traced variant.

    `captured` holds the captured tensors c0, c1, ... and after them the run-time floats f0, f1, ..., symbolic ones as 0-d
    float64 tensors; `ints` the run-time integers i0, i1, ...
    """

    program: str
    captured: list[Any]
    ints: list[Any]


class Recording(NamedTuple):
    """A traced variant in parts. `hoists`: see `Recorder`."""

    program: str
    tensors: list[Tensor]
    floats: list[float | Tensor]
    ints: list[Any]
    hoists: bool

    def trace(self) -> Trace:
        return Trace(self.program, [*self.tensors, *self.floats], self.ints)


def trace(
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    *,
    score_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Trace:
    """The program of a `score_mod` and a `mask_mod`; None means the identity and the full mask.

    Raises `TraceError` with the user's file and line for what no kernel can do.
    """
    return record(score_mod, mask_mod, score_dtype, torch.device(device)).trace()


def record(
    score_mod: ScoreMod | None, mask_mod: MaskMod | None, score_dtype: torch.dtype, device: torch.device
) -> Recording:
    score_type = IR_DTYPE[score_dtype]
    recorder = Recorder(device)
    score: Node = input_node("score", score_type)
    mask: Node | None = None
    with default_float(IR_DTYPE[torch.get_default_dtype()]):
        if score_mod is not None:
            score = cast(_run("score_mod", score_mod, recorder, score), score_type)
        if mask_mod is not None:
            mask = cast(_run("mask_mod", mask_mod, recorder, None), DType.BOOL)
    printed = print_program(score, mask, score_type)
    tensors = [recorder.captured[i] for i in printed.captured]
    floats, ints = [recorder.floats[i] for i in printed.floats], [recorder.ints[i] for i in printed.ints]
    return Recording(printed.text, tensors, floats, ints, recorder.hoists)


@contextmanager
def gradients_on() -> Iterator[None]:
    """Gradients are on inside, whatever the caller has, so that a mod which turns them off is noticed.

    Nobody sees it: a call that is exported shall not have it in its graph.
    """
    if torch.is_grad_enabled():
        yield
        return
    with DisableTorchFunction():
        torch.set_grad_enabled(True)
    try:
        yield
    finally:
        with DisableTorchFunction():
            torch.set_grad_enabled(False)


def _run(role: str, mod: Callable[..., Any], recorder: Recorder, score: Node | None) -> Node:
    check_arguments(role, mod)
    # Hooks of a module, such as FSDP's, apply functions of their own where something requires a gradient.
    recorder.requires_grad = not (isinstance(mod, torch.nn.Module) and (mod._forward_pre_hooks or mod._backward_hooks))
    with gradients_on():
        indices = [recorder.scalar(input_node(name, DType.INT32)) for name in INDEX_INPUTS]
        arguments = indices if score is None else [recorder.scalar(score), *indices]
    try:
        with gradients_on(), recorder:
            result = mod(*arguments)
        return _result(role, result, recorder)
    except TraceError as error:
        if error.place:
            raise
        raise locate(error, error.__traceback__, role, describe(mod)) from None


def _result(role: str, result: Any, recorder: Recorder) -> Node:
    if isinstance(result, Placeholder):
        value = recorder._value(result)
    elif isinstance(result, Tensor):
        operand = recorder._operand(result, 0)
        value = operand if isinstance(operand, Value) else Value(tuple(result.shape), ())
    elif isinstance(result, (bool, int, float)):
        value = Value((), (recorder.number(result),))
    else:
        raise TraceError(
            f"returns {'nothing' if result is None else type(result).__name__}",
            f"A {role} returns one {'score' if role == 'score_mod' else 'boolean'} for one (b, h, q_idx, kv_idx).",
            "return score" if role == "score_mod" else "return q_idx >= kv_idx",
        )
    if value.shape != ():
        raise TraceError(
            f"returns a tensor of shape {value.shape}",
            "It must return one number.",
            "an expression in which every tensor is indexed",
        )
    node = value.nodes[0]
    if role == "mask_mod" and node.dtype is not DType.BOOL:
        raise TraceError(
            f"returns {node.dtype.value} values",
            "A mask is boolean: True where the query attends to the key.",
            "a comparison, e.g. value != 0",
        )
    return node


def positional_count(mod: Callable[..., Any]) -> int | None:
    """How many positional arguments without defaults a callable takes; None if that cannot be told or it takes any."""
    if isinstance(mod, torch.nn.Module):
        mod = mod.forward
    # inspect.signature takes tens of microseconds; plain functions and methods, the usual case, can be read directly.
    function = mod if inspect.isfunction(mod) else getattr(mod, "__func__", getattr(type(mod), "__call__", None))
    if inspect.isfunction(function) and not function.__code__.co_flags & inspect.CO_VARARGS:
        bound = 0 if function is mod else 1
        return function.__code__.co_argcount - bound - len(function.__defaults__ or ())
    try:
        parameters = inspect.signature(mod).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def check_arguments(role: str, mod: Any) -> None:
    """Raise `TraceError` unless `mod` can be called as a `role`."""
    names = _SIGNATURES[role]
    usage = f"def {role}({', '.join(names)})"
    if not callable(mod):
        kind = "Tensor" if isinstance(mod, Tensor) else type(mod).__name__
        fix = _INSTEAD.get((role, kind), usage)
        raise TraceError(f"is a {type(mod).__name__}, which cannot be called", f"A {role} is a function.", fix, role)
    if isinstance(mod, type):
        raise TraceError(
            f"is the class `{mod.__name__}`", f"A {role} is an instance of it.", f"{mod.__name__}(...)", role
        )
    count = positional_count(mod)
    if count is None or count == len(names):
        return
    other = "mask_mod" if role == "score_mod" else "score_mod"
    fix = f"pass it as {other}=" if count == len(_SIGNATURES[other]) else usage
    raise TraceError(
        f"takes {count} arguments", f"A {role} takes {len(names)}: {', '.join(names)}.", fix, f"{role} {describe(mod)}"
    )


def describe(mod: Any) -> str:
    """Name and place of a callable, for messages; it may have a description of its own."""
    said = getattr(mod, "described", None)
    if isinstance(said, str):
        return said
    inner = getattr(mod, "func", mod)
    call = type(inner).forward if isinstance(inner, torch.nn.Module) else getattr(type(inner), "__call__", None)
    code = getattr(inner, "__code__", None) or getattr(call, "__code__", None)
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"`{name}`" + (f" at {os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code is not None else "")
