"""What the user calls the tensors that a mod captured. In: mods, and what their trace captured. Out: names for c0, c1, ..."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .codegen.replay import Replay
from .graph_mod import GraphMod


def captured_names(mods: Sequence[Any], tensors: Sequence[Tensor], floats: Sequence[Any] = ()) -> dict[str, str]:
    """Names of c0, c1, ... as far as the mods show them, and the values of the run-time floats f0, f1, ...

    A tensor that was computed while the mod ran has no name.
    """
    found = visible_names(mods)
    names = {f"c{i}": found[id(t)] for i, t in enumerate(tensors) if id(t) in found}
    return names | {f"f{i}": f"{float(number):g}" for i, number in enumerate(floats)}


def visible_names(mods: Sequence[Any]) -> dict[int, str]:
    """The user's names of tensors that mods can see, by `id`: closure, globals, defaults, attributes of objects."""
    found: dict[int, str] = {}

    def visit(mod: Any, depth: int) -> None:
        if mod is None or depth > 3 or isinstance(mod, (GraphMod, Replay)):  # tensors of graphs have numbers, no names
            return
        if isinstance(mod, functools.partial):
            for name, value in {**{f"argument {i}": a for i, a in enumerate(mod.args)}, **mod.keywords}.items():
                note(name, value, depth)
            return visit(mod.func, depth)
        owner = getattr(mod, "__self__", None if inspect.isfunction(mod) else mod)
        if isinstance(owner, torch.nn.Module):
            for name, tensor in (*owner.named_parameters(), *owner.named_buffers()):
                note(f"self.{name}", tensor, depth)
        for name, value in getattr(owner, "__dict__", {}).items():
            note(f"self.{name}", value, depth)
        function = getattr(mod, "__func__", mod if inspect.isfunction(mod) else getattr(type(mod), "__call__", None))
        if inspect.isfunction(function):
            scope = inspect.getclosurevars(function)
            for name, value in {**scope.globals, **scope.nonlocals, **_defaults(function)}.items():
                note(name, value, depth, function.__code__.co_names)

    def note(name: str, value: Any, depth: int, mentioned: Sequence[str] = ()) -> None:
        """Name a tensor, or those in a container; of an object or a Python module those attributes that the code mentions."""
        if isinstance(value, Tensor):
            found.setdefault(id(value), name)
        elif isinstance(value, (list, tuple, dict)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(item, Tensor):
                    found.setdefault(id(item), f"{name}[{key!r}]")
                elif callable(item):
                    visit(item, depth + 1)
        elif callable(value) and not inspect.isclass(value) and not inspect.isbuiltin(value):
            visit(value, depth + 1)
        else:
            members = getattr(value, "__dict__", {})
            for attribute in mentioned:
                if isinstance(members.get(attribute), Tensor):
                    found.setdefault(id(members[attribute]), f"{name}.{attribute}")

    for mod in mods:
        visit(mod, 0)
    return found


def _defaults(function: FunctionType) -> dict[str, Any]:
    """The defaults of a function's parameters."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
