"""A call that is run more than once, as it is when it is timed, leaves what one run leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexattn.backends import launch
from flexattn.backends.launch import Call
from flexattn.backends.triton import backward, forward
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.problem import Problem

INDEX = torch.randint(5, (2, 40))
ADDING: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "atomic": (lambda t: lambda s, b, h, q, kv: s + t[INDEX[0, q] * INDEX[1, kv] % 5], (5,), {}),
    "sorted": (lambda t: lambda s, b, h, q, kv: s + t[INDEX[0, q] * INDEX[1, kv] % 5], (5,), {"DETERMINISTIC": True}),
    "dense, shared by heads": (lambda t: lambda s, b, h, q, kv: s + t[q, kv], (40, 40), {}),
    "dense, heads between": (lambda t: lambda s, b, h, q, kv: s + t[b, q, h, kv], (2, 40, 2, 40), {}),
    "dense, read beyond": (lambda t: lambda s, b, h, q, kv: s + t[q + 5, kv], (40, 40), {}),
    "diagonal": (lambda t: lambda s, b, h, q, kv: s + t[h, q - kv + 39], (2, 79), {}),
    "row": (lambda t: lambda s, b, h, q, kv: s * t[h], (2,), {}),
}


@pytest.mark.parametrize("case", ADDING)
def test_a_kernel_that_adds_starts_from_zero_each_time(case: str) -> None:
    """Runs that are timed must not remain in gradients of captured tensors."""
    mod, shape, options = ADDING[case]
    table = torch.rand(shape)
    program, captured, ints = trace(mod(table), None)
    q, k, v = (torch.randn(2, 2, 40, 16) for _ in range(3))
    problem = Problem(q, k, v, captured, [], ints, (128, 128), variant(program), 0.1)
    out, lse, _ = forward(problem, {})
    wanted = [i for i, t in enumerate(captured) if t is table]
    expected = backward(problem, out, lse, out, None, wanted, options).dcaptured
    prepared = []

    def twice(call: Call) -> None:
        prepared.append(call.prepare is not None)
        for _ in range(2):
            launch.launch(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexattn.backends.triton.launch", twice)
        found = backward(problem, out, lse, out, None, wanted, {"AUTOTUNE": True, **options}).dcaptured
    assert prepared == [True, False]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("in_one_pass", [False, True])
def test_a_backward_that_is_run_twice_gives_the_gradients_of_one(
    in_one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, captured, ints = trace(None, None)
    q, k, v = (torch.randn(2, 2, 40, 16) for _ in range(3))
    problem = Problem(q, k, v, captured, [], ints, (128, 128), variant(program), 0.1)
    out, lse, _ = forward(problem, {})
    options = {"ONE_PASS": in_one_pass}
    expected = backward(problem, out, lse, out, None, [], options)
    prepared = []

    def twice(call: Call) -> None:
        prepared.append((call.which, call.prepare is not None))
        for _ in range(2):
            launch.launch(call)

    monkeypatch.setattr("flexattn.backends.triton.launch", twice)
    found = backward(problem, out, lse, out, None, [], options | {"AUTOTUNE": True})
    assert prepared == ([("one_pass", True)] if in_one_pass else [("dq", True), ("dkdv", False)])
    torch.testing.assert_close(found[:3], expected[:3])
