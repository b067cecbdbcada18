"""Distances as floats: converted term by term where that is exact, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flexattn.codegen.distances import NEAR, converted_apart
from flexattn.codegen.emit import functions
from flexattn.codegen.evaluate import Inputs, evaluate
from flexattn.codegen.ir import Op, walk
from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace

TABLE = torch.arange(8)
REWRITTEN: dict[str, Callable[..., Any]] = {
    "a distance": lambda s, b, h, q, k: s + 0.3 * (k - q),
    "one less a constant": lambda s, b, h, q, k: s * (q - k - 7),
    "a constant on the left": lambda s, b, h, q, k: s + (5 + q) - (k - 3.5) * (100 + (k - q)),
    "float64": lambda s, b, h, q, k: s + ((k - q).double() * 0.1).float(),
}
KEPT: dict[str, Callable[..., Any]] = {
    "positions alone": lambda s, b, h, q, k: s + q.float() + k,
    "a product": lambda s, b, h, q, k: s + (q * k),
    "a large constant": lambda s, b, h, q, k: s + (k - q + NEAR),
    "more terms than are exact": lambda s, b, h, q, k: s + ((k - q) + (k - q)),
    "a tensor's values": lambda s, b, h, q, k: s + (TABLE[k] - q),
    "half precision": lambda s, b, h, q, k: s + (k - q).bfloat16(),
    "an absolute distance": lambda s, b, h, q, k: s + (k - q).abs(),
}


def tile_conversions(root: Any) -> int:
    """Conversions of values that differ from element to element of a tile."""
    return sum(n.op is Op.CAST and n.lhs.dtype.is_int and {"q_idx", "kv_idx"} <= n.axes for n in walk(root))


@pytest.mark.parametrize("name", REWRITTEN)
def test_distances_are_converted_by_row_and_column(name: str) -> None:
    v = variant(trace(REWRITTEN[name], None).program)
    (apart,) = converted_apart([v.score])
    assert tile_conversions(v.score) > 0 == tile_conversions(apart)


@pytest.mark.parametrize("name", KEPT)
def test_what_may_not_be_exact_stays_as_it_is(name: str) -> None:
    v = variant(trace(KEPT[name], None).program)
    assert converted_apart([v.score]) == [v.score]


@pytest.mark.parametrize("name", [*REWRITTEN, *KEPT])
def test_the_values_are_the_same_to_the_bit_up_to_the_farthest_position(name: str) -> None:
    mod = {**REWRITTEN, **KEPT}[name]
    traced = trace(mod, None)
    v = variant(traced.program)
    near = (
        torch.tensor([0, 1, 2, 5, 7]) if "TABLE" in mod.__code__.co_names else torch.tensor([0, 1, 2, 4097, NEAR - 1])
    )
    index = {"q_idx": near.int().view(-1, 1), "kv_idx": near.flip(0).int()}
    n = len(v.captured)
    inputs = Inputs({**index, "score": torch.randn(5, 5)}, traced.captured[:n], traced.captured[n:], traced.ints)
    for root in converted_apart([v.score]):
        found, expected = evaluate([root], inputs), evaluate([v.score], inputs)
        assert torch.equal(found[0], expected[0])


def test_far_positions_are_subtracted_as_integers() -> None:
    v = variant(trace(REWRITTEN["a distance"], None).program)
    near, far = (functions(v, far=f).score_mod for f in (False, True))
    assert near is not None and far is not None
    assert "= kv_idx - q_idx" in far.source and "= kv_idx - q_idx" not in near.source
