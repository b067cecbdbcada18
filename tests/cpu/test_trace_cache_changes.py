"""Whatever changes between two calls, the cache of traces gives what `trace` gives."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from traced_mods import (
    CPU,
    Mod,
    Module,
    Window,
    assert_same,
    hits,
    other,
    scaled,
    slopes,
)

from flexattn import masks
from flexattn.codegen.errors import TraceError
from flexattn.codegen.trace_cache import cached_trace

pytestmark = pytest.mark.feature("traces are kept, and no change is missed")

factor = 2
helper: Mod = lambda x: x * 2


@pytest.fixture
def restored() -> Iterator[None]:
    before = dict(globals())
    yield
    globals().update(before)


def test_changed_globals(restored: None) -> None:
    mod = lambda s, b, h, q, k: helper(s) * factor + slopes[h]
    for name, value in (
        ("factor", 3),
        ("factor", 3.0),
        ("slopes", other),
        ("slopes", torch.rand(2, dtype=torch.float64)),
        ("helper", lambda x: x + 3),
        ("helper", torch.tanh),
        ("helper", lambda x: x * factor),
    ):
        assert_same(mod)
        globals()[name] = value
        assert_same(mod)


def test_a_global_that_hides_a_builtin(restored: None) -> None:
    mod = lambda s, b, h, q, k: s * abs(-3)
    assert_same(mod)
    globals()["abs"] = lambda x: x
    try:
        assert_same(mod)
    finally:
        del globals()["abs"]


def test_changed_attributes() -> None:
    module = Module(slopes)
    for change in (
        lambda: setattr(module, "scale", 3),
        lambda: setattr(module, "scale", 3.5),
        lambda: setattr(module, "weight", torch.nn.Parameter(other)),
        lambda: setattr(module, "table", torch.rand(2, dtype=torch.float64)),
        lambda: setattr(module, "kind", "none"),
        lambda: delattr(module, "kind"),
        lambda: setattr(module, "biased", lambda score, h: score - 1),
        lambda: setattr(module, "forward", lambda *args: args[0] * 5),
        lambda: module.double(),
    ):
        assert_same(module)
        assert_same(module.method)
        change()
        assert_same(module)
        assert_same(module.method)


def test_replaced_methods() -> None:
    class Mine(Module):
        pass

    class Call(Window):
        pass

    module, window = Mine(slopes), Call(3)
    for change in (
        lambda: setattr(Mine, "forward", lambda self, s, b, h, q, k: s * 3),
        lambda: setattr(Mine, "biased", lambda self, s, h: s * 4),
        lambda: setattr(Mine, "table", 7),
        lambda: setattr(Mine, "method", lambda self, s, b, h, q, k: s * 5),
        lambda: setattr(Call, "near", staticmethod(lambda q, k, reach: q > k)),
        lambda: setattr(Call, "reach", 9),
        lambda: setattr(Call, "extra", 5),
        lambda: setattr(window, "size", 8),
        lambda: setattr(Call, "__call__", lambda self, b, h, q, k: q < k),
        lambda: setattr(Call, "__getattribute__", lambda self, name: 3),
        lambda: setattr(Mine, "__call__", lambda self, s, b, h, q, k: s * 6),
    ):
        for _ in range(2):
            assert_same(module, window)
            assert_same(module.method, masks.not_mask(window))
            change()


def test_changed_functions() -> None:
    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, a: Any = 2, *, c: Any = 3) -> Tensor:
        return s * a + c

    assert_same(mod)
    mod.__defaults__ = (4,)
    assert_same(mod)
    mod.__kwdefaults__ = {"c": 5}
    assert_same(mod)
    mod.__code__ = (lambda s, b, h, q, k, a=2, *, c=3: s - a).__code__
    assert_same(mod)


def test_a_changed_cell() -> None:
    value: Any = 2

    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s * value

    for value in (3, 2.5, slopes.sum(), "no"):
        if isinstance(value, str):
            with pytest.raises(TraceError):
                cached_trace(mod, None, device=CPU)
        else:
            assert_same(mod)
    assert mod.__closure__ is not None
    mod.__closure__[0].cell_contents = 9
    assert_same(mod)


def test_changed_contents() -> None:
    items: list[Any] = [2, slopes]
    table: dict[Any, Any] = {"a": 2, "t": slopes}
    listed = lambda s, b, h, q, k: s * items[0] + items[1][h]
    looked_up = lambda s, b, h, q, k: s * table["a"] + table.get("t", slopes)[h]
    iterated = lambda s, b, h, q, k: s * sum([len(key) for key in table])
    for change in (
        lambda: items.__setitem__(0, 3),
        lambda: items.__setitem__(1, other.double()),
        lambda: items.append(4),
        lambda: table.__setitem__("a", 5),
        lambda: table.pop("t"),
        lambda: table.__setitem__("long", 1),
    ):
        for mod in (listed, looked_up, iterated):
            assert_same(mod)
        change()
        for mod in (listed, looked_up, iterated):
            assert_same(mod)
    assert hits(listed) and hits(looked_up) and hits(iterated)


def test_changed_arguments_of_a_partial() -> None:
    for mod in (
        functools.partial(scaled, 2),
        functools.partial(scaled, 3),
        functools.partial(scaled, slopes[0]),
        functools.partial(functools.partial(scaled), 3),
        functools.partial(lambda s, b, h, q, k, t: s * t, t=4),
        functools.partial(lambda s, b, h, q, k, t: s * t, t=5),
    ):
        assert_same(mod)


def test_hooks_of_modules() -> None:
    module = Module(slopes)
    assert_same(module)
    handle = module.register_forward_hook(lambda module, args, result: result * 3)
    assert_same(module)
    handle.remove()
    assert hits(module)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, result: result * 5)
    assert_same(module)
    handle.remove()
    handle = module.register_forward_pre_hook(lambda module, args: (args[0] * 7, *args[1:]))
    assert_same(module)
    handle.remove()


# ---- mods at random, changed at random


class Part:
    """A term of a mod, kept in many places: cell, global, attribute, default, list."""

    def __init__(self) -> None:
        self.value: Any = 1

    def term(self, s: Tensor, h: Tensor) -> Tensor:
        return apply(self.value, s, h)


def apply(value: Any, s: Tensor, h: Tensor) -> Any:
    """`value` used according to what it is."""
    if isinstance(value, Tensor):
        return s * (value[h] if value.dim() == 1 else value)
    return s + value if isinstance(value, (int, float)) else value(s, h)


VALUES = st.sampled_from(
    [
        *(1, 2, 0, True, False, 1.0, 2.5, -0.0, 0.0),
        *(torch.rand(2), torch.rand(2), torch.rand(3), torch.rand(2).double(), torch.tensor([1, 2]), torch.tensor(3.0)),
        *(lambda s, h: s * 3, lambda s, h: s * 4, lambda s, h: s + slopes[h], lambda s, h: s * slopes.exp()[h]),
    ]
)
GLOBAL: Any = 1


@given(
    st.lists(st.tuples(st.sampled_from(("cell", "attribute", "default", "global", "list", "dict", "method")), VALUES))
)
def test_any_changes(changes: list[tuple[str, Any]]) -> None:
    cell: Any = 1
    part, items, table = Part(), [1, 1], {"a": 1}

    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, default: Any = 1) -> Tensor:
        for value in (cell, GLOBAL, default, part.value, items[1], table["a"]):
            s = apply(value, s, h)
        return part.term(s, h)

    class Mine(Part):
        pass

    part = Mine()
    before = GLOBAL
    try:
        for place, value in changes:
            match place:
                case "cell":
                    cell = value
                case "attribute":
                    part.value = value
                case "default":
                    mod.__defaults__ = (value,)
                case "global":
                    globals()["GLOBAL"] = value
                case "list":
                    items[1] = value
                case "dict":
                    table["a"] = value
                case "method":
                    Mine.term = lambda self, s, h, value=value: apply(value, s, h)  # type: ignore[method-assign]
            assert_same(mod)
    finally:
        globals()["GLOBAL"] = before
