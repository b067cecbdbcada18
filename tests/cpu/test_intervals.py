"""Law 3: every value of a graph lies in its bounds over a box."""

from __future__ import annotations

import contextlib
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from strategies import Mod, environment, rich_masks, rich_values

from flexattn.codegen.trace import trace
from flexattn.testing import LawNotRun
from flexattn.testing.laws import Corner, assert_bounds_hold
from flexattn.testing.traced import Traced

SIZES = {"b": 2, "h": 4, "q_idx": 37, "kv_idx": 45}


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


@settings(max_examples=300)
@given(data=st.data(), mod=rich_masks())
def test_law_3_every_value_of_a_mask_lies_in_its_bounds(data: st.DataObject, mod: Mod) -> None:
    check(mod, data)


@settings(max_examples=300)
@given(data=st.data(), value=rich_values())
def test_law_3_every_integer_and_float_lies_in_its_bounds(data: st.DataObject, value: str) -> None:
    check(Mod("b, h, q_idx, kv_idx", f"({value}) != 0"), data)


def check(mod: Mod, data: st.DataObject) -> None:
    program, captured, ints = trace(None, mod.bind(environment()))
    traced = Traced(program, captured, ints, torch.device("cpu"), SIZES)
    if traced.variant.mask is not None:
        with contextlib.suppress(LawNotRun):  # torch refuses a zero divisor of an integer, and a negative power
            assert_bounds_hold([traced.variant.mask], traced, pieces(data.draw, 4))
