"""Bugs that people ship, planted: each is found, and the report names the element where it shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexattn import Documents, and_masks, flex_attention, masks
from flexattn.testing import assert_causal, assert_no_leak, mask_diff

S = 96


def report(check: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(AssertionError) as raised:
        check(*args, **kwargs)
    return str(raised.value)


def test_a_window_that_is_one_too_wide() -> None:
    def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx <= 32)

    text = str(mask_diff(window, masks.sliding_window(32), S))
    assert f"differ in {S - 32} of " in text
    assert "first at b=0, h=0, q_idx=32, kv_idx=0: A attends, B does not" in text
    assert "> q_idx 32  A11111111111" in text and "  q_idx 33  .A1111111111" in text
    assert mask_diff(window, masks.sliding_window(33), S).proved


def test_documents_of_the_wrong_row_of_the_batch() -> None:
    ids = torch.stack([torch.arange(S) // 36, torch.arange(S) // 24])

    def documents(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (ids[0, q_idx] == ids[b, kv_idx]) & (q_idx >= kv_idx)

    # Token 24 begins document 1 of its own row; there the first row is still in document 0.
    text = report(assert_no_leak, documents, ids)
    assert "lets document 1 of b=1 see document 0: it attends at b=1, h=0, q_idx=24, kv_idx=0." in text
    assert "compare ids of the same batch entry" in text
    found = mask_diff(documents, and_masks(masks.document_mask(ids), masks.causal_mask), (2, 1, S, S))
    assert found.counterexample == (1, 0, 24, 0, True, False)


def test_images_that_see_each_other() -> None:
    image = torch.full((S,), -1)
    image[8:16], image[30:44], image[60:64] = 0, 1, 2

    def crossing(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) | ((image[q_idx] >= 0) & (image[kv_idx] >= 0))

    found = mask_diff(crossing, masks.transfusion(image), S)
    assert found.counterexample == (0, 0, 8, 30, True, False) and found.count == 8 * 14 + 8 * 4 + 14 * 4
    text = report(assert_causal, crossing, S, within=image)
    assert "it attends at b=0, h=0, q_idx=8, kv_idx=30, ids 0 and 1 of `within`." in text
    assert_causal(masks.transfusion(image), S, within=image)


class Layer(nn.Module):
    """A layer as model libraries have it: causal if somebody passes the mask."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Tensor:
        return flex_attention(query, key, value, mask_mod=attention_mask)


def test_a_layer_that_nobody_gave_its_mask() -> None:
    layer = Layer()
    text = report(assert_causal, attention=layer, shape=(1, 2, S, S))
    assert "`Layer` at test_mask_bugs.py:" in text and ": query 0 sees key 1.\nout[b=0, h=0, q_idx=0, 0] is " in text
    assert "look whether it was given its mask" in text
    assert_causal(attention=lambda q, k, v: layer(q, k, v, masks.causal_mask), shape=(1, 2, S, S))


ENDS = torch.tensor([20, 50, S])
POSITIONS = torch.arange(S)


@pytest.mark.parametrize(
    ("ids", "key"),
    [
        (torch.searchsorted(ENDS, POSITIONS), 0),  # from the left: token 20 is still in the first document
        (torch.searchsorted(ENDS - 1, POSITIONS, right=True), 19),  # last tokens for ends: token 19 is in the second
    ],
)
def test_documents_that_begin_one_off(ids: Tensor, key: int) -> None:
    packed = Documents.from_cu_seqlens(torch.tensor([0, *ENDS.tolist()]))
    text = report(assert_no_leak, and_masks(masks.document_mask(ids), masks.causal_mask), packed)
    assert f"lets document 1 see document 0: it attends at b=0, h=0, q_idx=20, kv_idx={key}." in text
    right = masks.document_mask(torch.searchsorted(ENDS, POSITIONS, right=True))
    assert_no_leak(and_masks(right, masks.causal_mask), packed)
    assert mask_diff(right, packed.mask(), S).equal


def test_padding_that_is_a_document_of_its_own() -> None:
    packed = Documents.from_lengths([40, 30], S)
    hidden = lambda b, h, q_idx, kv_idx: (packed.document_ids[q_idx] - packed.document_ids[kv_idx]).abs() <= 1
    text = report(assert_no_leak, hidden, packed)
    assert "lets document 0 see document 1: it attends at b=0, h=0, q_idx=0, kv_idx=40." in text
    assert_no_leak(packed.mask(masks.causal_mask), packed)
