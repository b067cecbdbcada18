"""What is named and is neither a mask_mod nor a score_mod: what it is, and what to name instead."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from flexattn.codegen.trace import positional_count

ROLES: dict[int | None, str] = {4: "mask_mod", 5: "score_mod"}  # by the number of arguments
_ASKED = "a mask_mod takes (b, h, q_idx, kv_idx) and a score_mod (score, b, h, q_idx, kv_idx)"
_INDICES = {"q_idx", "kv_idx"}


def why_no_mod(name: str, made: Any, may_be_called: bool) -> str:
    """Why a value is neither; empty if it is one.

    Args:
        name: what the user wrote for it.
        made: the value.
        may_be_called: whether `name` can have parentheses after it.
    """
    if isinstance(made, type):
        return _of_class(name, made)
    if not callable(made):
        return _of_object(name, made)
    found = parameters(made)
    if found[:1] == ["self"] and inspect.isfunction(made):
        owner, _, method = name.rpartition(".")
        return f"{name} is a method without its object; {_by_an_object(owner, method)}"
    takes = f"{name} takes ({', '.join(found)}); {_ASKED}."
    if found[:1] == ["b"] and "kv_idx" in found[:-1]:
        return f"{takes} What else a mask needs it captures: write a function of ({', '.join(found[4:])}) that makes the mask"
    if positional_count(made) in ROLES:
        return ""
    if any(p.startswith("*") for p in found):
        return f"{takes} Write its parameters out"
    is_factory = may_be_called and not _INDICES & set(found) and found != ["..."]
    return f"{takes} If it makes one, call it: {name}({', '.join(found)})" if is_factory else takes.rstrip(".")


def parameters(function: Any, all_of_them: bool = False) -> list[str]:
    """The names of what a callable takes; those that have no default, unless `all_of_them`."""
    try:
        found = inspect.signature(_called(function)).parameters.values()
    except (TypeError, ValueError):
        return ["..."]
    star: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [
        star.get(p.kind, "") + p.name + ("" if p.default is p.empty else f"={p.default}")
        for p in found
        if all_of_them or p.default is p.empty
    ]


def _called(made: Any) -> Any:
    """What says the parameters: of a module of torch its `forward`."""
    return made.forward if isinstance(made, torch.nn.Module) else made


def _of_class(name: str, made: type) -> str:
    methods = list(_methods(made))
    if "__call__" in methods:
        return f"{name} makes mods; call it: {name}{_arguments(made)}"
    if methods:
        return f"{name} is a class; {_by_an_object(name, methods[0], _arguments(made))}"
    return f"{name} is a class; {_ASKED}. If its objects are mods, name one of them: {name}{_arguments(made)}"


def _by_an_object(owner: str, method: str, arguments: str = "(...)") -> str:
    """How a method of a class is named."""
    source, colon, short = owner.rpartition(":")
    named = f"{source}{colon}obj.{method}"
    return f"a method is named by its object: write obj = {short}{arguments} in the module, and name {named}"


def _arguments(made: type) -> str:
    found = parameters(made)
    return "(...)" if any(p.startswith("*") for p in found) else f"({', '.join(found)})"


def _of_object(name: str, made: Any) -> str:
    methods = list(_methods(type(made)))
    if methods:
        return f"{name} is of type {type(made).__name__}, which has a mod as its method: {name}.{methods[0]}"
    kinds = "a mask_mod, a score_mod or a BlockMask"
    if isinstance(made, (dict, list, tuple)):
        return (
            f"{name} is a {type(made).__name__}; {kinds} is asked for. Give its entry a name of its own in the module"
        )
    return f"{name} is of type {type(made).__name__}; {kinds} is asked for"


def _methods(made: type) -> Iterator[str]:
    """The methods of a class that are mods once they are an object's: by their number of arguments, with a kv_idx."""
    names = {"forward": "__call__"} if issubclass(made, torch.nn.Module) else {}
    for name in dir(made):
        function = inspect.getattr_static(made, name)
        if not inspect.isfunction(function):
            continue
        found = parameters(function)
        if found[:1] == ["self"] and "kv_idx" in found and len(found) - 1 in ROLES:
            yield names.get(name, name)
