"""Law 3: every value of a graph lies in its bounds over a box."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from strategies import Mod, environment, rich_masks, rich_values
from torch import Tensor

from flexattn.codegen.bounds import Bounds
from flexattn.codegen.evaluate import Inputs, evaluate
from flexattn.codegen.intervals import Context, bounds
from flexattn.codegen.ir import Node, walk
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace

SIZES = {"b": 2, "h": 4, "q_idx": 37, "kv_idx": 45}
Corner = dict[str, tuple[int, int]]


def pieces(draw: Any, n: int) -> list[Corner]:
    """Boxes of one size, aligned or not, and points in b and h."""
    width = {"b": 1, "h": 1, "q_idx": draw(st.integers(1, 20)), "kv_idx": draw(st.integers(1, 20))}
    found = []
    for _ in range(n):
        corner = {}
        for name, size in SIZES.items():
            lo = draw(st.integers(0, size - 1))
            corner[name] = (lo, min(lo + width[name], size) - 1)
        found.append(corner)
    return found


def box_of(corners: list[Corner]) -> dict[str, Bounds]:
    box = {}
    for name in SIZES:
        lo, hi = (torch.tensor([c[name][i] for c in corners]) for i in (0, 1))
        box[name] = Bounds(lo, lo if name in "bh" else hi)
    return box


def whole_box() -> dict[str, Bounds]:
    return {n: Bounds(torch.tensor([0]), torch.tensor([size - 1])) for n, size in SIZES.items()}


def assert_bounds_hold(
    source: str, roots: list[Node], captured: list[Tensor], floats: list[Tensor], corners: list[Corner]
) -> None:
    named = {
        name: torch.arange(n, dtype=torch.int32).view([-1 if i == d else 1 for i in range(4)])
        for d, (name, n) in enumerate(SIZES.items())
    }
    inputs = Inputs({}, captured, floats)
    nodes = [n for n in walk(*roots) if n.op.value != "captured"]
    values = evaluate(nodes, Inputs(named, captured, floats))
    context = Context.of(roots, inputs, whole_box(), 1 << 26)
    for found, value, node in zip(bounds(nodes, box_of(corners), context), values, nodes, strict=True):
        value = value.expand(*SIZES.values())
        for i, corner in enumerate(corners):
            part = value[tuple(slice(lo, hi + 1) for lo, hi in corner.values())]
            lo, hi = (t.expand(len(corners))[i] for t in found[:2])
            if node.dtype.is_float and bool(part.isnan().any()):
                assert found.nan is not None and bool(found.nan.expand(len(corners))[i]), (source, node, corner)
                part = part[~part.isnan()]
            if part.numel():
                assert bool((part >= lo).all()) and bool((part <= hi).all()), (source, node, corner, lo, hi, part)


@settings(max_examples=300)
@given(data=st.data(), mod=rich_masks())
def test_law_3_every_value_of_a_mask_lies_in_its_bounds(data: st.DataObject, mod: Mod) -> None:
    check(mod, data)


@settings(max_examples=300)
@given(data=st.data(), value=rich_values())
def test_law_3_every_integer_and_float_lies_in_its_bounds(data: st.DataObject, value: str) -> None:
    check(Mod("b, h, q_idx, kv_idx", f"({value}) != 0"), data)


def check(mod: Mod, data: st.DataObject) -> None:
    program, captured, _ = trace(None, mod.bind(environment()))
    mask = variant(program).mask
    if mask is None:
        return
    try:
        n = len(captured) - variant(program).n_floats
        assert_bounds_hold(mod.body, [mask], captured[:n], captured[n:], pieces(data.draw, 4))
    except RuntimeError as error:  # torch refuses a zero divisor of an integer, and a negative power
        assert "ZeroDivision" in str(error) or "negative" in str(error), error
