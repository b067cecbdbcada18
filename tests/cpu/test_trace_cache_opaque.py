"""Mods that are traced at every call, since they do what the cache of traces does not understand, or see values."""

from __future__ import annotations

import functools
import random
import time
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from traced_mods import (
    CPU,
    Mod,
    Namespace,
    Window,
    assert_opaque,
    assert_same,
    causal,
    closure,
    hits,
    slopes,
)

from flexattn.codegen.errors import TraceError
from flexattn.codegen.trace import trace
from flexattn.codegen.trace_cache import cache_info, cached_trace

pytestmark = pytest.mark.feature("traces are kept, and no change is missed")

factor = 2


def test_what_a_mod_computes_is_computed_at_every_call() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.5, 0.25]))
    for mod in (
        lambda s, b, h, q, k: s + weight.exp()[h],
        lambda s, b, h, q, k: s + weight[:1][h],
        lambda s, b, h, q, k: s + weight[0:1, None][h, 0],
        lambda s, b, h, q, k: s * torch.tensor([2.0, 3.0])[h],
    ):
        assert_opaque(mod)
        with torch.no_grad():
            weight.add_(1.0)
        assert_same(mod)
    found = cached_trace(lambda s, b, h, q, k: s + weight.exp()[h], None, device=CPU)
    assert found.captured[0].grad_fn is not None


def test_values_that_a_mod_looks_at() -> None:
    number, weight = torch.tensor(3.0), torch.tensor([1.0, 2.0])
    branches = [
        lambda s, b, h, q, k: s if number.item() > 4 else s * 2,
        lambda s, b, h, q, k: s if number > 4 else s * 2,
        lambda s, b, h, q, k: s * int(number),
        lambda s, b, h, q, k: s * float(number),
        lambda s, b, h, q, k: s if weight.requires_grad else s * 2,
        lambda s, b, h, q, k: s if weight.grad is None else s * 2,
        lambda s, b, h, q, k: s * weight.stride(0) if weight.is_contiguous() else s,
        lambda s, b, h, q, k: s if weight.is_leaf else s * 2,
        lambda s, b, h, q, k: s * weight.tolist()[0],
        lambda s, b, h, q, k: s if torch.equal(weight, weight) else s * 2,
    ]
    for mod in branches:
        assert_same(mod)
    with torch.no_grad():
        number.fill_(5.0)
        weight.fill_(5.0)
    weight.requires_grad_()
    weight.grad = torch.ones(2)
    for mod in branches:
        assert_same(mod)
        assert not hits(mod)


def test_attributes_of_tensors_and_functions() -> None:
    def inner(x: Any) -> Any:
        return x * inner.factor

    inner.factor = 2
    t = torch.tensor([1.0, 2.0])
    t.factor = 2  # type: ignore[attr-defined]
    for mod in (lambda s, b, h, q, k: s * t.factor, lambda s, b, h, q, k: inner(s)):
        assert_same(mod)
        inner.factor = t.factor = 5  # type: ignore[attr-defined]
        assert_same(mod)
        inner.factor = t.factor = 2  # type: ignore[attr-defined]
    t.size = lambda *_: 3  # type: ignore[method-assign]
    assert_same(lambda s, b, h, q, k: s * t.size(0))


def test_things_that_change_by_themselves() -> None:
    count = [0]
    counter = iter(range(100))

    def counting(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        count[0] += 1
        return s * count[0]

    def appending(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        count.append(1)
        return s * len(count)

    def extending(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = count
        seen += [1]
        return s * len(seen)

    def importing(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        from random import random as draw

        return s * draw()

    def caught(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        try:
            return s * len(count)
        except TypeError:
            return s

    changing = [
        counting,
        appending,
        extending,
        importing,
        lambda s, b, h, q, k: s * random.random(),
        lambda s, b, h, q, k: s * time.perf_counter(),
        lambda s, b, h, q, k: s * next(counter),
        lambda s, b, h, q, k: s * getattr(Namespace, "WIN" + "DOW"),
        lambda s, b, h, q, k: s * globals()["factor"],
        lambda s, b, h, q, k: s if torch.is_grad_enabled() else s * 2,
    ]
    for mod in changing:
        before = cache_info().hits
        values = {str(cached_trace(mod, None, device=CPU)) for _ in range(3)}
        assert cache_info().hits == before
        assert len(values) > 1 or mod in changing[-3:], mod
    assert_opaque(caught)


def test_a_nonlocal_that_a_mod_assigns() -> None:
    total = 0

    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        nonlocal total
        total += 1
        return s * total

    programs = {cached_trace(mod, None, device=CPU).program for _ in range(3)}
    assert len(programs) == 3


def test_print_is_seen_at_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        print(s)
        return s

    for _ in range(3):
        cached_trace(mod, None, device=CPU)
    assert capsys.readouterr().out.count("traced") == 3


def test_attributes_that_are_computed() -> None:
    class Computed:
        level = 2

        def __getattr__(self, name: str) -> Any:
            return Computed.level if name == "scale" else super().__getattribute__(name)

        def mod(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s * self.scale

    class Descriptor:
        level = 2

        def __get__(self, *_: Any) -> Any:
            return Descriptor.level

    class Described:
        scale = Descriptor()

        def mod(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s * self.scale

    class Slots:
        __slots__ = ("scale",)

        def mod(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s * self.scale

    slots = Slots()
    slots.scale = 2
    for mod in (Computed().mod, Described().mod, slots.mod):
        assert_same(mod)
    Computed.level = Descriptor.level = slots.scale = 5
    for mod in (Computed().mod, Described().mod, slots.mod):
        assert_same(mod)
    assert hits(slots.mod)


def test_cached_properties() -> None:
    class Lazy:
        base = 2

        @functools.cached_property
        def scale(self) -> int:
            return self.base

        def mod(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s * self.scale

    lazy = Lazy()
    assert_same(lazy.mod)
    lazy.base = 5
    assert_same(lazy.mod)
    lazy.scale = 7
    assert_same(lazy.mod)


def test_a_mask_in_a_mask_whose_attributes_another_function_reads() -> None:
    def outer(inner: Any) -> Mod:
        return lambda b, h, q, k: inner(b, h, q, k) & (q - k > -inner.size)

    class Sized:
        def __init__(self, size: int) -> None:
            self.size = size

        def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return q >= k

    def through(pick: Mod, holder: Any) -> Mod:
        return lambda b, h, q, k: q - k > -pick(holder)

    for inner in (Sized(3), Sized(5)):
        assert_same(outer(inner))
        assert_same(through(lambda held: held.size, inner))
        assert_same(through(lambda held: held[0].size, [inner]))


def test_operators_of_an_object() -> None:
    class Number:
        def __init__(self, value: int) -> None:
            self.value = value

        def __call__(self) -> None: ...

        def __rmul__(self, other: Any) -> Any:
            return other * self.value

    @dataclass
    class Equal:
        value: int

        def __call__(self) -> None: ...

    @dataclass
    class Pair:
        a: Any
        b: Any

        def mod(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s * 2 if self.a == self.b else s

    for value in (2, 3):
        assert_same(closure(Number(value)))
        assert_same(Pair(Equal(2), Equal(value)).mod)
    late = Pair(causal, causal)
    assert_same(late.mod)
    late.b = lambda b, h, q, k: q >= k
    assert_same(late.mod)


def test_the_same_function_or_another_with_the_same_code() -> None:
    first, second = ((lambda x: x * 2) for _ in range(2))
    for a, b in ((first, second), (first, first)):
        assert_same(lambda s, b_, h, q, k, a=a, b=b: s * 2 if a == b else s)
        assert_same(lambda s, b_, h, q, k, a=a, b=b: s * 2 if a is b else s)


def test_a_value_whose_origin_depends_on_a_condition() -> None:
    first, second = types.SimpleNamespace(scale=2), types.SimpleNamespace(scale=3)
    flag = True
    mod = lambda s, b, h, q, k: s * (first if flag else second).scale
    assert_same(mod)
    first.scale = 5
    assert_same(mod)


def test_a_method_that_passes_itself_on() -> None:
    class Passes:
        def __init__(self) -> None:
            self.scale = 2

        def mod(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            me = self
            return s * me.scale

        def nested(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (lambda x: x * self.scale)(s)

        def rebinds(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            self = replaced
            return s * self.scale

    replaced = Passes()
    passes = Passes()
    for scale in (2, 3):
        replaced.scale = scale + 5
        passes.scale = scale
        for mod in (passes.mod, passes.nested, passes.rebinds):
            assert_same(mod)
    assert hits(passes.nested)


def test_a_method_that_takes_itself_as_one_of_many() -> None:
    class Sized:
        def __init__(self, size: int) -> None:
            self.size = size

        def mod(*args: Any) -> Any:
            return args[1] * args[0].size

    for size in (2, 3):
        assert_same(Sized(size).mod)


def test_errors_are_raised_at_every_call() -> None:
    def branching(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s if q > k else -s

    class Nothing:
        pass

    for mod in (branching, lambda s: s, lambda s, b, h, q, k: s + slopes, 3, Nothing(), Window, lambda *a: missing):  # type: ignore[name-defined]  # noqa: F821
        for _ in range(2):
            with pytest.raises((TraceError, NameError)) as expected:
                trace(mod, None)  # type: ignore[arg-type]
            with pytest.raises(type(expected.value)) as found:
                cached_trace(mod, None, device=CPU)  # type: ignore[arg-type]
            assert str(found.value) == str(expected.value)
