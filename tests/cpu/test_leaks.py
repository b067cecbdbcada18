"""`assert_no_leak` finds what crosses documents, in masks, layers and gradients, and passes what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn import Documents, and_masks, create_block_mask, create_mask, flex_attention, masks
from flexattn.testing import assert_no_leak

ids = torch.tensor([3] * 11 + [0] * 20 + [3] * 4 + [8] * 1 + [1] * 30)
batched = torch.stack([torch.arange(66) // 20, torch.arange(66) // 17])
padded = torch.where(torch.arange(66) < 50, torch.arange(66) // 20, -1)


def layer(mask_mod: Any = None) -> Any:
    return lambda q, k, v: flex_attention(q, k, v, mask_mod=mask_mod)


def text_of(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(AssertionError) as raised:
        assert_no_leak(*args, **kwargs)
    return str(raised.value)


@pytest.mark.parametrize(
    "documents", [ids, batched, padded, Documents.from_seq_idx(padded)], ids=("ids", "rows", "pad", "packed")
)
@pytest.mark.parametrize("inner", [masks.noop_mask, masks.causal_mask], ids=("whole", "causal"))
def test_masks_of_documents_pass(documents: Any, inner: Any) -> None:
    own = documents.document_ids if isinstance(documents, Documents) else documents
    assert_no_leak(and_masks(masks.document_mask(own), inner), documents)


def test_block_masks_and_scores_and_grouped_heads_pass() -> None:
    bias = torch.randn(66, requires_grad=True)
    score = lambda s, b, h, q, k: s + bias[q] * 0.1 - (q - k).abs() * 0.01
    mask = create_block_mask(masks.document_mask(batched), 2, 4, 66, 66, device="cpu")
    assert_no_leak(mask, batched, score_mod=score, kv_heads=2)
    assert_no_leak(masks.document_mask(ids), ids, batch=3, heads=1, head_dim=8, dtype=torch.bfloat16)


def test_keys_of_another_sequence_have_ids_of_their_own() -> None:
    keys = torch.arange(40) // 9
    mask = masks.document_mask(ids, keys)
    assert_no_leak(mask, ids, kv_document_ids=keys)
    assert "lets document 3 see document 0" in text_of(lambda b, h, q, k: k >= 0, ids, kv_document_ids=keys)


@pytest.mark.parametrize("documents", [ids, batched, padded], ids=("ids", "rows", "pad"))
def test_the_first_leak_and_their_number_are_those_of_brute_force(documents: Tensor) -> None:
    mask = masks.causal_mask
    text = text_of(mask, documents)
    B = 2 if documents.dim() == 2 else 1
    rows = documents.expand(B, -1)
    across = (rows.unsqueeze(-1) != rows.unsqueeze(-2)) & (rows >= 0).unsqueeze(-1)
    leak = create_mask(mask, B, 2, 66, 66) & across.unsqueeze(1)
    b, h, q_idx, kv_idx = leak.nonzero()[0].tolist()
    assert text.startswith(f"causal_mask lets document {int(rows[b, q_idx])}")
    assert f"see document {int(rows[b, kv_idx])}: it attends at b={b}, h={h}, q_idx={q_idx}, kv_idx={kv_idx}." in text
    assert f"\n{int(leak.sum()):,} elements of" in text


def test_padding_may_see_documents_and_may_not_be_seen() -> None:
    real = padded >= 0
    sees = lambda b, h, q, k: (padded[q] == padded[k]) | (~real[q] & (k < 50))
    assert_no_leak(sees, padded)
    seen = lambda b, h, q, k: (padded[q] == padded[k]) | ~real[k]
    assert "lets document 0 see padding: it attends at b=0, h=0, q_idx=0, kv_idx=50." in text_of(seen, padded)
    assert "padding leaks into document 0 of b=0" in text_of(None, padded, attention=layer(seen))


def test_a_layer_without_its_mask_leaks() -> None:
    text = text_of(masks.document_mask(ids), ids, attention=layer())
    assert text.startswith("document 3 of b=0 leaks into document 0 of b=0.\nout[b=0, h=0, q_idx=11, 0] is ")
    assert "the mask by itself keeps documents apart" in text and " of dq, " in text
    assert_no_leak(masks.document_mask(ids), ids, attention=layer(masks.document_mask(ids)))
    assert_no_leak(None, ids, attention=layer(masks.document_mask(ids)))


def test_a_layer_that_mixes_the_batch_leaks() -> None:
    mixing = lambda q, k, v: layer(masks.document_mask(batched))(q, k.roll(1, 0), v)
    assert "document 0 of b=0 leaks into document 0 of b=1" in text_of(None, batched, attention=mixing)


def test_a_leak_that_only_gradients_have_is_found() -> None:
    class Blurred(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad + grad.roll(1, 2) * 1e-3

    leaky = lambda q, k, v: layer(masks.document_mask(ids))(q, k, Blurred.apply(v))
    text = text_of(masks.document_mask(ids), ids, attention=leaky)
    assert "\ndv[b=0, h=0, kv_idx=" in text and " of out" not in text
    with torch.no_grad():
        blind = lambda q, k, v: leaky(q, k, v).detach()
    assert_no_leak(masks.document_mask(ids), ids, attention=blind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_by_a_number_leaks_where_scores_are_below_it(dtype: torch.dtype) -> None:
    packed = Documents.from_lengths([4, 1, 6, 5])
    keep = create_mask(packed.mask(masks.causal_mask), None, None, 16, 16)[0, 0]

    def hidden_by(number: float) -> Any:
        return lambda q, k, v: torch.softmax((q @ k.mT / 4).masked_fill(~keep, number), -1) @ v

    assert_no_leak(None, packed, attention=hidden_by(-float("inf")), dtype=dtype)
    assert "leaks into document" in text_of(None, packed, attention=hidden_by(-1e4), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_score_that_is_a_large_number_leaks_from_documents_of_many_keys(dtype: torch.dtype) -> None:
    packed = torch.tensor([0] * 40 + [1] * 50)

    def layer_with(hidden: float) -> Any:
        def within(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return torch.where(packed[q_idx] == packed[kv_idx], score, hidden)

        return lambda q, k, v: flex_attention(q, k, v, within)

    assert_no_leak(None, packed, attention=layer_with(-float("inf")), dtype=dtype)
    assert "a mask by -1e4 hides nothing from them" in text_of(None, packed, attention=layer_with(-1e4), dtype=dtype)


def test_a_leak_of_a_few_documents_among_many_is_found_at_the_ends() -> None:
    many = torch.arange(120) // 4
    last = lambda b, h, q, k: (many[q] == many[k]) | ((many[k] == 29) & (many[q] == 3))
    assert "document 29 of b=0 leaks into document 3 of b=0" in text_of(
        None, many, attention=layer(last), max_documents=2
    )


def test_an_attention_that_looks_at_nothing_does_not_pass() -> None:
    assert "no document changed" in text_of(None, ids, attention=lambda q, k, v: torch.ones_like(q))
    assert "no document changed" in text_of(lambda b, h, q, k: q < 0, ids)
    assert "a gradient of no document" in text_of(None, ids, attention=lambda q, k, v: q.sign() + 0 * q)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="needs a mask, or attention="):
        assert_no_leak(None, ids)
    with pytest.raises(ValueError, match="document_ids must be an integer tensor"):
        assert_no_leak(masks.causal_mask, ids.float())
    with pytest.raises(ValueError, match="document_ids must be an integer tensor"):
        assert_no_leak(None, [1, 2], attention=layer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch=3, but document_ids has 2 rows"):
        assert_no_leak(masks.causal_mask, batched, batch=3)
    with pytest.raises(ValueError, match="give one of them"):
        assert_no_leak(None, ids, attention=layer(), score_mod=lambda s, b, h, q, k: s)
    with pytest.raises(ValueError, match="Hq is 0"):
        assert_no_leak(masks.causal_mask, ids, heads=0)
    with pytest.raises(ValueError, match="max_documents is 0"):
        assert_no_leak(masks.causal_mask, ids, max_documents=0)
    with pytest.raises(ValueError, match="give both with the same batch"):
        assert_no_leak(masks.causal_mask, batched, kv_document_ids=ids)
    with pytest.raises(ValueError, match="the shape says"):
        assert_no_leak(create_block_mask(masks.causal_mask, None, None, 30, 30, device="cpu"), ids)


def test_a_mask_of_heads_and_entries_needs_their_numbers() -> None:
    ids = torch.arange(40) // 10
    of_head = lambda b, h, q_idx, kv_idx: (ids[q_idx] == ids[kv_idx]) | (h == 3)
    of_entry = lambda b, h, q_idx, kv_idx: (ids[q_idx] == ids[kv_idx]) | (b == 1)
    with pytest.raises(ValueError, match=r"depends on the head h.*give heads="):
        assert_no_leak(of_head, ids)
    with pytest.raises(ValueError, match=r"depends on the batch entry b.*give batch="):
        assert_no_leak(of_entry, ids)
    for mask in (of_head, of_entry):
        with pytest.raises(AssertionError, match=r"see document"):
            assert_no_leak(mask, ids, heads=4, batch=2)
