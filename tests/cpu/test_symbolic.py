"""Predicates through sympy and back mean the same, and comparisons are solved for the key."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from strategies import Mod, environment, mask_mods, rich_masks
from torch import Tensor

import flexattn
from flexattn import and_masks, masks
from flexattn.codegen.bounds import Bounds
from flexattn.codegen.evaluate import Inputs, evaluate
from flexattn.codegen.formula import inline
from flexattn.codegen.intervals import Context
from flexattn.codegen.ir import Node
from flexattn.codegen.key_ranges import described, plan_of
from flexattn.codegen.pipeline import variant
from flexattn.codegen.symbolic import key_limits, simplified
from flexattn.codegen.trace import trace

SIZES = {"b": 2, "h": 4, "q_idx": 41, "kv_idx": 53}


def traced(mask: Any) -> tuple[Node | None, Inputs]:
    program, captured, _ = trace(None, mask)
    parsed = variant(program)
    named = {
        name: torch.arange(n, dtype=torch.int32).view([-1 if i == d else 1 for i in range(4)])
        for d, (name, n) in enumerate(SIZES.items())
    }
    n = len(captured) - parsed.n_floats
    return parsed.mask, Inputs(named, captured[:n], captured[n:])


def wraps(node: Node, inputs: Inputs) -> bool:
    whole = {n: Bounds(torch.tensor([0]), torch.tensor([size - 1])) for n, size in SIZES.items()}
    return bool(Context.of([node], Inputs({}, inputs.captured, inputs.floats), whole, 1 << 26).wrapping)


def values(node: Node, inputs: Inputs) -> Tensor:
    return evaluate([node], inputs.fork({}))[0].expand(*SIZES.values())


@settings(max_examples=150)
@given(mod=st.one_of(mask_mods(), rich_masks()))
def test_a_simplified_mask_means_the_same_and_is_no_longer(mod: Mod) -> None:
    node, inputs = traced(mod.bind(environment()))
    try:
        if node is None or wraps(node, inputs):
            return
        short = simplified(node)
        assert torch.equal(values(short, inputs), values(node, inputs)), inline(short)
    except RuntimeError as error:  # torch refuses a zero divisor of an integer, and a negative power
        assert "ZeroDivision" in str(error) or "negative" in str(error), error


@pytest.mark.parametrize(
    ("mask", "formula"),
    [
        (lambda b, h, q, k: (q >= k) & (q + 5 >= k) & (q - k < 9), "(kv_idx <= q_idx) & (q_idx <= kv_idx + 8)"),
        (lambda b, h, q, k: (k < 4) | (k < 7) | (q >= k), "(kv_idx <= 6) | (kv_idx <= q_idx)"),
        (lambda b, h, q, k: (q >= k) & ((q >= k) | (h == 1)), "q_idx >= kv_idx"),
        (lambda b, h, q, k: (q >= k) | ~(q >= k) & (h == 1), "(h == 1) | (kv_idx <= q_idx)"),
        (lambda b, h, q, k: 2 * k + 4 - k <= q + 3, "kv_idx + 1 <= q_idx"),
    ],
)
def test_predicates_are_simplified(mask: Any, formula: str) -> None:
    node, _ = traced(mask)
    assert node is not None
    assert inline(simplified(node)) in (formula, formula.replace("q_idx >= kv_idx", "kv_idx <= q_idx"))


coefficients = st.integers(-5, 5)


@st.composite
def comparisons(draw: st.DrawFn) -> Mod:
    """Comparisons with the key on either side, or both, times and divided by numbers."""
    a, c, e = (draw(coefficients) for _ in range(3))
    d = draw(st.integers(1, 6))
    key = draw(
        st.sampled_from(["kv_idx", f"(kv_idx // {d})", f"(kv_idx >> {min(d, 3)})", f"abs(q_idx - kv_idx + {c})"])
    )
    query = draw(
        st.sampled_from(["q_idx", "(q_idx // 3)", "docs[q_idx]", "(q_idx % 7)", "abs(q_idx - 20)", "(q_idx * q_idx)"])
    )
    sign = draw(st.sampled_from(["<", "<=", "==", ">=", ">"]))
    return Mod("b, h, q_idx, kv_idx", f"{a} * {key} + {c} * {query} {sign} {e} + {draw(st.integers(0, 2))} * {query}")


@settings(max_examples=400)
@given(mod=comparisons())
def test_limits_of_the_key_are_those_of_the_comparison(mod: Mod) -> None:
    node, inputs = traced(mod.bind(environment()))
    if node is None or "kv_idx" not in node.axes or not node.args:
        return
    found = key_limits(node)
    if found is None:  # constant coefficients of the key, one occurrence of it: only what cancels is not solved
        assert " ==" in mod.body or "abs(q_idx - kv_idx" in mod.body, inline(node)
        return
    both, limits = found
    kv = inputs.named["kv_idx"]
    parts = []
    for limit in limits:
        inside = torch.ones(tuple(SIZES.values()), dtype=torch.bool)
        for end, compare in ((limit.lo, torch.ge), (limit.hi, torch.le)):
            if end is not None:
                assert "kv_idx" not in end.axes
                inside &= compare(kv, values(end, inputs))
        parts.append(inside)
    held = torch.stack(parts).all(0) if both else torch.stack(parts).any(0)
    assert torch.equal(held, values(node, inputs)), (inline(node), limits)


def test_the_keys_of_a_query_are_described() -> None:
    ids = torch.arange(100) // 30
    for mask, text in (
        (masks.causal(3), "kv_idx <= q_idx + 3"),
        (masks.sliding_window(5), "kv_idx >= q_idx - 4 and kv_idx <= q_idx"),
        (masks.chunked(8), "kv_idx <= q_idx // 8 * 8 + 7 and kv_idx >= q_idx // 8 * 8"),
        (masks.document_mask(ids), "the run where c0[kv_idx] == c0[q_idx]"),
        (
            and_masks(masks.causal_mask, masks.document_mask(ids)),
            "kv_idx <= q_idx and the run where c0[kv_idx] == c0[q_idx]",
        ),
        (lambda b, h, q, k: ids[k] <= ids[q], "those of ascending values where c0[kv_idx] <= c0[q_idx]"),
        (lambda b, h, q, k: (q > 5) & (ids[k] > 1), "any where 5 < q_idx and the run where 1 < c0[kv_idx]"),
        (masks.prefix_lm(7), "kv_idx <= 6 or kv_idx <= q_idx"),
    ):
        node, _ = traced(mask)
        assert node is not None
        plan = plan_of(node)
        assert plan is not None
        parts = described(plan).split(" and " if " and " in text else " or ")
        assert sorted(parts) == sorted(text.split(" and " if " and " in text else " or ")), described(plan)


def test_what_holds_twice_is_said_once() -> None:
    mask = variant(trace(None, and_masks(masks.sliding_window(100), masks.causal_mask)).program).mask
    assert mask is not None
    plan = plan_of(mask)
    assert plan is not None
    assert sorted(described(plan).split(" and ")) == ["kv_idx <= q_idx", "kv_idx >= q_idx - 99"]


def test_what_has_no_ranges_by_form_has_no_plan() -> None:
    for mask in (
        lambda b, h, q, k: q % 3 == (k * q) % 3,
        lambda b, h, q, k: q != k,
        lambda b, h, q, k: (q >= k) ^ (k < 4),
    ):
        node, _ = traced(mask)
        assert node is not None and plan_of(node) is None


def test_explain_says_how_blocks_are_found() -> None:
    ids = torch.arange(100) // 30
    report = flexattn.explain(None, and_masks(masks.causal_mask, masks.document_mask(ids)), quiet=True)
    assert "kv_idx <= q_idx" in report.blocks and "document_ids[kv_idx]" in report.blocks
    assert "no mask" in flexattn.explain(flexattn.mods.softcap(3.0), quiet=True).blocks
    dilated = flexattn.explain(None, lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 3 == 0, quiet=True)
    assert "boxes are split" in dilated.blocks
