"""Gradients of a score_mod in debug mode: what is refused would be nan or infinite, what passes is finite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from debug_calls import accepted, qkv, refused
from torch import Tensor

from flexattn import flex_attention

Mod = Callable[..., Tensor]


def root(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.sqrt(score + 2)


def test_an_infinite_slope_is_named() -> None:
    q, k, v = (-torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    accepted(q, k, v, root)
    q.requires_grad_()
    with torch.no_grad():
        accepted(q, k, v, root)
    said = refused(FloatingPointError, q, k, v, root)
    assert "at b=0, h=0, q_idx=0, kv_idx=0, which is attended to, though the modified score is 0: `sqrt(" in said
    assert "has the gradient inf with respect to" in said and said.endswith("`return torch.sqrt(score + 2)`")


def test_the_branch_that_where_does_not_take_is_explained() -> None:
    q, k, v = (-torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    q.requires_grad_()
    unsafe = lambda s, b, h, i, j: torch.where(s > 0, torch.sqrt(s), s)
    said = refused(FloatingPointError, q, k, v, unsafe)
    assert (
        "`sqrt(score)` has the gradient nan" in said
        and "torch.where does not protect the branch that it does not take" in said
    )
    safe = lambda s, b, h, i, j: torch.where(s > 0, torch.sqrt(torch.where(s > 0, s, 1.0)), s)
    (grad,) = torch.autograd.grad(accepted(q, k, v, safe).square().sum(), q)
    assert bool(grad.isfinite().all())


def test_a_score_of_minus_infinity_must_not_send_nan_to_a_captured_tensor() -> None:
    gate = torch.tensor([1.0, 0.0, 1.0, 1.0])
    mod = lambda s, b, h, i, j: s + torch.log(gate[j])
    inputs = qkv(L=4, S=4)
    accepted(*inputs, mod)
    gate.requires_grad_()
    said = refused(FloatingPointError, *inputs, mod)
    assert "at b=0, h=0, q_idx=0, kv_idx=1" in said and "gate[kv_idx] = 0" in said and "score is -inf" in said
    assert "hide the element with a mask_mod" in said
    accepted(*inputs, mod, mask_mod=lambda b, h, i, j: j != 1)


def _gate(values: list[float], grad: bool = True) -> Mod:
    gate = torch.tensor(values, requires_grad=grad)
    return lambda s, b, h, i, j: s + torch.log(gate[j % 2])


TRIALS: dict[str, tuple[Callable[[], Mod], bool]] = {
    "relu": (lambda: lambda s, b, h, i, j: torch.relu(s), True),
    "log": (lambda: lambda s, b, h, i, j: torch.log(s), False),
    "log of one more": (lambda: lambda s, b, h, i, j: torch.log1p(s.abs()), True),
    "sqrt": (lambda: lambda s, b, h, i, j: torch.sqrt(s * (i != j)), False),
    "gates": (lambda: _gate([1.0, 2.0]), True),
    "closed gate": (lambda: _gate([1.0, 0.0]), False),
    "closed gate that is no parameter": (lambda: _gate([1.0, 0.0], grad=False), True),
    "negative gate": (lambda: _gate([1.0, -1.0]), False),
    "masked by -inf": (lambda: lambda s, b, h, i, j: torch.where(i >= j, s, -torch.inf), True),
    "power": (lambda: lambda s, b, h, i, j: s.abs() ** 0.5, True),
    "power at zero": (lambda: lambda s, b, h, i, j: (s * (i != j)).abs() ** 0.5, False),
    "exp": (lambda: lambda s, b, h, i, j: torch.exp(1000 * s), False),
}


@pytest.mark.parametrize("name", TRIALS)
def test_what_passes_has_finite_results_and_what_does_not_has_others(name: str) -> None:
    make, fine = TRIALS[name]
    mod = make()
    q, k, v = qkv(L=8, S=8)
    q = q.abs().requires_grad_() if name == "sqrt" else q.requires_grad_()
    k = k.abs() if name == "sqrt" else k
    gates = [c.cell_contents for c in mod.__closure__ or ()]
    wanted = [q, *(t for t in gates if isinstance(t, Tensor) and t.requires_grad)]
    out = flex_attention(q, k, v, mod)
    grads = torch.autograd.grad(out.square().sum(), wanted)
    assert all(bool(t.isfinite().all()) for t in (out, *grads)) == fine
    if fine:
        accepted(q, k, v, mod)
    else:
        refused(FloatingPointError, q, k, v, mod)
