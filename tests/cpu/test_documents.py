"""`Documents` against plain Python: every notation converts to every other, and the mask is the brute-force one."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from flexattn import Documents, create_mask, flex_attention, masks
from flexattn.notices import say_once

LENGTHS = st.lists(st.integers(0, 5), max_size=6)
ROWS = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.integers(-3, 4), min_size=n, max_size=n), min_size=1, max_size=3)
)


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def by_first_appearance(row: list[int], padding: bool) -> list[int]:
    seen: dict[int, int] = {}
    return [-1 if padding and i < 0 else seen.setdefault(i, len(seen)) for i in row]


def earlier_of_the_same(row: list[int]) -> list[int]:
    return [row[:place].count(i) for place, i in enumerate(row)]


def dense(mask: Any, n: int) -> Tensor:
    return create_mask(mask, None, None, n, n, "cpu")[0, 0]


def assert_int32(t: Tensor, values: Any) -> None:
    assert t.dtype is torch.int32
    assert t.tolist() == values


# ---- conversions


@given(LENGTHS, st.integers(0, 3))
def test_lengths_and_cu_seqlens_return_as_they_were_given(lengths: list[int], padding: int) -> None:
    ends = [0, *itertools.accumulate(lengths)]
    ids = [number for number, n in enumerate(lengths) for _ in range(n)] + [-1] * padding
    positions = [place for n in [*lengths, padding] for place in range(n)]
    for made in (
        Documents.from_lengths(lengths, ends[-1] + padding),
        Documents.from_cu_seqlens(torch.tensor(ends), ends[-1] + padding),
    ):
        assert_int32(made.document_ids, ids)
        assert_int32(made.seq_idx, [ids])
        assert_int32(made.lengths, lengths)
        assert_int32(made.cu_seqlens, ends)
        assert_int32(made.position_ids, positions)
        assert made.count == len(lengths)
    if not padding:
        assert_int32(Documents.from_cu_seqlens(ints(ends)).document_ids, ids)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_every_notation_leads_to_every_other(lengths: list[int]) -> None:
    first = Documents.from_lengths(lengths)
    for again in (
        Documents.from_cu_seqlens(first.cu_seqlens),
        Documents.from_lengths(first.lengths),
        Documents.from_document_ids(first.document_ids),
        Documents.from_seq_idx(first.seq_idx),
        Documents.from_position_ids(first.position_ids),
        Documents.from_position_ids(first.position_ids.unsqueeze(0).to(torch.uint8)),
    ):
        assert torch.equal(again.cu_seqlens, first.cu_seqlens)
        assert torch.equal(again.lengths, first.lengths)
        assert torch.equal(again.seq_idx, first.seq_idx)
        assert torch.equal(again.position_ids.flatten(), first.position_ids)


@given(ROWS)
def test_ids_of_any_order_are_numbered_by_first_appearance(rows: list[list[int]]) -> None:
    for made, padding in (
        (Documents.from_document_ids(torch.tensor(rows)), False),
        (Documents.from_seq_idx(torch.tensor(rows)), True),
    ):
        expected = [by_first_appearance(row, padding) for row in rows]
        assert_int32(made.document_ids, expected)
        assert_int32(made.seq_idx, expected)
        assert_int32(made.position_ids, [earlier_of_the_same(row) for row in expected])
        again = Documents.from_seq_idx(made.seq_idx)
        assert torch.equal(again.document_ids, made.document_ids)
    one = Documents.from_document_ids(ints(rows[0]))
    assert_int32(one.document_ids, by_first_appearance(rows[0], False))
    assert_int32(one.position_ids, earlier_of_the_same(rows[0]))


@given(ROWS)
def test_a_batch_is_its_rows(rows: list[list[int]]) -> None:
    batch = Documents.from_seq_idx(ints(rows))
    for row, values in enumerate(rows):
        one = Documents.from_seq_idx(ints(values))
        assert torch.equal(batch.document_ids[row], one.document_ids)
        assert torch.equal(batch.position_ids[row], one.position_ids)
    places = Documents.from_position_ids(ints(rows))
    for row, values in enumerate(rows):
        assert torch.equal(places.document_ids[row], Documents.from_position_ids(ints(values)).document_ids)


@given(ROWS)
def test_positions_that_do_not_follow_start_a_document(rows: list[list[int]]) -> None:
    for row in rows:
        breaks = [place > 0 and row[place] != row[place - 1] + 1 for place in range(len(row))]
        assert_int32(Documents.from_position_ids(torch.tensor(row)).document_ids, list(itertools.accumulate(breaks)))


@given(ROWS)
def test_a_flattened_batch_keeps_documents_of_different_rows_apart(rows: list[list[int]]) -> None:
    flat = Documents.from_seq_idx(torch.tensor(rows)).flatten()
    names = [(number, i) if i >= 0 else None for number, row in enumerate(rows) for i in row]
    seen: dict[Any, int] = {}
    assert_int32(flat.document_ids, [-1 if name is None else seen.setdefault(name, len(seen)) for name in names])


def test_empty_documents_keep_their_number_and_flattening_one_row_keeps_them() -> None:
    made = Documents.from_lengths([0, 2, 0, 1, 0])
    assert_int32(made.document_ids, [1, 1, 3])
    assert_int32(made.flatten().lengths, [0, 2, 0, 1, 0])
    assert_int32(Documents.from_lengths([]).cu_seqlens, [0])
    assert_int32(Documents.from_lengths([0, 0]).lengths, [0, 0])
    assert_int32(Documents.from_document_ids(ints([])).cu_seqlens, [0])
    assert_int32(Documents.from_position_ids(ints([])).position_ids, [])


def test_a_sequence_of_single_tokens() -> None:
    made = Documents.from_position_ids(torch.zeros(4, dtype=torch.int64))
    assert_int32(made.cu_seqlens, [0, 1, 2, 3, 4])
    assert torch.equal(dense(made.mask(), 4), torch.eye(4, dtype=torch.bool))


def test_a_row_of_padding_alone() -> None:
    made = Documents.from_seq_idx(ints([[-1, -7, -1]]))
    assert_int32(made.document_ids, [[-1, -1, -1]])
    assert_int32(made.cu_seqlens, [0])


# ---- masks

PLAIN: list[tuple[Any, Callable[[int, int], bool]]] = [
    (masks.causal_mask, lambda q, k: q >= k),
    (masks.prefix_lm(2), lambda q, k: k < 2 or q >= k),
    (masks.chunked(2), lambda q, k: q // 2 == k // 2),
    (masks.streaming(1, 2), lambda q, k: q >= k and (k < 1 or q - k < 2)),
    (lambda b, h, i, j: i == j + 1, lambda q, k: q == k + 1),
]


@given(ROWS, st.sampled_from(PLAIN), st.booleans())
def test_the_mask_is_the_brute_force_one(rows: list[list[int]], pair: Any, local: bool) -> None:
    mask, formula = pair
    made = Documents.from_seq_idx(torch.tensor(rows))
    ids = [by_first_appearance(row, True) for row in rows]
    places = [earlier_of_the_same(row) if local else list(range(len(row))) for row in ids]
    n, b = len(rows[0]), len(rows)
    together = create_mask(made.mask(), b, None, n, n, "cpu")[:, 0]
    combined = create_mask(made.mask(mask, local=local), b, None, n, n, "cpu")[:, 0]
    for row, q, k in itertools.product(range(b), range(n), range(n)):
        same = ids[row][q] == ids[row][k]
        assert bool(together[row, q, k]) == same
        assert bool(combined[row, q, k]) == (same and formula(places[row][q], places[row][k]))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from(PLAIN))
def test_a_local_mask_is_the_mask_of_each_document_alone(lengths: list[int], pair: Any) -> None:
    blocks = [dense(pair[0], n) for n in lengths]
    packed = Documents.from_lengths(lengths).mask(pair[0], local=True)
    assert torch.equal(dense(packed, sum(lengths)), torch.block_diag(*blocks).bool())


def test_packed_attention_is_attention_to_each_document() -> None:
    made = Documents.from_lengths([5, 1, 3])
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    packed = flex_attention(q, k, v, mask_mod=made.mask(masks.prefix_lm(2), local=True))
    pieces = [t.split([5, 1, 3], dim=2) for t in (q, k, v)]
    alone = [flex_attention(*one, mask_mod=masks.prefix_lm(2)) for one in zip(*pieces, strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=2))


def test_one_row_needs_no_batch_and_a_mask_is_made_of_the_same_tensors_each_time() -> None:
    made = Documents.from_seq_idx(ints([[0, 0, 1]]))
    assert dense(made.mask(masks.causal_mask), 3).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    first, second = (made.mask(masks.chunked(2), local=True) for _ in range(2))
    assert first.masks[0] is second.masks[0] is made.mask()
    assert first.masks[1].positions is second.masks[1].positions


def test_documents_print_pickle_and_move() -> None:
    made = Documents.from_lengths([2, 0, 1], length=4)
    assert repr(made) == "Documents([4])"
    assert repr(made.mask(masks.chunked(2), local=True)) == "and_masks(document_mask([4]), local(chunked(size=2)))"
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again.cu_seqlens, made.cu_seqlens)
    mask = pickle.loads(pickle.dumps(made.mask(masks.chunked(2), local=True)))
    assert torch.equal(dense(mask, 4), dense(made.mask(masks.chunked(2), local=True), 4))
    moved = made.to("meta")
    assert moved.document_ids.is_meta and moved.position_ids.is_meta and moved.count == 3
    assert mask.to("meta").masks[1].positions.is_meta


# ---- refusals

BATCH = Documents.from_seq_idx(ints([[0, 1], [0, 0]]))
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: Documents(torch.tensor([0, 1])),
        r"int32 ids .* got a torch.int64 tensor \[2\]; write .*from_document_ids",
    ),
    (lambda: Documents.from_cu_seqlens([0, 2]), r"cu_seqlens must be an integer tensor \[docs \+ 1\]; got \[0, 2\]"),  # type: ignore[arg-type]
    (lambda: Documents.from_cu_seqlens(ints([])), r"cu_seqlens must be .* got a torch.int32 tensor \[0\]"),
    (lambda: Documents.from_cu_seqlens(torch.rand(3)), "cu_seqlens must be an integer tensor"),
    (lambda: Documents.from_cu_seqlens(ints([2, 3])), "starts at 2. For the lengths .*from_lengths"),
    (lambda: Documents.from_cu_seqlens(ints([0, 3, 2])), "it starts at 0 and falls"),
    (
        lambda: Documents.from_cu_seqlens(ints([0, 3]), 2),
        "ends at 3, beyond the length of 2; give a length of at least 3",
    ),
    (lambda: Documents.from_cu_seqlens(ints([0, 3]), 4.0), "length must be a number of tokens, or None"),  # type: ignore[arg-type]
    (lambda: Documents.from_lengths([1.5]), "lengths must be integers, one a document"),  # type: ignore[list-item]
    (lambda: Documents.from_lengths(torch.rand(2)), r"lengths must be an integer tensor \[docs\]"),
    (lambda: Documents.from_lengths([2, -1]), "lengths must be 0 or more"),
    (lambda: Documents.from_lengths([2, 2], 3), "beyond the length of 3"),
    (lambda: Documents.from_position_ids(ints([[[0]]])), r"choose one: position_ids\[0\]"),
    (lambda: Documents.from_document_ids([[0, 1]]), r"write torch.tensor\(ids\)"),  # type: ignore[arg-type]
    (lambda: Documents.from_seq_idx(torch.tensor([True])), r"seq_idx.to\(torch.int32\)"),
    (lambda: BATCH.cu_seqlens, r"these are 2 rows. Write documents.flatten\(\).cu_seqlens"),
    (lambda: BATCH.lengths, r"lengths describes one sequence"),
    (lambda: Documents.from_document_ids(ints([0, 1, 0])).cu_seqlens, r"several pieces.*argsort\(stable=True\)"),
    (lambda: Documents.from_seq_idx(ints([-1, 0, 0])).cu_seqlens, "padding before a document; move the padding"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_describes_no_documents_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_advice_for_documents_in_pieces_works() -> None:
    made = Documents.from_document_ids(ints([4, 9, 4, 9, 4]))
    order = made.document_ids.argsort(stable=True)
    assert_int32(Documents.from_document_ids(made.document_ids[order]).cu_seqlens, [0, 3, 5])
    assert_int32(BATCH.flatten().cu_seqlens, [0, 1, 2, 4])
    assert_int32(Documents.from_seq_idx(BATCH.seq_idx[1]).cu_seqlens, [0, 2])


@pytest.mark.parametrize("local", [False, True])
def test_a_mask_that_cannot_be_called_is_refused(local: bool) -> None:
    with pytest.raises(TypeError, match=r"Documents.mask takes mask functions"):
        Documents.from_lengths([2]).mask(torch.ones(2, 2), local=local)  # type: ignore[arg-type]


def test_documents_of_a_compiled_function() -> None:
    def packed_attention(x: Tensor, ids: Tensor) -> Tensor:
        made = Documents.from_document_ids(ids)
        return flex_attention(x, x, x, mask_mod=made.mask(masks.prefix_lm(3), local=True))

    x, row = torch.randn(1, 1, 32, 8), torch.arange(32) // 9
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="builds the block mask anew"):
        compiled = torch.compile(packed_attention, fullgraph=True, backend="eager")(x, row)
    torch.testing.assert_close(compiled, packed_attention(x, row))
