"""Switching the route of PyTorch's flex_attention: who follows, and what is put back."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as theirs
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from flexattn.codegen.errors import UnsupportedTorch
from flexattn.integrations import torch_flex

pytestmark = pytest.mark.feature("models that call PyTorch's flex_attention")

CODE, HOP = flex_attention.__code__, theirs.flex_attention_hop


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    left = torch_flex.installed()
    torch_flex.uninstall()
    assert not left and flex_attention.__code__ is CODE and theirs.flex_attention_hop is HOP


def qkv() -> list[Tensor]:
    return [torch.randn(2, 4, 96, 16) for _ in range(3)]


def lists_alone() -> theirs.BlockMask:
    """Lists without a mask_mod: PyTorch ignores them where it does not generate a kernel, so results tell who computed."""
    return theirs.BlockMask.from_kv_blocks(
        torch.ones(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 3, dtype=torch.int32), BLOCK_SIZE=32
    )


class AsAttribute(torch.nn.Module):
    def __init__(self, attend: Callable[..., Tensor] = flex_attention) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
        return self.attend(q, k, v, block_mask=block_mask)


def by_global_name(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    return flex_attention(q, k, v, block_mask=block_mask)


def by_attribute_of_the_module(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    return torch.nn.attention.flex_attention.flex_attention(q, k, v, block_mask=block_mask)


def by_default(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, attend: Any = flex_attention) -> Tensor:
    return attend(q, k, v, block_mask=block_mask)


def by_closure(attend: Any = flex_attention) -> Callable[..., Tensor]:
    return lambda q, k, v, block_mask: attend(q, k, v, block_mask=block_mask)


def by_table(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    return TABLE["flex"](q, k, v, block_mask=block_mask)


TABLE = {"flex": flex_attention}
HOLDERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "global": lambda: by_global_name,
    "module": lambda: by_attribute_of_the_module,
    "attribute": AsAttribute,
    "default": lambda: by_default,
    "closure": by_closure,
    "table": lambda: by_table,
    "partial": lambda: by_closure(functools.partial(flex_attention, scale=0.25)),
    "compiled": lambda: by_closure(torch.compile(flex_attention, backend="eager")),
    "compiled attribute": lambda: AsAttribute(torch.compile(flex_attention, backend="eager")),
}


@pytest.mark.parametrize("starts_routed", [False, True], ids=["compiled before", "compiled after"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", HOLDERS)
def test_whatever_holds_the_function_follows_every_switch(name: str, compiled: bool, starts_routed: bool) -> None:
    q, k, v = qkv()
    block_mask = lists_alone()
    first_block = torch.softmax(q @ k[:, :, :32].mT / 4, -1) @ v[:, :, :32]
    everything = torch.softmax(q @ k.mT / 4, -1) @ v
    graphs = 0

    def counting(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    call = HOLDERS[name]()
    if compiled:
        call = torch.compile(call, backend=counting, fullgraph=True)
    for routed in (starts_routed, not starts_routed) * 3:
        (torch_flex.install if routed else torch_flex.uninstall)()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, that it is not compiled
            found = call(q, k, v, block_mask)
        torch.testing.assert_close(found, first_block if routed else everything)
    torch_flex.uninstall()
    assert graphs == (2 if compiled else 0)  # switching to and fro compiles nothing more


def test_routes_nest_and_end_after_exceptions() -> None:
    outer = torch_flex.route()
    with outer:
        with pytest.raises(KeyError), torch_flex.route():
            raise KeyError
        assert torch_flex.installed()
        with outer, outer:
            assert torch_flex.installed()
        assert torch_flex.installed() and flex_attention.__code__ is not CODE
    assert not torch_flex.installed() and flex_attention.__code__ is CODE


def test_a_route_decorates() -> None:
    @torch_flex.route()
    def call(q: Tensor) -> bool:
        flex_attention(q, q, q).sum().backward()
        return torch_flex.installed()

    q = torch.randn(1, 1, 8, 8, requires_grad=True)
    assert call(q) and call(q) and q.grad is not None and not torch_flex.installed()


def test_installing_twice_is_as_good_as_once_and_a_route_outlives_it() -> None:
    torch_flex.uninstall()  # nothing to undo
    torch_flex.install()
    torch_flex.install()
    with torch_flex.route():
        torch_flex.uninstall()
        assert torch_flex.installed()
    assert not torch_flex.installed()
    with torch_flex.route():
        torch_flex.install()
    assert torch_flex.installed()
    torch_flex.uninstall()


def test_other_threads_are_routed_as_long_as_one_route_is_open() -> None:
    seen: list[bool] = []
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with torch_flex.route():
            q = torch.randn(1, 1, 8, 8, requires_grad=True)
            flex_attention(q, q, q).sum().backward()
            entered.set()
            leave.wait(10)
        seen.append(torch_flex.installed())

    thread = threading.Thread(target=other)
    with torch_flex.route():
        thread.start()
        assert entered.wait(10)
    assert torch_flex.installed()  # the other thread's
    leave.set()
    thread.join()
    assert seen == [False]


def test_the_function_stays_what_it_is_to_others() -> None:
    before = inspect.signature(flex_attention), flex_attention.__doc__, flex_attention.__module__
    with torch_flex.route():
        assert theirs.flex_attention is flex_attention
        assert (inspect.signature(flex_attention), flex_attention.__doc__, flex_attention.__module__) == before


@pytest.mark.parametrize("change", ["a new parameter", "another default", "a wrapper"])
def test_a_pytorch_with_another_signature_is_refused_and_left_alone(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def longer(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any = None,
        block_mask: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        kernel_options: Any = None,
        *,
        return_aux: Any = None,
        sinks: Any = None,
    ) -> None: ...

    def wrapper(*args: Any, **kwargs: Any) -> None: ...

    if change == "another default":
        monkeypatch.setattr(flex_attention, "__defaults__", (None, None, None, True, False, None))
    else:
        monkeypatch.setattr(torch_flex, "_FUNCTION", {"a new parameter": longer, "a wrapper": wrapper}[change])
    with pytest.raises(UnsupportedTorch, match=r"has other parameters .* Call flexattn\.flex_attention itself"):
        torch_flex.install()
    assert not torch_flex.installed() and flex_attention.__code__ is CODE
    monkeypatch.undo()
    with torch_flex.route():
        assert torch_flex.installed()


def test_a_call_during_which_the_route_ends_goes_to_pytorch() -> None:
    q, k, v = qkv()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch_flex.attention(q, k, v, None, lists_alone(), None, False, False, None, None)
    torch.testing.assert_close(found, torch.softmax(q @ k.mT / 4, -1) @ v)
