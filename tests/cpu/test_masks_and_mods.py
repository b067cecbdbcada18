"""The ready-made masks and mods against their formulas, and their combinations."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn import and_masks, create_mask, flex_attention, masks, mods, noop_mask, not_mask, or_masks

N = 12
ids = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3, 0, 0, 2])
batched = torch.stack([ids, ids.flip(0)])
lengths = torch.tensor([5, 9])
marked = batched == 1
spans = torch.where(batched == 0, -1, batched)

MASKS: list[tuple[Any, Any]] = [
    (noop_mask, lambda b, q, k: True),
    (masks.causal_mask, lambda b, q, k: q >= k),
    (masks.causal(), lambda b, q, k: q >= k),
    (masks.causal(3), lambda b, q, k: q + 3 >= k),
    (masks.causal(lengths), lambda b, q, k: q + int(lengths[b]) >= k),
    (masks.sliding_window(1), lambda b, q, k: q == k),
    (masks.sliding_window(4), lambda b, q, k: 0 <= q - k < 4),
    (masks.window(2, 1), lambda b, q, k: -1 <= q - k <= 2),
    (masks.window(None, 1), lambda b, q, k: -1 <= q - k),
    (masks.window(2, None), lambda b, q, k: q - k <= 2),
    (masks.window(None, None), lambda b, q, k: True),
    (masks.dilated(1, 5), lambda b, q, k: q == k),
    (masks.dilated(3, 2), lambda b, q, k: q - k in (0, 2, 4)),
    (masks.streaming(2, 3), lambda b, q, k: k <= q and (k < 2 or q - k < 3)),
    (masks.streaming(0, 3), lambda b, q, k: 0 <= q - k < 3),
    (masks.causal.bottom_right(4, 6), lambda b, q, k: q + 2 >= k),
    (masks.causal.bottom_right(lengths, 6), lambda b, q, k: q + 6 - int(lengths[b]) >= k),
    (masks.prefix_lm(4), lambda b, q, k: k < 4 or q >= k),
    (masks.prefix_lm(lengths), lambda b, q, k: k < lengths[b] or q >= k),
    (masks.prefix_lm(torch.tensor(2)), lambda b, q, k: k < 2 or q >= k),
    (masks.document_mask(ids), lambda b, q, k: ids[q] == ids[k]),
    (masks.document_mask(batched), lambda b, q, k: batched[b, q] == batched[b, k]),
    (masks.document_mask(ids, ids.flip(0)), lambda b, q, k: ids[q] == ids.flip(0)[k]),
    (masks.document_mask(batched, batched.flip(0)), lambda b, q, k: batched[b, q] == batched[1 - b, k]),
    (masks.global_tokens(0), lambda b, q, k: False),
    (masks.global_tokens(3), lambda b, q, k: q < 3 or k < 3),
    (masks.global_tokens(marked[0]), lambda b, q, k: marked[0, q] or marked[0, k]),
    (masks.global_tokens(marked), lambda b, q, k: marked[b, q] or marked[b, k]),
    (masks.shared_prefix(ids), lambda b, q, k: q >= k and int(ids[k]) in (0, int(ids[q]))),
    (
        masks.shared_prefix(batched, batched // 2),
        lambda b, q, k: (
            q >= k and batched[b, q] // 2 == batched[b, k] // 2 and int(batched[b, k]) in (0, int(batched[b, q]))
        ),
    ),
    (masks.transfusion(spans[0]), lambda b, q, k: q >= k or spans[0, q] == spans[0, k] > 0),
    (masks.transfusion(spans), lambda b, q, k: q >= k or spans[b, q] == spans[b, k] > 0),
    (masks.padding(lengths), lambda b, q, k: k < lengths[b]),
    (masks.chunked(5), lambda b, q, k: q // 5 == k // 5),
    (and_masks(masks.causal_mask, masks.document_mask(ids)), lambda b, q, k: q >= k and ids[q] == ids[k]),
    (or_masks(masks.sliding_window(2), masks.prefix_lm(1)), lambda b, q, k: 0 <= q - k < 2 or k < 1 or q >= k),
    (not_mask(masks.causal_mask), lambda b, q, k: q < k),
    (and_masks(), lambda b, q, k: True),
    (or_masks(), lambda b, q, k: False),
    (and_masks(lambda b, h, i, j: i > j, masks.chunked(3)), lambda b, q, k: q > k and q // 3 == k // 3),
]


@pytest.mark.parametrize(("mask", "formula"), MASKS, ids=[getattr(m, "__name__", "") for m, _ in MASKS])
def test_a_mask_is_its_formula(mask: Any, formula: Any) -> None:
    dense = create_mask(mask, 2, None, N, N, "cpu")
    for b, q, k in itertools.product(range(2), range(N), range(N)):
        assert bool(dense[b, 0, q, k]) == bool(formula(b, q, k)), (b, q, k)


def test_combinations_print_pickle_and_undo() -> None:
    mask = and_masks(masks.causal_mask, or_masks(masks.chunked(4), not_mask(masks.sliding_window(2))))
    assert repr(mask) == "and_masks(causal_mask, or_masks(chunked(size=4), not_mask(sliding_window(size=2))))"
    again = pickle.loads(pickle.dumps(mask))
    assert torch.equal(create_mask(again, None, None, N, N, "cpu"), create_mask(mask, None, None, N, N, "cpu"))
    assert not_mask(not_mask(masks.causal_mask)) is masks.causal_mask


def test_a_mask_moves_with_its_tensors() -> None:
    moved = and_masks(masks.document_mask(ids), masks.causal_mask).to("meta")
    assert moved.masks[0].document_ids.is_meta


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mods.softcap(0.0), "must be positive"),
        (lambda: mods.alibi(torch.ones(2, 2)), r"tensor \[Hq\]"),
        (lambda: mods.relative_bias(torch.ones(2, 4)), "2 \\* S - 1"),
        (lambda: mods.alibi_slopes(0), "at least 1"),
    ],
)
def test_impossible_parameters_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("combine", [and_masks, or_masks, not_mask, mods.compose])
def test_combining_what_cannot_be_called_is_refused(combine: Any) -> None:
    with pytest.raises(TypeError, match=r"takes .* functions"):
        combine(torch.ones(3, 3))


def attention(mod: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, mod, mask_mod=masks.causal_mask)


def dense(bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(N, N, dtype=torch.bool).tril()
    return torch.softmax((q @ k.mT / 8**0.5 + bias).masked_fill(~keep, -torch.inf), -1) @ v


def test_alibi_and_relative_bias_are_their_biases() -> None:
    q, k, v = (torch.randn(2, 6, N, 8) for _ in range(3))
    distance = torch.arange(N) - torch.arange(N).view(-1, 1)
    slopes = mods.alibi_slopes(6)
    torch.testing.assert_close(attention(mods.alibi(slopes), q, k, v), dense(slopes.view(-1, 1, 1) * distance, q, k, v))
    table = torch.randn(6, 2 * N - 1)
    torch.testing.assert_close(
        attention(mods.relative_bias(table), q, k, v), dense(table[:, distance + N - 1], q, k, v)
    )


def test_alibi_slopes_follow_the_paper() -> None:
    assert mods.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert mods.alibi_slopes(6).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


def test_composition_runs_from_the_first_to_the_last() -> None:
    q, k, v = (torch.randn(2, 6, N, 8) for _ in range(3))
    slopes = mods.alibi_slopes(6)
    both = mods.compose(mods.softcap(2.0), mods.alibi(slopes))
    by_hand = lambda s, b, h, i, j: 2 * torch.tanh(s / 2) + slopes[h] * (j - i)
    torch.testing.assert_close(attention(both, q, k, v), attention(by_hand, q, k, v))
