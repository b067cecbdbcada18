"""The gradient of every function that has one, through attention, against torch's own of the same function."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flexattn import flex_attention

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"

# What is called with two learned numbers, both between -2 and 2 and of either order.
CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "abs": lambda x, y: x.abs() * y,
    "add": lambda x, y: torch.add(x, y, alpha=3),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y, value=2),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=2),
    "atan": lambda x, y: torch.atan(x * y),
    "bfloat16": lambda x, y: x.bfloat16() * y.bfloat16(),
    "clamp": lambda x, y: x.clamp(-1, 1) + 2 * y.clamp(min=-0.5),
    "clamp_max": lambda x, y: x.clamp_max(0.5) + torch.clamp_max(x, y),
    "clamp_min": lambda x, y: x.clamp_min(0.5) + torch.clamp_min(x, y),
    "clone": lambda x, y: x.clone() * y,
    "contiguous": lambda x, y: x.contiguous() * y,
    "cos": lambda x, y: torch.cos(x * y),
    "div": lambda x, y: x / y,
    "double": lambda x, y: x.double() * y,
    "elu": lambda x, y: F.elu(x) + F.elu(y, alpha=0.5),
    "erf": lambda x, y: torch.erf(x) * y,
    "exp": lambda x, y: torch.exp(x * y),
    "exp2": lambda x, y: torch.exp2(x * y),
    "expm1": lambda x, y: torch.expm1(x * y),
    "float": lambda x, y: x.float() * y.float(),
    "fmod": lambda x, y: torch.fmod(3 * x, y),
    "gelu": lambda x, y: F.gelu(x) + F.gelu(y, approximate="tanh"),
    "half": lambda x, y: x.half() * y.half(),
    "leaky_relu": lambda x, y: F.leaky_relu(x) + F.leaky_relu(y, 0.3),
    "lerp": lambda x, y: torch.lerp(x, y, x * y),
    "log": lambda x, y: torch.log(x * x + y * y),
    "log10": lambda x, y: torch.log10(x * x + y * y),
    "log1p": lambda x, y: torch.log1p(x * x * y * y),
    "log2": lambda x, y: torch.log2(x * x + y * y),
    "logaddexp": lambda x, y: torch.logaddexp(x, y),
    "logsigmoid": lambda x, y: F.logsigmoid(x) + F.logsigmoid(4 * y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 1.0) * y,
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "mul": lambda x, y: x * y,
    "neg": lambda x, y: -x * y,
    "positive": lambda x, y: +x * y,
    "pow": lambda x, y: x**2 + x**3 + (x.abs() + 0.5) ** y,
    "reciprocal": lambda x, y: x.reciprocal() + 2 / y,
    "relu": lambda x, y: torch.relu(x) + torch.relu(y),
    "remainder": lambda x, y: (3 * x) % y,
    "rsqrt": lambda x, y: torch.rsqrt(x * x + y * y),
    "rsub": lambda x, y: torch.rsub(x, y) * y,
    "sigmoid": lambda x, y: torch.sigmoid(x * y),
    "silu": lambda x, y: F.silu(x) + F.silu(y),
    "sin": lambda x, y: torch.sin(x * y),
    "softplus": lambda x, y: F.softplus(x) + F.softplus(y, beta=2, threshold=1),
    "sqrt": lambda x, y: torch.sqrt(x * x + y * y),
    "square": lambda x, y: x.square() + y.square(),
    "sub": lambda x, y: torch.sub(x, y, alpha=3),
    "tan": lambda x, y: torch.tan(x / 2) + torch.tan(y / 2),
    "tanh": lambda x, y: torch.tanh(x * y),
    "to": lambda x, y: x.to(torch.float32) * y,
    "type": lambda x, y: x.type(torch.float32) * y,
    "type_as": lambda x, y: x.type_as(y) * y,
    "where": lambda x, y: torch.where(x < y, x, 2 * y),
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda t: t.sum(-1),
    "mean": lambda t: t.mean(-1),
    "prod": lambda t: t.prod(-1),
    "amax": lambda t: t.amax(-1),
    "amin": lambda t: t.amin(-1),
}
N, D = 24, 4


def differs(value: Callable[..., Tensor], *learned: Tensor) -> float:
    """How far gradients of what is added to the scores by key are from torch's own, by the largest of torch's."""
    g = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(1, 1, N, D, generator=g, dtype=torch.float64) for _ in range(4))
    out = flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score + value(*(t[kv_idx] for t in learned)))
    found = torch.autograd.grad(out, learned, grad)
    wanted = torch.autograd.grad(torch.softmax(q @ k.mT / D**0.5 + value(*learned), -1) @ v, learned, grad)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


def numbers(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=g, dtype=torch.float64) * 4 - 2).requires_grad_()


@pytest.mark.parametrize("name", CALLS)
def test_the_gradient_of_a_function_is_that_of_torch(name: str) -> None:
    x, y = (t.detach().requires_grad_() for t in numbers(2, N))
    rounding = {"float": 1e-5, "to": 1e-5, "type": 1e-5, "half": 1e-2, "bfloat16": 1e-1}
    assert differs(CALLS[name], x, y) < rounding.get(name, 1e-11)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_gradient_of_a_reduction_is_that_of_torch(name: str) -> None:
    assert differs(REDUCTIONS[name], numbers(N, 3)) < 1e-11


@pytest.mark.parametrize("function", [torch.maximum, torch.minimum, torch.logaddexp])
def test_a_tie_shares_the_gradient(function: Callable[..., Tensor]) -> None:
    x = numbers(N)
    assert differs(function, x, x.detach().clone().requires_grad_()) < 1e-11


@pytest.mark.parametrize("name", ["elu", "gelu", "leaky_relu", "logaddexp", "logsigmoid", "relu", "silu", "softplus"])
def test_the_gradient_of_large_numbers_is_that_of_torch(name: str) -> None:
    x, y = (t.detach().requires_grad_() for t in 1000 * numbers(2, N))
    assert differs(lambda x, y: 1e-3 * CALLS[name](x, y), x, y) < 1e-11


def test_every_function_with_a_gradient_is_called() -> None:
    table = re.findall(
        r"^\| `(\w+)` \| .* \| float.* \| yes \|$", PAGE.read_text().partition("The reductions")[0], re.M
    )
    assert len(table) > 50 and set(table) == set(CALLS)
