"""Mods inside torch.compile, however they are written and whatever they capture: results and gradients of eager code."""

from __future__ import annotations

import pytest
import torch
from mods import CALLS, LEAVES, B, Call, D, H, L, Window
from torch import Tensor

from flexattn import flex_attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention.mask_mod:UserWarning")
EVERY = [
    pytest.param(function, id=name, marks=pytest.mark.feature(f"capture: {feature}"))
    for feature, functions in CALLS.items()
    for name, function in functions.items()
]


def results(calls: list[Call], backend: str | None) -> list[list[Tensor | None]]:
    """Output and gradients of each call; compiled together for a backend."""
    torch.manual_seed(0)
    leaves = [torch.randn(B, H, L, D, requires_grad=True) for _ in range(3)]
    leaves.append(torch.rand(H, requires_grad=True))

    def every(*tensors: Tensor) -> list[Tensor]:
        return [function(*tensors) for function in calls]

    run = every if backend is None else torch.compile(every, fullgraph=True, backend=backend)
    return [
        [
            out.detach(),
            *torch.autograd.grad(out.square().sum(), [*leaves, *LEAVES], allow_unused=True, retain_graph=True),
        ]
        for out in run(*leaves)
    ]


def assert_same(compiled: list[list[Tensor | None]], eager: list[list[Tensor | None]]) -> None:
    for one, other in zip(compiled, eager, strict=True):
        for actual, expected in zip(one, other, strict=True):
            if expected is None or actual is None:
                # In one graph with others, what a call does not depend on has a gradient of zero.
                assert expected is None and (actual is None or not actual.any())
            else:
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", EVERY)
def test_compiled_equals_eager(function: Call, backend: str) -> None:
    assert_same(results([function], backend), results([function], None))


@pytest.mark.feature("capture: a frozen dataclass made inside the compiled function")
@pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="Dynamo of PyTorch 2.11 cannot set the attributes of a frozen dataclass; PyTorch 2.13 can",
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_mask_of_a_class_made_inside(backend: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return flex_attention(q, k, v, mask_mod=Window(7))

    assert_same(results([call], backend), results([call], None))


@pytest.mark.feature("capture: all of these with Inductor")
def test_inductor_equals_eager() -> None:
    functions = [function for some in CALLS.values() for function in some.values()]
    assert_same(results(functions, "inductor"), results(functions, None))
