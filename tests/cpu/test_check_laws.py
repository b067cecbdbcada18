"""The laws for one given mod: each is seen to fail, ranges follow captured tensors, and what is not examined is said."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import flexattn
from flexattn import masks, mods
from flexattn.backends.target import interpreted
from flexattn.codegen import tiles
from flexattn.codegen.bounds import Bounds
from flexattn.codegen.bounds_of_booleans import COMPARE
from flexattn.codegen.derivative import DERIVATIVES
from flexattn.codegen.evaluate import EVALUATE
from flexattn.codegen.ir import DType, Op, const
from flexattn.codegen.pipeline import variant
from flexattn.codegen.tile_lists import joined
from flexattn.codegen.triton_text import SPELLING
from flexattn.testing import LAWS, LawNotRun, check_laws
from flexattn.testing.traced import Traced

CPU = torch.device("cpu")


def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx - kv_idx < 8) & (kv_idx <= q_idx)


def soft(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 3.0 * torch.tanh(score / 3.0) * 0.5


def everything_attended(roots: list[Any]) -> list[Any]:
    return [const(True, DType.BOOL) if root.dtype is DType.BOOL else root for root in roots]


def never(a: Bounds, b: Bounds) -> Bounds:
    return Bounds(torch.zeros_like(a.lo < b.lo), torch.zeros_like(a.hi < b.hi))


# What is broken, and what the law then says.
BREAKS: dict[str, tuple[Any, str]] = {
    "trace": (
        patch.dict(EVALUATE, {Op.TANH: torch.sin}),
        r"the trace of score_mod `soft` at .* where the function gives",
    ),
    "simplify": (
        patch("flexattn.codegen.pipeline.simplify", everything_attended),
        r"the simplified mask_mod is 1.0 at b=0, h=0, q_idx=0, kv_idx=1, where as traced gives 0.0",
    ),
    "intervals": (patch.dict(COMPARE, {Op.LE: never}), "lie outside their bounds False to False"),
    "blocks": (
        patch.object(tiles, "segments_by_query", lambda *_: (joined([], CPU), joined([], CPU))),
        r"block \(0, 0\) of 16 x 16 elements, at b=0, h=0, is listed as empty, and its elements make it partial",
    ),
    "derivative": (
        patch.dict(DERIVATIVES, {Op.TANH: lambda node, grad: (grad,)}),
        r"the derivative of score_mod `soft` at .* by the score is .* where autograd gives",
    ),
    "emitted": (
        patch.dict(SPELLING, {Op.TANH: SPELLING[Op.SIN]}),
        r"the emitted score_mod at b=1, h=3 is .* its graph gives",
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_every_law_is_seen_to_fail(name: str) -> None:
    broken, message = BREAKS[name]
    if name == "emitted" and not interpreted():
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    LAWS[name](soft, window)
    variant.cache_clear()
    with broken, pytest.raises(AssertionError, match=message):
        LAWS[name](soft, window)
    variant.cache_clear()
    LAWS[name](soft, window)


def test_all_laws_are_examined_and_each_has_a_sentence() -> None:
    found = list(check_laws(soft, window))
    assert [law.name for law in found] == list(LAWS)
    assert all(law.sentence.endswith(".") and len(law.sentence) < 120 for law in found)
    wrong = [law.error for law in found if law.error is not None]
    assert wrong == [] if interpreted() else [type(error) for error in wrong] == [LawNotRun]


def test_a_law_that_fails_is_reported_and_the_others_go_on() -> None:
    variant.cache_clear()
    with BREAKS["derivative"][0]:
        errors = {law.name: law.error for law in check_laws(soft)}
    variant.cache_clear()
    assert isinstance(errors["derivative"], AssertionError) and errors["trace"] is None
    assert isinstance(errors["intervals"], LawNotRun) and "there is no mask_mod" in str(errors["intervals"])


def test_what_cannot_be_traced_is_said_at_once() -> None:
    with pytest.raises(flexattn.TraceError, match=r"torch\.where"):
        check_laws(lambda score, b, h, q, k: score if q > k else -score)
    with pytest.raises(flexattn.TraceError, match="takes 5 arguments"):
        check_laws(mask_mod=soft)
    with pytest.raises(ValueError, match="give a score_mod, a mask_mod, or both"):
        check_laws()


table, short, ids = torch.randn(3, 9), torch.randn(5), torch.tensor([0, 0, 1, 2])
features = torch.randn(6, 3)
REACHES = {
    "a relative bias of three heads and five positions": (mods.relative_bias(table), None, (2, 3, 5, 5)),
    "an index of a query": (lambda s, b, h, q, k: s + short[q], None, (2, 4, 5, 19)),
    "from the end": (lambda s, b, h, q, k: s + short[-1 - k], None, (2, 4, 13, 5)),
    "through another tensor": (lambda s, b, h, q, k: s + short[ids[q] * 2], None, (2, 4, 4, 19)),
    "a short row": (lambda s, b, h, q, k: s - (features[q] - features[k]).square().sum(), None, (2, 4, 6, 6)),
    "chained indices": (lambda s, b, h, q, k: s + table[h][k], None, (2, 3, 13, 9)),
    "a mask": (None, masks.document_mask(ids), (2, 4, 4, 4)),
    "a batch of documents": (None, masks.document_mask(torch.zeros(1, 8, dtype=torch.int32)), (1, 4, 8, 8)),
}


@pytest.mark.parametrize("name", REACHES)
def test_ranges_of_indices_are_those_that_captured_tensors_reach(name: str) -> None:
    score_mod, mask_mod, shape = REACHES[name]
    assert Traced.of(score_mod, mask_mod).shape == shape
    assert [law.error for law in check_laws(score_mod, mask_mod) if isinstance(law.error, AssertionError)] == []


def test_what_reads_beyond_its_tensors_everywhere_is_not_examined() -> None:
    for mod, reason in (
        (lambda s, b, h, q, k: s + short[q + 7], "beyond a captured tensor at the first of all indices"),
        (lambda s, b, h, q, k: s + torch.zeros(0)[q], "a captured tensor that it reads is empty"),
    ):
        assert {str(law.error) for law in check_laws(mod) if law.name in ("trace", "derivative")} == {
            next(str(law.error) for law in check_laws(mod))
        }
        assert reason in next(str(law.error) for law in check_laws(mod))


def test_a_division_by_zero_that_torch_refuses_is_no_failure() -> None:
    found = {law.name: law.error for law in check_laws(mask_mod=lambda b, h, q, k: q // k > 1)}
    assert isinstance(found["trace"], LawNotRun) and "ZeroDivisionError" in str(found["trace"])


def test_16_bit_tensors_are_judged_by_their_own_roundings() -> None:
    half = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    mod = lambda s, b, h, q, k: s + half[q] * half[k] + half[k] / 3
    assert [law.name for law in check_laws(mod) if isinstance(law.error, AssertionError)] == []


def test_laws_leave_captured_tensors_as_they_are() -> None:
    learned = torch.randn(4, requires_grad=True)
    list(check_laws(lambda s, b, h, q, k: s + learned[h]))
    assert learned.grad is None and learned.requires_grad
