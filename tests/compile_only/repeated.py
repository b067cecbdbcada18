"""What a plan can repeat, and what it leaves alone: calls of `planned` with torch operations of all sorts.

Collected in a process of its own by test_plans.py.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from fake_calls import use_fake_device
from torch import Tensor

import flexattn
from flexattn import ops
from flexattn.backends import plans, recording


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_device(monkeypatch)


def attended(tensors: Any) -> Tensor:
    """A launch among torch operations."""
    q, k, v = tensors[:3]
    variant = flexattn.codegen.trace.trace(None, None).program
    problem = ops._problem(q, k, v, (), (), (), (), (128, 128), variant, 0.5)
    return ops.triton_backend().forward(problem, {}).lse


def solved(solve: Callable[[Any], Any], given: list[Tensor], name: str) -> int:
    """How many of four calls are done by a plan; all have the results of `solve`."""
    before = plans.plan_info().hits
    for _ in range(4):
        q, k, v = (torch.randn(1, 2, 64, 32, dtype=torch.bfloat16) for _ in range(3))
        rest = [torch.rand_like(t) for t in given]
        copies = [t.clone() for t in rest]
        found = plans.planned((q, k, v, *rest), (name,), (), solve)
        expected = solve((q, k, v, *copies))
        for a, b in zip(found[1:], expected[1:], strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype is b.dtype
        assert all(torch.equal(a, b) for a, b in zip(rest, copies, strict=True)), "written to in the same way"
    return plans.plan_info().hits - before


def test_torch_operations_are_repeated() -> None:
    def solve(tensors: Any) -> Any:
        x, y = tensors[3:]
        lse = attended(tensors)
        total = torch.zeros_like(x)
        total += x
        total[1:].mul_(y[1:])
        parts = (total * 2).split(2)
        index = torch.arange(4).flip(0)
        total.index_add_(0, index, torch.cat([*parts]))
        x.copy_(y)
        gathered = total[index].to(torch.float64).sum(1, keepdim=True).expand(4, 3)
        return lse, total, gathered, total.T, y.new_empty(0), torch.stack([x, y])

    assert solved(solve, [torch.rand(4, 3), torch.rand(4, 3)], "torch") == 2


def elsewhere(tensors: Any) -> Any:
    return attended(tensors), tensors[3] * HELD


def by_value(tensors: Any) -> Any:
    x = tensors[3]
    return attended(tensors), x * 2 if float(x.sum()) > 2 else x * 3


def by_length(tensors: Any) -> Any:
    return attended(tensors), tensors[3][tensors[3] > 0.5]


def by_mask(tensors: Any) -> Any:
    return attended(tensors), tensors[3].nonzero()


@triton.jit
def _nothing(x):  # type: ignore[no-untyped-def]
    triton.language.store(x, 0.0)


def unseen_launch(tensors: Any) -> Any:
    _nothing[(1,)](tensors[3])
    return attended(tensors), tensors[3]


HELD = torch.rand(4)


@pytest.mark.parametrize("solve", [elsewhere, by_value, by_length, by_mask, unseen_launch], ids=lambda f: f.__name__)
def test_what_cannot_be_repeated_has_no_plan(solve: Callable[[Any], Any]) -> None:
    assert solved(solve, [torch.rand(4)], solve.__name__) == 0


def test_random_numbers_are_drawn_anew() -> None:
    def solve(tensors: Any) -> Any:
        return attended(tensors), torch.rand_like(tensors[3])

    before = plans.plan_info().hits
    for _ in range(4):
        given = [torch.randn(1, 2, 64, 32, dtype=torch.bfloat16) for _ in range(3)]
        plans.planned((*given, torch.rand(4)), ("random",), (), solve)
    assert plans.plan_info().hits == before


def test_what_a_call_has_finished_with_is_freed() -> None:
    alive: list[int] = []
    made: list[weakref.ref[Tensor]] = []

    def count(tensors: Any) -> tuple[Tensor, ...]:
        gc.collect()
        alive.append(sum(reference() is not None for reference in made))
        large = torch.empty(8)
        made.append(weakref.ref(large))
        return (large,)

    def solve(tensors: Any) -> Any:
        lse = attended(tensors)
        total = torch.zeros(8)
        for _ in range(4):
            (large,) = recording.step(count, (total,))
            total = total + large
            del large
        return lse, total

    for _ in range(4):
        given = [torch.randn(1, 2, 64, 32, dtype=torch.bfloat16) for _ in range(3)]
        made.clear(), alive.clear()
        plans.planned(given, ("freed",), (), solve)
    assert plans.plan_info().hits == 2
    assert max(alive) <= 1, alive
