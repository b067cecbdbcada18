"""What is proved of a mask is so, and what people write in two ways is proved to be the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from strategies import Mod, environment, mask_mods, rich_masks
from torch import Tensor

from flexattn import and_masks, create_mask, masks, not_mask, or_masks
from flexattn.codegen.errors import TraceError
from flexattn.codegen.inequalities import Exhausted, Work, infeasible
from flexattn.codegen.ir import Node
from flexattn.codegen.polynomials import Polynomial
from flexattn.codegen.prove import never
from flexattn.testing.traced_mask import TracedMask

SHAPE = (2, 4, 41, 53)
g = torch.Generator().manual_seed(5)
ids = torch.randint(-1, 5, (160,), generator=g)
batched = torch.randint(-1, 5, (2, 160), generator=g)
other = torch.randint(-1, 5, (160,), generator=g)
keep = torch.rand(160, generator=g) > 0.5
slopes = torch.rand(8, generator=g)
causal = masks.causal_mask


def node(mask: Any) -> Node:
    return TracedMask.of(mask).merged().node


def differs(a: Any, b: Any) -> Callable[..., Tensor]:
    return lambda *index: a(*index) ^ b(*index)


def later(mask: Any) -> Callable[..., Tensor]:
    return lambda b, h, q, k: mask(b, h, q, k) & (k > q)


def across(mask: Any, documents: Tensor) -> Callable[..., Tensor]:
    def leak(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = (lambda i: documents[i]) if documents.dim() == 1 else (lambda i: documents[b, i])
        return mask(b, h, q, k) & (at(q) >= 0) & (at(q) != at(k))

    return leak


EQUAL = {
    "not later": (causal, lambda b, h, q, k: ~(k > q)),
    "a difference": (causal, lambda b, h, q, k: q - k >= 0),
    "a window": (masks.sliding_window(64), lambda b, h, q, k: (k <= q) & (k > q - 64)),
    "a window and causal": (masks.sliding_window(64), and_masks(causal, masks.window(63, None))),
    "a window by its middle": (masks.sliding_window(64), lambda b, h, q, k: abs(2 * (q - k) - 63) <= 63),
    "a window without what is too far": (masks.sliding_window(64), lambda b, h, q, k: (q >= k) ^ (q - k >= 64)),
    "a window by unequal truths": (masks.sliding_window(9), lambda b, h, q, k: (q >= k) != (q - k >= 9)),
    "both sides": (masks.window(4, 4), lambda b, h, q, k: abs(q - k) < 5),
    "De Morgan": (lambda b, h, q, k: ~((q < k) | (ids[q] != ids[k])), and_masks(causal, masks.document_mask(ids))),
    "documents in either order": (
        and_masks(causal, masks.document_mask(ids)),
        and_masks(lambda b, h, q, k: ids[k] == ids[q], not_mask(lambda b, h, q, k: k > q)),
    ),
    "documents by a difference": (masks.document_mask(batched), lambda b, h, q, k: batched[b, q] - batched[b, k] == 0),
    "chunks by comparisons": (masks.chunked(64), lambda b, h, q, k: (k >= q // 64 * 64) & (k < q // 64 * 64 + 64)),
    "chunks by bits": (masks.chunked(64), lambda b, h, q, k: (q >> 6) == (k >> 6)),
    "chunks by rests": (masks.chunked(60), lambda b, h, q, k: q - q % 60 == k - k % 60),
    "chunks by masked bits": (masks.chunked(32), lambda b, h, q, k: q - (q & 31) == (k & -32)),
    "streaming": (masks.streaming(4, 64), lambda b, h, q, k: ((k < 4) | (k > q - 64)) & (k <= q)),
    "streaming as either": (
        masks.streaming(4, 64),
        or_masks(masks.sliding_window(64), and_masks(causal, lambda b, h, q, k: k < 4)),
    ),
    "a prefix": (masks.prefix_lm(10), lambda b, h, q, k: (k <= 9) | ((k > 9) & (k <= q))),
    "a prefix by a maximum": (masks.prefix_lm(10), lambda b, h, q, k: k <= torch.maximum(q, q * 0 + 9)),
    "the first tokens": (masks.global_tokens(5), lambda b, h, q, k: torch.minimum(q, k) < 5),
    "dilated": (masks.dilated(6, 5), lambda b, h, q, k: (q >= k) & (q - k < 30) & (q % 5 == k % 5)),
    "images by a choice": (
        masks.transfusion(ids),
        lambda b, h, q, k: torch.where(k > q, (ids[q] >= 0) & (ids[k] == ids[q]), True),
    ),
    "images by both ids": (
        masks.transfusion(ids),
        lambda b, h, q, k: (k <= q) | ((ids[q] >= 0) & (ids[k] >= 0) & (ids[k] == ids[q])),
    ),
    "neighbours": (
        masks.natten_2d(8, 8, 3),
        lambda b, h, q, k: (
            (abs(k // 8 - torch.clamp(q // 8, 1, 6)) <= 1) & (abs(k % 8 - torch.clamp(q % 8, 1, 6)) <= 1)
        ),
    ),
    "block diffusion": (
        masks.block_diffusion(64, 8),
        lambda b, h, q, k: torch.where(
            k < 64,
            (q < 64) & (q // 8 == k // 8),
            torch.where(q < 64, q // 8 > (k - 64) // 8, (q - 64) // 8 >= (k - 64) // 8),
        ),
    ),
    "equal indices": (lambda b, h, q, k: q == k, lambda b, h, q, k: (q == k) & (ids[q] == ids[k])),
    "enclosed indices": (lambda b, h, q, k: (q >= k) & (q <= k) & keep[q], lambda b, h, q, k: (q == k) & keep[k]),
    "indices with factors": (
        lambda b, h, q, k: (ids[2 * q] == 3) & (2 * q == 3 * k),
        lambda b, h, q, k: (ids[3 * k] == 3) & (2 * q == 3 * k),
    ),
    "ids in a circle": (
        lambda b, h, q, k: (ids[q] == ids[k]) & (ids[k] == other[q]),
        lambda b, h, q, k: (ids[q] == other[q]) & (ids[q] == ids[k]),
    ),
    "a choice by head": (lambda b, h, q, k: torch.where(h < 2, q >= k, q - k >= 0), causal),
    "a sign": (causal, lambda b, h, q, k: torch.sign(q - k) >= 0),
    "truths as numbers": (lambda b, h, q, k: (q >= k).int() * 2 > 1, causal),
    "floats that are the same": (
        lambda b, h, q, k: (slopes[h] > slopes[0]) & (q >= k),
        lambda b, h, q, k: ~((q < k) | ~(slopes[h] > slopes[0])),
    ),
}
DIFFERENT = {
    "a window and one more": (masks.sliding_window(64), lambda b, h, q, k: (k <= q) & (k >= q - 64)),
    "strictly later": (causal, lambda b, h, q, k: k < q),
    "a chunk and one more": (masks.chunked(64), lambda b, h, q, k: (k >= q // 64 * 64) & (k <= q // 64 * 64 + 64)),
    "images that cross": (masks.transfusion(ids), lambda b, h, q, k: (k <= q) | ((ids[q] >= 0) & (ids[k] >= 0))),
    "another batch entry": (masks.document_mask(batched), lambda b, h, q, k: batched[0, q] == batched[b, k]),
    "dilated and one more": (masks.dilated(6, 5), lambda b, h, q, k: (q >= k) & (q - k <= 30) & (q % 5 == k % 5)),
    "neighbours of another border": (
        masks.natten_2d(8, 8, 3),
        lambda b, h, q, k: (
            (abs(k // 8 - torch.clamp(q // 8, 1, 6)) <= 1) & (abs(k % 8 - torch.clamp(q % 8, 1, 5)) <= 1)
        ),
    ),
    "a flag of the query": (lambda b, h, q, k: keep[q], lambda b, h, q, k: keep[k]),
    "a flag of either": (lambda b, h, q, k: (q <= k) & keep[q], lambda b, h, q, k: (q <= k) & keep[k]),
    "other ids": (masks.document_mask(ids), masks.document_mask(other)),
    "a prefix and one more": (masks.prefix_lm(10), lambda b, h, q, k: (k <= 10) | (k <= q)),
    "factors": (lambda b, h, q, k: 2 * q == 3 * k, lambda b, h, q, k: 2 * q == 3 * k + (h == 0) * 6),
    "a nan is unlike itself": (
        lambda b, h, q, k: slopes[h] <= slopes[1],
        lambda b, h, q, k: ~(slopes[h] > slopes[1]),
    ),
}
CAUSAL = {
    "causal": causal,
    "a window": masks.sliding_window(64),
    "streaming": masks.streaming(4, 64),
    "dilated": masks.dilated(6, 5),
    "a prefix of one": masks.prefix_lm(1),
    "documents": and_masks(masks.document_mask(ids), causal),
    "a shared prefix": masks.shared_prefix(ids, other),
    "queries of an even block": lambda b, h, q, k: (q // 4 > k // 4) | (q == k),
}
APART = {
    "documents": (masks.document_mask(ids), ids),
    "documents, causal": (and_masks(causal, masks.document_mask(batched)), batched),
    "through a third id": (lambda b, h, q, k: (ids[q] == other[h]) & (other[h] == ids[k]), ids),
    "the diagonal": (lambda b, h, q, k: q == k, ids),
    "prompts": (masks.shared_prefix(other, ids), ids),
    "a list of documents": (lambda b, h, q, k: ((ids[q] == 2) & (ids[k] == 2)) | ((ids[q] == 1) & (ids[k] == 1)), ids),
}


@pytest.mark.parametrize("name", EQUAL)
def test_masks_that_are_the_same_are_proved_to_be(name: str) -> None:
    a, b = EQUAL[name]
    assert never(node(differs(a, b)))
    assert torch.equal(create_mask(a, *SHAPE), create_mask(b, *SHAPE))


@pytest.mark.parametrize("name", DIFFERENT)
def test_masks_that_differ_are_not_proved_to_be_the_same(name: str) -> None:
    assert not never(node(differs(*DIFFERENT[name])))


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_masks_are_proved_to_be(name: str) -> None:
    assert never(node(later(CAUSAL[name])))


@pytest.mark.parametrize(
    "mask", [masks.prefix_lm(2), masks.window(3, 1), masks.transfusion(ids), masks.chunked(2)], ids=repr
)
def test_masks_that_see_the_future_are_not_proved_causal(mask: Any) -> None:
    assert not never(node(later(mask)))


@pytest.mark.parametrize("name", APART)
def test_masks_of_documents_are_proved_to_keep_them_apart(name: str) -> None:
    assert never(node(across(*APART[name])))


def test_masks_that_leak_are_not_proved_to_keep_documents_apart() -> None:
    for mask in (causal, masks.document_mask(other), lambda b, h, q, k: ids[q] <= ids[k]):
        assert not never(node(across(mask, ids)))


@settings(max_examples=200)
@given(
    a=st.one_of(mask_mods(), rich_masks()),
    b=st.one_of(mask_mods(), rich_masks()),
    kind=st.sampled_from(["both", "De Morgan", "neither"]),
)
def test_what_is_proved_to_be_never_is_never(a: Mod, b: Mod, kind: str) -> None:
    env = environment()

    def mask(*index: Tensor) -> Tensor:
        negated = torch.logical_not
        one, two = (m.bind(env)(*index) & (index[2] >= 0) for m in (a, b))
        if kind == "both":
            return one & two
        if kind == "neither":
            return one & two & negated(one)
        return (one & two) ^ negated(negated(one) | negated(two))

    try:
        traced = TracedMask.of(mask).merged()
        if never(traced.node) and not traced.may_wrap(SHAPE, 1 << 26):
            assert not create_mask(traced.mask_mod, *SHAPE).any()
    except TraceError:
        return  # a constant number is no mask
    except (
        RuntimeError,
        TypeError,
    ) as error:  # torch refuses a zero divisor, a negative power, and logic of Python's bools
        assert any(words in str(error) for words in ("ZeroDivision", "negative", "must be Tensor, not bool")), error


OPERATIONS: dict[str, Callable[[Any, int], Any]] = {
    "//": operator.floordiv,
    "%": operator.mod,
    "trunc": lambda x, c: torch.div(x, c, rounding_mode="trunc"),
    "fmod": torch.fmod,
    "*": operator.mul,
    "min": lambda x, c: torch.clamp(x, max=c),
    "max": lambda x, c: torch.clamp(x, min=c),
    "abs": lambda x, c: abs(x + c),
    "-": lambda x, c: -(x - c),
    "~": lambda x, c: ~(x + c),
    "sign": lambda x, c: torch.sign(x - c),
    "where": lambda x, c: torch.where(x > c, x, c + 0 * x),
    "square": lambda x, c: x * x - c,
    "&": lambda x, c: x & (2 ** abs(c) - 1 if c > 0 else -(2 ** abs(c))),
    "<<": lambda x, c: x << abs(c),
    ">>": lambda x, c: x >> abs(c),
    "of a truth": lambda x, c: (x > c).int() - (x < 1).int(),
}


@pytest.mark.parametrize("constant", [-3, -2, 2, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_arithmetic_of_proofs_is_that_of_masks(name: str, constant: int) -> None:
    operation = OPERATIONS[name]
    for q, k in ((0, 7), (1, 7), (2, 5), (3, 3), (5, 4), (6, 0)):
        value = int(operation(torch.tensor(q - k), constant))

        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, value: int, q: int = q, k: int = k) -> Any:
            return (operation(q_idx - kv_idx, constant) == value) & (q_idx == q) & (kv_idx == k)

        assert not never(node(lambda *index, value=value: mask(*index, value))), (q, k, value)
        for wrong in (value - 1, value + 1):
            assert never(node(lambda *index, wrong=wrong: mask(*index, wrong))), (q, k, wrong)


def test_a_proof_may_be_about_some_lengths_only() -> None:
    beyond = node(lambda b, h, q, k: (q >= 128) | (k - q > 40))
    assert not never(beyond)
    assert not never(beyond, {"q_idx": 128})
    assert never(beyond, {"q_idx": 128, "kv_idx": 41})
    assert not never(beyond, {"q_idx": 128, "kv_idx": 42})


def test_narrow_integers_wrap_and_are_not_taken_for_numbers() -> None:
    assert not never(node(lambda b, h, q, k: q.to(torch.int8) != q))
    assert not never(node(lambda b, h, q, k: (q.to(torch.uint8) + 1) == 0))
    assert never(node(lambda b, h, q, k: q.to(torch.uint8) < 0))
    assert not never(node(lambda b, h, q, k: (q.long() * 2**33).to(torch.int32) != q.long() * 2**33))
    assert never(node(lambda b, h, q, k: q.long().to(torch.int64) != q))


LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    "where": lambda a, b: torch.where(a, b, ~a),
    "not": lambda a, b: ~a,
}


@pytest.mark.parametrize("name", LOGIC)
def test_the_logic_of_proofs_is_that_of_masks(name: str) -> None:
    operation = LOGIC[name]
    for q, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        value = bool(operation(torch.tensor(q == 1), torch.tensor(k == 1)))
        here = lambda b, h, q_idx, kv_idx, q=q, k=k: (q_idx == q) & (kv_idx == k)
        holds = lambda b, h, q_idx, kv_idx: operation(q_idx == 1, kv_idx == 1)
        assert never(node(and_masks(here, holds))) is not value
        assert never(node(and_masks(here, not_mask(holds)))) is value


def test_what_is_not_understood_is_true_or_false() -> None:
    assert never(node(lambda b, h, q, k: keep[q] & ~keep[q]))
    assert not never(node(lambda b, h, q, k: keep[q] & ~keep[k]))
    assert never(node(lambda b, h, q, k: (slopes[h] < 1) & (slopes[b] < 1) & ~(slopes[h] < 1)))


def test_signs_of_products() -> None:
    assert never(node(lambda b, h, q, k: q * k < 0)) and never(node(lambda b, h, q, k: ids[q] * ids[q] < 0))
    assert not never(node(lambda b, h, q, k: ids[q] * ids[k] < 0))
    assert not never(node(lambda b, h, q, k: (q - k) * q < 0))


def test_a_search_gives_up_after_a_number_of_steps() -> None:
    # Nine numbers below eight that all differ: there are none, and linear arithmetic has to go through the cases.
    table = torch.zeros(9, 160, dtype=torch.long)

    def pigeons(b: Any, h: Any, q: Any, k: Any) -> Any:
        places = [table[i, q] for i in range(9)]
        found = places[0] >= 0
        for i, place in enumerate(places):
            found = found & (place >= 0) & (place < 8)
            for earlier in places[:i]:
                found = found & ((place < earlier) | (place > earlier))
        return found

    hard = node(pigeons)
    assert not never(hard, work=20_000)
    easy = node(differs(*EQUAL["chunks by rests"]))
    assert never(easy) and not never(easy, work=3)


def test_inequalities_of_integers_are_refuted() -> None:
    x, y = (Polynomial.variable(i) for i in (0, 1))
    work = Work(1000)
    assert infeasible([x - 3, -x + 4], work)
    assert not infeasible([x - 3, -x + 3], work)
    assert infeasible([x * 2 - 3, -x * 2 + 3], work)  # x = 1.5
    assert infeasible([x + y - 3, -x + 2, -y + 2], work)
    assert not infeasible([x + y - 4, -x + 2, -y + 2], work)
    assert infeasible([x * 2 - y * 2 - 1, y * 2 - x * 2 + 1], work)  # an odd difference of even numbers
    with pytest.raises(Exhausted):
        infeasible([x + y - 3, -x + 2, -y + 2], Work(1))
