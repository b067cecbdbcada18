"""Mods as Dynamo hands them over: graphs, and the values they read. And what it says when it cannot capture one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .codegen.diagnose import is_inside
from .codegen.errors import TraceError

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<source>.*)')

_READS_OUTSIDE = torch.torch_version.TorchVersion(torch.__version__) >= "2.15"
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep

HINT = (
    "This is about a score_mod or mask_mod of flexattn inside torch.compile. In it write torch.where(condition, a, b) for "
    "`if`, `&` and `|` for `and` and `or`, functions of torch for those of math, and index a captured tensor with one "
    "index for each dimension, t[h, q_idx], without `:` and `...`. Called once outside torch.compile, flex_attention "
    "names the line and what to write instead."
)


SHARED_NUMBER = (
    "Several layers that are captured apart, as under torch.utils.checkpoint, read a Python number that changes between "
    "calls, which Dynamo cannot capture before PyTorch 2.15. Pass it to the compiled function as a tensor: "
    "torch.tensor(temperature)."
)


class GraphMod:
    """A mod of a `role`, "score_mod" or "mask_mod": `graph` takes its arguments and after them `captured`."""

    def __init__(self, role: str, graph: Any, captured: tuple[Any, ...]) -> None:
        self.role, self.graph, self.captured = role, graph, captured

    def __call__(self, *arguments: Tensor) -> Any:
        """What the graph computes. Raises `TraceError` with the user's line."""
        try:
            result = self.graph(*arguments, *self.captured)
        except TraceError as error:
            raise self._placed(error, arguments) from None
        if not isinstance(result, tuple):
            return result
        return result[0] if len(result) == 1 else result

    @property
    def described(self) -> str:
        """The user's function, for messages: its name and the line of its result."""
        nodes = [n for n in self._nodes() if n.op != "output"]
        frame = _frame(nodes[-1]) if nodes else None
        return (
            "in a compiled function" if frame is None else f"`{frame['function']}` at {frame['file']}:{frame['line']}"
        )

    def _nodes(self) -> list[torch.fx.Node]:
        return list(self.graph.graph.nodes) if isinstance(self.graph, torch.fx.GraphModule) else []

    def _placed(self, error: TraceError, arguments: tuple[Any, ...]) -> TraceError:
        """The error with the user's line, which the node that raises it remembers."""
        if not isinstance(self.graph, torch.fx.GraphModule):
            return error
        finder = _Finder(self.graph)
        try:
            finder.run(*arguments, *self.captured)
        except TraceError:
            frame = _frame(finder.node)
            if frame is not None:
                return error.at(f"{self.role} at {frame['file']}:{frame['line']}", frame["source"].strip())
        return error


class _Finder(torch.fx.Interpreter):
    """Runs a graph and knows where it is."""

    node: torch.fx.Node

    def run_node(self, n: torch.fx.Node) -> Any:
        self.node = n
        return super().run_node(n)


def _frame(node: torch.fx.Node) -> dict[str, str] | None:
    """The innermost of the user's frames."""
    frames = [m.groupdict() for m in _FRAME.finditer(node.stack_trace or "")]
    return next((f for f in reversed(frames) if not (is_inside(f["file"]) or f["file"].startswith(_OURS))), None)


def explaining(base: Any) -> Any:
    """Dynamo's class that captures mods, with our hint in the errors that it raises."""

    class Explaining(base):  # type: ignore[misc]
        def create_wrapped_node(self, *args: Any, **kwargs: Any) -> Any:
            try:
                with _numbers_read_outside(args[0].output):
                    return super().create_wrapped_node(*args, **kwargs)
            except Exception as error:
                if error.args and isinstance(error.args[0], str) and HINT not in error.args[0]:
                    hint = SHARED_NUMBER if "lift_tracked_freevar_to_input" in error.args[0] else HINT
                    error.args = (f"{error.args[0]}\n{hint}", *error.args[1:])
                    if isinstance(getattr(error, "msg", None), str):
                        error.msg = error.args[0]  # type: ignore[attr-defined]
                raise

    return Explaining


@contextmanager
def _numbers_read_outside(output: Any) -> Iterator[None]:
    """Let a Python float that changes be read in the whole graph rather than in the mod that is captured.

    Dynamo keeps what it read for the next use, which may be another mod; that one cannot reach into the first.
    https://github.com/pytorch/pytorch/issues/193194, mended like this in PyTorch 2.15.
    """
    if _READS_OUTSIDE or not (hasattr(output, "create_proxy") and hasattr(output, "root_tracer")):
        yield
        return
    create, root = output.create_proxy, output.root_tracer

    def create_proxy(kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outside = kind == "call_method" and target == "item" and _is_number(args[0])
        return (root.create_proxy if outside else create)(kind, target, args, kwargs)

    output.create_proxy = create_proxy
    try:
        yield
    finally:
        output.create_proxy = create


def _is_number(proxy: Any) -> bool:
    """Whether this is an input of a graph that stands for a Python number."""
    node = getattr(proxy, "node", None)
    return node is not None and getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
