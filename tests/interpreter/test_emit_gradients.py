"""Law 6 for the gradients of captured tensors: each way to collect them gives what `evaluate` gives."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernels import apply_sums, apply_tile_grads
from one_tile import TILE, B, H, L, S, arguments_of, inputs_of
from strategies import FLOATING, Mod, environment, score_mods
from torch import Tensor

from flexattn.codegen.access import Access, Method, Pattern, access, usual_methods
from flexattn.codegen.emit import functions
from flexattn.codegen.evaluate import Inputs, evaluate, wrap_index
from flexattn.codegen.jit import jitted
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace


def possible(to: Access, tensors: list[Tensor]) -> list[Method]:
    """Ways to collect the gradient of a load of one head."""
    found: list[Method] = ["atomic", "workspace", "sorted"]
    if to.q is not None and to.kv is not None:
        shape, ends = tensors[to.number].shape, ((L, to.q), (S, to.kv))
        starts = [int(evaluate([axis.offset], Inputs({}))[0]) for _, axis in ends]
        if all(0 <= i <= shape[axis.dim] - n for i, (n, axis) in zip(starts, ends, strict=True)):
            found.append("store")
    if "kv_idx" not in to.axes and "score" not in to.axes:
        found.append("row")
    if "q_idx" not in to.axes and "score" not in to.axes:
        found.append("column")
    return [*found, "diagonal"] if to.pattern is Pattern.DIAGONAL else found


@settings(max_examples=60)
@given(mod=score_mods(), data=st.data())
@example(Mod("score, b, h, q_idx, kv_idx", "score + row[h, (score > 0) + 0 * h]"), None)  # an element's own index
def test_law_6_emitted_captured_gradients_are_those_of_evaluate(mod: Mod, data: st.DataObject | None) -> None:
    env = environment()
    program, captured, _ = trace(mod.bind(env), None)
    v = variant(program)
    tensors = captured[: len(v.captured)]
    wanted = [i for i, t in enumerate(tensors) if any(t is env[n] for n in FLOATING)]
    methods: list[Method | None] = list(usual_methods(v.derivative.loads, wanted))
    for i, (read, _) in enumerate(v.derivative.loads):
        if methods[i] is not None:
            choices = possible(access(read), tensors)
            methods[i] = choices[0] if data is None else data.draw(st.sampled_from(choices))
    made = jitted(functions(v, tuple(methods)))
    score, grad, keep = torch.randn(L, S), torch.randn(L, S), torch.rand(L, S) > 0.3
    inputs, packed = inputs_of(v, captured, score=score, grad=grad), arguments_of(v, captured)
    expected: dict[Method, list[Tensor]] = {}
    found: dict[Method, list[Tensor]] = {}
    flat: list[Any] = []
    entries: list[tuple[Access, Tensor]] = []
    firsts: list[Tensor] = []
    for (read, root), method in zip(v.derivative.loads, methods, strict=True):
        if method is None:
            continue
        (value,) = evaluate([root], inputs)
        value = torch.where(keep, value, 0.0).double().expand(L, S)
        expected.setdefault(method, []).append(collected(value, method, access(read), tensors, inputs))
        sizes = {"diagonal": (2 * TILE,), "sorted": (TILE, TILE)}
        buffer = torch.full(sizes[method], math.nan) if method in sizes else torch.zeros(expected[method][-1].shape)
        found.setdefault(method, []).append(buffer)
        if method in ("store", "atomic"):
            flat += [buffer, *buffer.stride()]
        elif method == "workspace":
            flat.append(buffer)
        elif method == "diagonal":
            firsts.append(torch.zeros(1, dtype=torch.int32))
            flat += [buffer, firsts[-1]]
        elif method == "sorted":
            entries.append((access(read), torch.zeros(TILE, TILE, dtype=torch.int32)))
            flat += [buffer, entries[-1][1]]
    for role, method, transposed in ((made.row_grads, "row", False), (made.column_grads, "column", True)):
        sums = tuple(found.get(method, ()))
        assert (role is None) == (not sums)
        if role is not None:
            apply_sums[(1,)](
                sums, grad, score, keep, B, H, packed, L, S, role, TILE, TILE, transposed, len(sums),
            )  # fmt: skip
    if made.tile_grads is not None:
        apply_tile_grads[(1,)](grad, score, keep, B, H, packed, tuple(flat), L, S, made.tile_grads, TILE, TILE)
    for to, numbers in entries:
        assert torch.equal(numbers[:L, :S], numbers_of(to, tensors, inputs))
    assert all(t.item() == -TILE for t in firsts)
    for method, wants in expected.items():
        for got, want in zip(found[method], wants, strict=True):
            if method == "diagonal":  # from kv - q = -TILE on
                got = got[TILE - (L - 1) : TILE + S]
            elif method == "sorted":
                assert not got[L:].any() and not got[:, S:].any()
                got = got[:L, :S]
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4, equal_nan=True)


def collected(value: Tensor, method: Method, to: Access, tensors: list[Tensor], inputs: Inputs) -> Tensor:
    """What a method makes of the gradients of a tile."""
    if method == "row":
        return value.sum(1)
    if method == "column":
        return value.sum(0)
    if method in ("workspace", "sorted"):
        return value
    if method == "diagonal":
        return torch.stack([value.diagonal(d).sum() for d in range(-(L - 1), S)])
    total = torch.zeros(tensors[to.number].shape, dtype=torch.float64)
    index = [wrap_index(i, n) for i, n in zip(evaluate(to.indices, inputs), total.shape, strict=True)]
    if index:
        return total.index_put_(tuple(i.expand(L, S) for i in index), value, accumulate=True)
    return value.sum()


def numbers_of(to: Access, tensors: list[Tensor], inputs: Inputs) -> Tensor:
    """The entry that each element reads, as its number in a contiguous tensor."""
    numbers = torch.zeros(L, S, dtype=torch.int64)
    for i, n in zip(evaluate(to.indices, inputs), tensors[to.number].shape, strict=True):
        numbers = numbers * n + wrap_index(i, n)
    return numbers.int()
