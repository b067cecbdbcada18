"""The cache of traces: the common mods are found in it, and nothing else is. It is bounded, holds nothing, takes threads."""

from __future__ import annotations

import functools
import gc
import math
import operator
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from traced_mods import (
    CPU,
    Config,
    Frozen,
    Mod,
    Module,
    Namespace,
    Window,
    assert_hits,
    assert_opaque,
    assert_same,
    causal,
    closure,
    hits,
    ids,
    indexed,
    other,
    scaled,
    slopes,
    two,
)

from flexattn import masks, mods
from flexattn.codegen import bytecode, trace_cache
from flexattn.codegen.trace import trace
from flexattn.codegen.trace_cache import cache_info, cached_trace, why_uncached

pytestmark = pytest.mark.feature("traces are kept, and no change is missed")

factor = 2


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    trace_cache.clear()
    yield
    trace_cache.clear()


class Rebinds:
    def mod(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        s = s + 1
        s *= 2
        return s


class Holds:
    def __init__(self, value: Any) -> None:
        self.value = value

    def mod(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s * self.value.scale + self.value.window


COMMON: dict[str, Callable[[], Any]] = {
    "nothing": lambda: (None, None),
    "closure over a tensor": lambda: indexed(torch.rand(2)),
    "closure over a float": lambda: closure(2.5),
    "both roles": lambda: (indexed(torch.rand(2)), causal),
    "global tensor": lambda: lambda s, b, h, q, k: s + slopes[h] * (k - q),
    "method of a module": lambda: Module(torch.rand(2)).method,
    "module": lambda: Module(torch.rand(2)),
    "object": lambda: Window(3),
    "dataclass": lambda: Frozen(3, torch.rand(2)),
    "partial": lambda: functools.partial(scaled, 2.5),
    "partial of a tensor": lambda: functools.partial(scaled, torch.tensor(2.5)),
    "defaults": lambda: lambda s, b, h, q, k, t=slopes: s + t[h],
    "torch functions": lambda: lambda s, b, h, q, k: torch.where(q > k, F.softplus(s), torch.tanh(s).clamp(-1, 1)),
    "builtins": lambda: lambda s, b, h, q, k: sum(slopes[h] * abs(k - q) for _ in ()) + s,
    "comprehension": lambda: lambda s, b, h, q, k: s + sum([s * i for i in range(3)]),
    "conditional": lambda: lambda s, b, h, q, k: s if factor > 5 else s * factor,
    "first argument assigned": lambda: Rebinds().mod,
    "reduce": lambda: lambda s, b, h, q, k: s * functools.reduce(operator.mul, (slopes[h], other[h])),
    "class as a namespace": lambda: lambda b, h, q, k: Namespace.near(q, k) & (q - k > -Namespace.WINDOW),
    "named tuple": lambda: Holds(Config(3, 0.5)).mod,
    "lambda inside": lambda: lambda s, b, h, q, k: (lambda x: x * slopes[h])(s),
    "size": lambda: lambda s, b, h, q, k: s * slopes.shape[0] + slopes.dim(),
    "causal_mask": lambda: masks.causal_mask,
    "noop_mask": lambda: masks.noop_mask,
    "causal": lambda: masks.causal(torch.tensor([1, 2])),
    "window": lambda: masks.sliding_window(3),
    "streaming": lambda: masks.streaming(1, 3),
    "chunked": lambda: masks.chunked(4),
    "document": lambda: masks.document_mask(ids.clone()),
    "padding": lambda: masks.padding(torch.tensor([3, 4])),
    "nested": lambda: masks.and_masks(
        masks.causal_mask, masks.or_masks(masks.sliding_window(3), masks.not_mask(masks.document_mask(ids.clone())))
    ),
    "of the user's": lambda: masks.and_masks(causal, Frozen(3), Window(2)),
    "alibi": lambda: mods.alibi(torch.rand(2)),
    "softcap": lambda: mods.softcap(20.0),
    "relative bias": lambda: mods.relative_bias(torch.rand(2, 7)),
    "composed": lambda: mods.compose(mods.softcap(20.0), mods.alibi(torch.rand(2)), indexed(torch.rand(2))),
}


UNCACHED = ("builtins", "named tuple")  # a generator; a class whose attributes are computed


@pytest.mark.parametrize("name", [name for name in COMMON if name not in UNCACHED])
def test_common_mods_are_traced_once(name: str) -> None:
    assert_hits(COMMON[name])


@pytest.mark.parametrize("name", UNCACHED)
def test_what_is_not_understood_is_traced_at_every_call(name: str) -> None:
    assert_opaque(COMMON[name]())


def made_masks() -> list[Mod]:
    """Every mask of the package, as its docstring makes it."""
    flags, starts = torch.tensor([True, False, False, False]), torch.tensor([0, 0, 1, 1])
    grid = masks.natten_2d(2, 2, 1)
    return [
        *(masks.causal_mask, masks.noop_mask, masks.causal(2), masks.dilated(2, 3), masks.window(2, 3), grid),
        *(masks.prefix_lm(3), masks.prefix_lm(torch.tensor([3, 2])), masks.global_tokens(flags), masks.chunked(2)),
        *(masks.padding(torch.tensor([3, 4])), masks.streaming(1, 2), masks.document_mask(starts)),
    ]


def test_masks_of_the_package_are_cached_alone_and_combined() -> None:
    for mask in made_masks():
        for combined in (mask, masks.not_mask(mask), masks.and_masks(masks.causal_mask, mask)):
            assert_same(None, combined)
            assert why_uncached(None, combined, device=CPU) == ""


def test_captured_tensors_are_those_of_this_call() -> None:
    first, second = torch.rand(2), torch.rand(2)
    assert cached_trace(indexed(first), None, device=CPU).captured[0] is first
    found = cached_trace(indexed(second), None, device=CPU)
    assert cache_info().hits == 1
    assert found.captured[0] is second


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(2, dtype=torch.float64),
        torch.rand(2, 1)[:, 0],
        torch.rand(3),
        torch.tensor([1, 2]),
        torch.nn.Parameter(torch.rand(2)),
        torch.rand(2, requires_grad=True),
        torch.empty(2, device="meta"),
        torch.rand(2).as_subclass(type("Mine", (Tensor,), {})),
    ],
    ids=("float64", "strided", "longer", "int64", "parameter", "requires grad", "meta", "subclass"),
)
def test_another_tensor(tensor: Tensor) -> None:
    assert_same(indexed(slopes))
    if tensor.is_meta:
        assert trace(indexed(tensor), None).captured[0] is cached_trace(indexed(tensor), None, device=CPU).captured[0]
    else:
        assert_same(indexed(tensor))


def test_two_tensors_that_are_one() -> None:
    assert_same(two(slopes, other))
    assert_same(two(slopes, slopes))
    assert_same(two(other, slopes))
    assert len(cached_trace(two(slopes, slopes), None, device=CPU).captured) == 1
    assert len(cached_trace(two(slopes, other), None, device=CPU).captured) == 2


@pytest.mark.parametrize("value", [2.5, 3.5, 0.0, -0.0, math.nan, math.inf, -math.inf, 2, 1, True, False, 1.0, 0])
def test_a_number_is_that_of_this_call(value: Any) -> None:
    for earlier in (1, 1.0, True, 0.0, 2.5):
        assert_same(closure(earlier))
    assert_same(closure(value))


def test_captured_lists_are_of_the_caller() -> None:
    first = cached_trace(closure(2.5), None, device=CPU).captured
    second = cached_trace(closure(2.5), None, device=CPU).captured
    assert cache_info().hits == 1
    first[0] = 7.0
    assert second == [2.5] == cached_trace(closure(2.5), None, device=CPU).captured


def test_the_default_dtype() -> None:
    mod = lambda s, b, h, q, k: s + q / 2 * 0.5
    assert_same(mod)
    try:
        torch.set_default_dtype(torch.float64)
        assert_same(mod)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(mod)
    assert_same(mod, score_dtype=torch.float64)


def test_modes_and_transforms() -> None:
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    mod = indexed(slopes)
    assert_same(mod)
    before = cache_info()
    with Doubling():
        assert_same(mod)
    torch.func.vmap(lambda t: assert_same(indexed(t)) or t)(torch.rand(3, 2))
    with torch._subclasses.FakeTensorMode():
        assert_same(indexed(torch.rand(2)))
    assert cache_info().hits == before.hits
    with torch.inference_mode():
        assert_same(mod)
        assert_same(closure(2.5))
    with torch.device("cpu"):
        assert hits(mod)
    weight = torch.nn.Parameter(torch.rand(2))
    (cached_trace(closure(2.5), None, device=CPU).captured[0] * weight).sum().backward()


def test_nothing_of_the_user_is_kept_alive() -> None:
    module, tensor = Module(slopes), torch.rand(2)
    mod = indexed(tensor)
    window = Window(3)
    kept = [weakref.ref(x) for x in (module, module.weight, tensor, mod, window)]
    assert_same(module)
    assert_same(mod)
    assert_same(masks.not_mask(window))
    del module, tensor, mod, window
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)
    assert cache_info().size > 0


def test_the_cache_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_cache, "CAPACITY", 3)
    for i in range(5):
        cached_trace(closure(i), None, device=CPU)
        cached_trace(closure(0), None, device=CPU)  # used all the time, and kept
    assert cache_info().size == 3
    assert hits(closure(0)) and hits(closure(4))
    assert not hits(closure(1))
    monkeypatch.setattr(bytecode, "_CAPACITY", 3)
    for i in range(5):
        scope: dict[str, Any] = {}
        exec(f"mod = lambda s, b, h, q, k: s * {i}", scope)
        assert_same(scope["mod"])


def test_a_change_while_a_mod_is_traced_is_not_kept() -> None:
    """As another thread could make it."""

    class Mod:
        def __init__(self) -> None:
            self.scale = 2

        def __call__(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s * self.scale

    mod = Mod()
    original = trace_cache.record

    def changing(*args: Any) -> Any:
        mod.scale = 3
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_cache, "record", changing)
        assert "int32" not in cached_trace(mod, None, device=CPU).program
    mod.scale = 2
    assert_same(mod)


def test_threads() -> None:
    wrong: list[Any] = []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(200):
            value = generator.choice((1, 2, 3, 2.5, True))
            tensor = torch.rand(2)
            mod = lambda s, b, h, q, k: s * value + tensor[h]
            found, expected = cached_trace(mod, None, device=CPU), trace(mod, None)
            if found.program != expected.program or found.captured[0] is not tensor:
                wrong.append((found, expected))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
