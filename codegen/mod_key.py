"""A description of all that a mod can reach, as a key: equal descriptions, equal traces.

It says which code runs, the values of numbers and strings, dtypes, shapes and devices of tensors, and which of the objects
are the same. What it reaches is read from the bytecode, see `bytecode`. Whatever is not understood is *opaque*. The key
holds code objects, classes and strings, but neither tensors nor modules nor other objects.
"""

from __future__ import annotations

import functools
import math
import operator
from abc import ABCMeta
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from .bytecode import Chain, Plan, is_understood, plan_of
from .private import only_calls_forward

MAX_ITEMS = 64  # of a list, tuple or dictionary

_PLAIN = frozenset((int, bool, str, bytes, type(None), type(...), torch.dtype, torch.device, range))
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_CONTAINERS = frozenset((tuple, list, dict, torch.Size))
_METACLASSES = (type, ABCMeta)
_EQUAL: Any = object.__eq__
_GETATTRIBUTE: Any = object.__getattribute__
_MODULE_CALL: Any = torch.nn.Module.__call__
_MODULE_GETATTR: Any = torch.nn.Module.__getattr__
_UNBOUND = object()
_MISSING = object()

# Functions and classes that depend on their arguments alone, by identity.
_PURE: dict[int, Any] = {
    id(f): f
    for f in (
        *(abs, all, any, bool, dict, divmod, enumerate, float, int, isinstance, len, list, map, max, min, pow, range),
        *(reversed, round, slice, sorted, sum, tuple, zip, functools.reduce, Tensor, torch.nn.Parameter, torch.Size),
        *(f for f in vars(math).values() if isinstance(f, BuiltinFunctionType)),
        *(getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")),
        *(getattr(operator, name) for name in ("and_", "or_", "xor", "invert", "neg", "pos", "abs", "not_", "getitem")),
        *(getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "lshift", "rshift")),
        *(
            f
            for space in (torch, torch.special, torch.nn.functional, Tensor)
            for name, f in list(vars(space).items())
            if callable(f) and not isinstance(f, type) and not name.startswith("_") and is_understood(name)
        ),
    )
}
# Methods of a class that are no operators: what else a value can do shows in the bytecode that reads its name.
_NO_OPERATORS = frozenset(
    (
        *("__init__", "__new__", "__post_init__", "__init_subclass__", "__call__", "__repr__", "__str__", "__hash__"),
        *("__eq__", "__module__", "__name__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__slots__"),
        *("__annotations__", "__dataclass_fields__", "__dataclass_params__", "__match_args__", "__replace__"),
        *("__static_attributes__", "__firstlineno__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
        *("__setattr__", "__delattr__", "__getattr__", "__getstate__", "__setstate__", "__reduce__", "__dir__"),
        *("__abstractmethods__", "__orig_bases__", "__parameters__", "__classcell__", "__copy__", "__deepcopy__"),
        *("__slotnames__", "__reduce_ex__", "__getnewargs__", "__sizeof__", "__format__", "__subclasshook__"),
    )
)


class Opaque(Exception):
    """Something that a key cannot describe."""


class Reached:
    """A walk over what the mods of one call can reach: the parts of its key, and the tensors on the way."""

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.tensors: list[Tensor] = []
        self._place: dict[Any, int] = {}  # of every object with an identity
        self._held: list[Any] = []  # so that their ids stay their own
        self._instances: list[Any] = []  # of classes of the user's, whose attributes may be read by name
        self._loose: set[str] = set()
        self._mutable = self._in_place = False

    def mod(self, mod: Any) -> None:
        """What a mod itself reaches."""
        kind = type(mod)
        if kind is FunctionType or kind is MethodType or kind is functools.partial:
            self._value(mod)
        else:
            self._instance(mod, kind)

    def finish(self) -> None:
        """Raise for what can only be told when everything is known."""
        if self._in_place and self._mutable:
            raise Opaque("an operator such as `+=` may change a list")
        if self._loose and self._instances:
            for instance in self._instances:
                for name in self._loose:
                    if _may_have(instance, name):
                        raise Opaque(f"`.{name}` may be that of a {type(instance).__name__}")

    def _again(self, mark: Any, *objects: Any) -> bool:
        """Whether these objects have been described; if so, which ones they were is part of the key."""
        place = self._place.get(mark)
        if place is not None:
            self.parts += ("again", place)
            return True
        self._place[mark] = len(self._held)
        self._held.append(objects)
        return False

    def _value(self, value: Any) -> None:
        """A value that may be used in any way."""
        kind = type(value)
        if kind in _TENSORS:
            self._tensor(value, kind)
        elif kind in _PLAIN:
            self.parts += (kind, value)
        elif kind is float:
            self.parts += (kind, value if value and value == value else repr(value))  # -0.0, and nan
        elif id(value) in _PURE:
            self.parts += ("pure", id(value))
        elif kind is FunctionType:
            self._function(value, _UNBOUND)
        elif kind is MethodType:
            self._method(value)
        elif kind is functools.partial:
            self._partial(value)
        elif kind in _CONTAINERS:
            self._container(value, kind)
        elif callable(value) and not isinstance(value, (type, BuiltinFunctionType)):
            self._instances.append(value)
            self._instance(value, kind)
        else:
            raise Opaque(f"it reaches {_named(value)}")

    def _tensor(self, tensor: Tensor, kind: type) -> None:
        if self._again(id(tensor), tensor):
            return
        self.tensors.append(tensor)
        self.parts += (kind, tensor.dtype, tensor.shape, tensor.device)
        own = tensor.__dict__
        if own and any(map(is_understood, own)):
            raise Opaque("a tensor has attributes of its own")

    def _container(self, value: Any, kind: type) -> None:
        if kind is list or kind is dict:
            self._mutable = True
            if self._again(id(value), value):
                return
        if len(value) > MAX_ITEMS:
            raise Opaque(f"a {kind.__name__} has more than {MAX_ITEMS} items")
        self.parts += (kind, len(value))
        for item in list(value):
            if kind is dict:
                if type(item) not in _PLAIN:
                    raise Opaque("a dictionary has keys that are no numbers or strings")
                self.parts += (type(item), item)
                item = value[item]
            self._value(item)

    def _partial(self, value: functools.partial[Any]) -> None:
        if self._again(id(value), value):
            return
        if value.__dict__:
            raise Opaque("a partial has attributes of its own")
        self.parts += ("partial", len(value.args), len(value.keywords), *value.keywords)
        for item in (value.func, *value.args, *value.keywords.values()):
            self._value(item)

    def _method(self, value: MethodType) -> None:
        if type(value.__func__) is not FunctionType:
            raise Opaque(f"it reaches {_named(value)}")
        self._function(value.__func__, value.__self__)

    def _function(self, function: FunctionType, bound: Any) -> None:
        if self._again((id(function), id(bound)), function, bound):
            return
        plan = plan_of(function.__code__)
        if plan.refusal:
            raise Opaque(f"{plan.refusal}, in `{function.__qualname__}`")
        if bound is not _UNBOUND and not plan.code.co_argcount:
            raise Opaque("a method takes itself as one of `*args`")
        self.parts.append(plan)
        self._in_place |= plan.in_place
        if plan.loose:
            self._loose |= plan.loose
        defaults, named, own = function.__defaults__, function.__kwdefaults__, function.__dict__
        if defaults or named or own:
            self._given(defaults, named, own)
        else:
            self.parts.append("bare")
        for number, names in plan.cells:
            assert function.__closure__ is not None
            self._chain(function.__closure__[number].cell_contents, names)
        if plan.globals:
            self._globals(function, plan)
        if not plan.own:
            return
        if bound is _UNBOUND:
            for name in plan.own_names:
                self._read(name)
        elif plan.rebinds:
            raise Opaque("a method assigns to its first argument")
        else:
            for names in plan.own:
                self._chain(bound, names)

    def _given(self, defaults: Any, *spaces: dict[str, Any] | None) -> None:
        """Defaults and attributes of a function."""
        for given in spaces:
            self.parts.append(len(given) if given else 0)
            if given:
                self.parts += given
                for value in tuple(given.values()):
                    self._value(value)
        self.parts.append(defaults and len(defaults))
        for value in defaults or ():
            self._value(value)

    def _globals(self, function: FunctionType, plan: Plan) -> None:
        space = function.__globals__
        for name, names in plan.globals:
            value = space.get(name, _MISSING)
            if value is _MISSING:
                value = function.__builtins__[name]  # type: ignore[attr-defined]
            self._chain(value, names)

    def _read(self, name: str) -> None:
        """An attribute of a value that may be anything."""
        if not is_understood(name):
            raise Opaque(f"it reads `.{name}` of a value that it computes or is given")
        self._loose.add(name)

    def _chain(self, value: Any, names: Chain) -> None:
        """`value.a.b...`, as far as its objects are what they seem; the last one may be used in any way."""
        if not names:
            return self._value(value)
        for number, name in enumerate(names):
            kind = type(value)
            if kind in _TENSORS or kind in _PLAIN or kind is float or kind in _CONTAINERS:
                for rest in names[number:]:
                    self._read(rest)
                break
            if kind is ModuleType:
                value = value.__dict__[name]
                continue
            raw, value = _looked_up(value, kind, name)
            if raw is None:
                continue
            self._function(*raw)
            for rest in names[number + 1 :]:  # of the result of a property
                self._read(rest)
            return
        self._value(value)

    def _instance(self, instance: Any, kind: type) -> None:
        """An object of a class of the user's that can be called."""
        if self._again(id(instance), instance):
            self._instances.append(instance)
            return
        _check_class(kind)
        self.parts.append(kind)
        if kind.__eq__ is not _EQUAL:
            for value in tuple(vars(instance).values()):
                self._value(value)
        name = "__call__"
        if isinstance(instance, torch.nn.Module) and kind.__call__ is _MODULE_CALL:
            if not only_calls_forward(instance):
                raise Opaque("a module has hooks, or is compiled")
            name = "forward"
            raw, value = _looked_up(instance, kind, name)
        else:
            raw, value = _found(kind, name), None
            raw = (raw, instance) if type(raw) is FunctionType else None
        if raw is not None and raw[1] is not _UNBOUND:
            self._function(*raw)
        elif value is not None:
            self._value(value)
        else:
            raise Opaque(f"it reaches {_named(instance)}")


def _named(value: Any) -> str:
    name = getattr(value, "__name__", None)
    return f"`{name}`" if isinstance(name, str) else f"a {type(value).__name__}"


def _found(kind: type, name: str) -> Any:
    """What a class has under a name, as it stands in its body."""
    for base in kind.__mro__:
        space = base.__dict__
        if name in space:
            return space[name]
    return _MISSING


def _looked_up(value: Any, kind: type, name: str) -> tuple[tuple[Any, Any] | None, Any]:
    """`value.name`: a function of the class with the object it is bound to, or else a value.

    Raises `Opaque` for attributes that code of the user's may compute, but for properties, which are functions.
    """
    if isinstance(value, type):
        if kind not in _METACLASSES:
            raise Opaque(f"the class of `{value.__name__}` is not `type`")
        raw = _found(value, name)
        if type(raw) is FunctionType:
            return (raw, _UNBOUND), None
        if type(raw) is staticmethod and type(raw.__func__) is FunctionType:
            return (raw.__func__, _UNBOUND), None
        if raw is _MISSING or hasattr(type(raw), "__get__"):
            raise Opaque(f"it reads `{value.__name__}.{name}`")
        return None, raw
    if kind.__getattribute__ is not _GETATTRIBUTE or type(kind) not in _METACLASSES:
        raise Opaque(f"{kind.__name__} has ways of its own to find attributes")
    raw = _found(kind, name)
    if type(raw) is property and type(raw.fget) is FunctionType:
        return (raw.fget, value), None
    if type(raw) is MemberDescriptorType:  # __slots__
        return None, raw.__get__(value, kind)
    if hasattr(type(raw), "__set__"):
        raise Opaque(f"`.{name}` is a descriptor")
    own = getattr(value, "__dict__", None)
    if own is not None and name in own:
        return None, own[name]
    if type(raw) is FunctionType:
        return (raw, value), None
    if type(raw) is staticmethod and type(raw.__func__) is FunctionType:
        return (raw.__func__, _UNBOUND), None
    if raw is not _MISSING and not hasattr(type(raw), "__get__"):
        return None, raw
    if raw is _MISSING and getattr(kind, "__getattr__", None) is _MODULE_GETATTR:
        for space in (value._parameters, value._buffers, value._modules):
            if name in space:
                return None, space[name]
    raise Opaque(f"`.{name}` of a {kind.__name__} is computed")


_CHECKED: dict[type, int] = {}


def _check_class(kind: type) -> None:
    """Raise `Opaque` unless objects of a class can be called, compared, and nothing else."""
    size = sum(len(base.__dict__) for base in kind.__mro__)  # a method that is added later changes it
    if _CHECKED.get(kind) == size:
        return
    if type(kind) not in _METACLASSES or kind.__getattribute__ is not _GETATTRIBUTE:
        raise Opaque(f"{kind.__name__} has ways of its own to find attributes")
    for base in kind.__mro__[:-1]:
        for name in base.__dict__:
            if name.startswith("__") and name.endswith("__") and name not in _NO_OPERATORS:
                raise Opaque(f"{base.__name__} has `{name}`")
    if len(_CHECKED) >= 512:
        _CHECKED.clear()
    _CHECKED[kind] = size


def _may_have(instance: Any, name: str) -> bool:
    kind = type(instance)
    spaces = [getattr(instance, "__dict__", {})]
    if isinstance(instance, torch.nn.Module):
        spaces += [instance._parameters, instance._buffers, instance._modules]
    elif hasattr(kind, "__getattr__"):
        return True
    return hasattr(kind, name) or any(name in space for space in spaces)
