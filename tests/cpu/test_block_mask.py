"""BlockMask: the same lists as PyTorch's, and right where slices, broadcasts and ragged lengths are concerned."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.utils._pytree as pytree
from dense_mask import dense_of
from hypothesis import given
from torch import Tensor
from torch.nn.attention import flex_attention as peer

import flexattn
from flexattn import BlockMask, create_block_mask, create_mask, flex_attention, masks
from flexattn.testing.strategies import mask_mods

docs = torch.tensor([0] * 40 + [1] * 50 + [2] * 70)


def listed(count: Tensor, index: Tensor, B: int = 1, H: int = 1) -> list[list[int]]:
    """The lists of all rows of B batch entries and H heads, sorted, without what lies past the counts."""
    count, index = count.expand(B, H, -1), index.expand(B, H, -1, -1)
    rows, counts = index.reshape(-1, index.shape[-1]).tolist(), count.flatten().tolist()
    return [sorted(r[:n]) for r, n in zip(rows, counts, strict=True)]


@given(
    f=mask_mods(),
    q_len=st.integers(1, 150),
    kv_len=st.integers(1, 150),
    block=st.sampled_from([16, 32, 128, (16, 48), (64, 16)]),
    B=st.sampled_from([1, 2]),
    H=st.sampled_from([1, 4]),
)
def test_lists_are_those_of_pytorch(f: Any, q_len: int, kv_len: int, block: Any, B: Any, H: Any) -> None:
    ours = create_block_mask(f, B, H, q_len, kv_len, "cpu", block)
    dense = create_mask(f, B, H, q_len, kv_len, "cpu")
    assert torch.equal(dense_of(ours), dense)
    # The peer pads ragged lengths with False, so that its last blocks are never full; whole lengths compare exactly.
    bq, bk = ours.BLOCK_SIZE
    whole = (-(-q_len // bq) * bq, -(-kv_len // bk) * bk)
    if max(whole) <= 160:
        dense = create_mask(f, B, H, *whole, "cpu")
        theirs = peer.create_block_mask(
            lambda b, h, i, j: dense[b, h, i, j], B or 1, H or 1, *whole, device="cpu", BLOCK_SIZE=block
        )
        ours = create_block_mask(f, B, H, *whole, "cpu", block)
        assert listed(ours.kv_num_blocks, ours.kv_indices, B, H) == listed(
            theirs.kv_num_blocks, theirs.kv_indices, B, H
        )
        assert listed(ours.full_kv_num_blocks, ours.full_kv_indices, B, H) == listed(
            theirs.full_kv_num_blocks, theirs.full_kv_indices, B, H
        )
        assert listed(ours.q_num_blocks, ours.q_indices, B, H) == listed(theirs.q_num_blocks, theirs.q_indices, B, H)
        assert torch.equal(ours.to_dense().expand(B, H, -1, -1), theirs.to_dense())


def test_fields_and_constructors_are_pytorchs() -> None:
    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx + 50 * b >= kv_idx + 20 * h

    ours, theirs = (m.create_block_mask(mask, 2, 3, 256, 384, device="cpu") for m in (flexattn, peer))
    for name in ("seq_lengths", "BLOCK_SIZE", "shape"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
    assert ours.numel() == theirs.numel()
    assert ours.sparsity() == pytest.approx(theirs.sparsity())
    assert len(ours.as_tuple()) >= 13


def test_create_block_mask_refuses_what_is_no_mask() -> None:
    with pytest.raises(flexattn.TraceError, match="takes 5 arguments"):
        create_block_mask(lambda s, b, h, i, j: s, None, None, 8, 8, "cpu")
    with pytest.raises(flexattn.TraceError, match="returns int32 values"):
        create_block_mask(lambda b, h, i, j: i - j, None, None, 8, 8, "cpu")
    with pytest.raises(ValueError, match="BLOCK_SIZE is 0"):
        create_block_mask(masks.causal_mask, None, None, 8, 8, "cpu", 0)
    with pytest.raises(ValueError, match="the mask depends on b, but B is None"):
        create_block_mask(lambda b, h, i, j: i >= j + b, None, None, 8, 8, "cpu")
    with pytest.raises(ValueError, match="Pass the number of query heads as H"):
        create_block_mask(lambda b, h, i, j: i >= j + h, None, None, 8, 8, "cpu")
    with pytest.raises(TypeError, match="mask_mod is a NoneType"):
        create_block_mask(None, None, None, 8, 8, "cpu")
    with pytest.raises(ValueError, match=r"BLOCK_SIZE is 1\.5"):
        create_block_mask(masks.causal_mask, None, None, 8, 8, "cpu", 1.5)
    with pytest.raises(ValueError, match="KV_LEN is -3"):
        create_mask(masks.causal_mask, None, None, 8, -3, "cpu")
    with pytest.raises(ValueError, match="Q_LEN is -1"):
        create_block_mask(masks.causal_mask, None, None, -1, 8, "cpu")


@pytest.mark.parametrize("lengths", [(0, 8), (8, 0), (0, 0)])
def test_a_length_of_zero_is_a_length(lengths: tuple[int, int]) -> None:
    mask = create_block_mask(masks.causal_mask, None, None, *lengths, "cpu")
    assert mask.shape == (1, 1, *lengths)
    assert mask.sparsity() == 0.0
    q, k = torch.randn(1, 1, lengths[0], 4), torch.randn(1, 1, lengths[1], 4)
    assert flex_attention(q, k, k, block_mask=mask).shape == (1, 1, lengths[0], 4)


def test_create_mask_takes_both_kinds() -> None:
    assert create_mask(masks.causal_mask, None, 2, 3, 3, "cpu").shape == (1, 2, 3, 3)
    scores = create_mask(lambda s, b, h, i, j: s + i - j, 2, None, 2, 3, "cpu")
    assert torch.equal(scores[1, 0], torch.tensor([[0.0, -1, -2], [1, 0, -1]]))


@pytest.mark.parametrize("length", [1, 100, 128, 129, 200, 300])
def test_sparsity_is_a_share_of_the_true_area(length: int) -> None:
    mask = create_block_mask(masks.causal_mask, None, None, length, length, "cpu")
    blocks = mask.to_dense()[0, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)[:length, :length]
    assert mask.sparsity() == pytest.approx(100 * (1 - blocks.double().mean().item()))
    assert mask.sparsity() >= 0


# ---- slices


def per_batch_and_head(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & (i - j < 20 * (b + 1) + 7 * h) | (docs[i] == docs[j]) & (h == 1)


SLICES: list[Any] = [
    0,
    -1,
    (slice(1, 3),),
    (slice(None), 1),
    (slice(None), slice(0, 1)),
    (slice(None, None, 2), slice(None), slice(2, 5)),
    (0, 0, -1),
    (slice(None), slice(None), torch.tensor([3, 0, 5])),
    (torch.tensor([2, 0]), slice(None), slice(1, None, 2)),
    (torch.tensor([-1]), slice(1, 2), slice(None)),
]


@pytest.mark.parametrize("index", SLICES, ids=str)
def test_a_slice_has_the_lists_the_mask_and_the_attention_of_the_part(index: Any) -> None:
    mask = create_block_mask(per_batch_and_head, 3, 2, 160, 160, "cpu", 20)
    part = mask[index]
    items = (*index,) if isinstance(index, tuple) else (index,)
    items = tuple(slice(i, i + 1 or None) if isinstance(i, int) else i for i in items) + (slice(None),) * (
        3 - len(items)
    )
    dense = dense_of(mask)[items[0]][:, items[1]].unflatten(2, (-1, 20))[:, :, items[2]].flatten(2, 3)
    assert part.shape == dense.shape
    assert torch.equal(dense_of(part), dense)
    B, H, Q, KV = part.shape
    q, k, v = torch.randn(B, H, Q, 8), torch.randn(B, H, KV, 8), torch.randn(B, H, KV, 8)
    for backend in ("tiled", "reference"):
        out = flex_attention(q, k, v, block_mask=part, backend=backend)
        expected = torch.softmax((q @ k.mT / 8**0.5).masked_fill(~dense, -torch.inf), -1).nan_to_num(0.0) @ v
        torch.testing.assert_close(out, expected)


def test_slices_of_slices_compose() -> None:
    mask = create_block_mask(per_batch_and_head, 3, 2, 160, 160, "cpu", 20)
    once, twice = mask[2, 1, 3:5], mask[1:, :, 1:7][1, 1, 2:4]
    assert torch.equal(dense_of(once), dense_of(twice))


def test_slicing_a_broadcast_dimension_does_not_shift_the_mask() -> None:
    mask = create_block_mask(lambda b, h, i, j: i >= j + b * 1000, 1, 1, 40, 40, "cpu", 20)
    assert torch.equal(dense_of(mask[0, 0]), dense_of(mask))


def test_a_ragged_last_row_keeps_its_length() -> None:
    mask = create_block_mask(masks.causal_mask, None, None, 50, 50, "cpu", 20)
    assert mask[:, :, 2:].shape == (1, 1, 10, 50)
    assert mask[:, :, :2].shape == (1, 1, 40, 50)
    assert torch.equal(dense_of(mask[:, :, -1])[0, 0], torch.ones(50, 50, dtype=torch.bool).tril()[40:])
    with pytest.raises(IndexError, match="shorter than a block"):
        mask[:, :, torch.tensor([2, 0])]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (5, "index 5 is out of range for batch of size 3"),
        ((0, 0, 0, 0), "3 dimensions to index"),
        ((slice(None), None), "heads cannot be indexed with None"),
        ((slice(None), 1.5), "heads cannot be indexed with 1.5"),
        ((slice(None), slice(None), torch.tensor([9])), "out of range for rows"),
    ],
)
def test_a_bad_index_is_an_index_error(index: Any, message: str) -> None:
    mask = create_block_mask(per_batch_and_head, 3, 2, 160, 160, "cpu", 20)
    with pytest.raises(IndexError, match=message):
        mask[index]


# ---- lists made by hand


def diagonal(n: int = 4, block: int = 16) -> BlockMask:
    count = torch.ones(1, 1, n, dtype=torch.int32)
    index = torch.arange(n).view(1, 1, n, 1).expand(1, 1, n, n)
    return BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=block)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_lists_are_honoured_where_there_is_no_mask_mod(backend: str) -> None:
    q, k, v = (torch.randn(2, 2, 64, 8) for _ in range(3))
    out = flex_attention(q, k, v, block_mask=diagonal(), backend=backend)
    for i in range(4):
        rows = slice(16 * i, 16 * i + 16)
        alone = flex_attention(q[:, :, rows], k[:, :, rows], v[:, :, rows])
        torch.testing.assert_close(out[:, :, rows], alone)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_lists_win_over_the_mask_mod(backend: str) -> None:
    q, k, v = (torch.randn(1, 1, 32, 8) for _ in range(3))
    full, first = torch.tensor([[[0, 1]]]), torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    mask = BlockMask.from_kv_blocks(torch.tensor([[[1, 0]]]), first, full, first, 16, masks.causal_mask)
    out = flex_attention(q, k, v, block_mask=mask, backend=backend)
    scores = q @ k.mT / 8**0.5
    keep = torch.zeros(32, 32, dtype=torch.bool)
    keep[:16, :16] = torch.ones(16, 16).tril().bool()  # partial: causal
    keep[16:, :16] = True  # full: not masked
    expected = torch.softmax(scores.masked_fill(~keep, -torch.inf), -1) @ v
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_unsorted_lists_and_a_ragged_last_block(backend: str) -> None:
    q, k, v = (torch.randn(1, 1, 40, 8, requires_grad=True) for _ in range(3))
    count = torch.tensor([[[2, 3, 1]]])
    index = torch.tensor([[[[2, 0, 7], [2, 0, 1], [2, 9, 9]]]])  # what lies past a count means nothing
    mask = BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=16, seq_lengths=(40, 40))
    out = flex_attention(q, k, v, block_mask=mask, backend=backend)
    keep = torch.zeros(40, 40, dtype=torch.bool)
    keep[:16, :16] = keep[:16, 32:] = keep[16:32] = keep[32:, 32:] = True
    expected = torch.softmax((q @ k.mT / 8**0.5).masked_fill(~keep, -torch.inf), -1) @ v
    torch.testing.assert_close(out, expected)
    for a, b in zip(*(torch.autograd.grad(o.sin().sum(), (q, k, v)) for o in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("count", "index", "extra", "message"),
    [
        ([[[1]]], [[[[3]]]], {}, "lists key block 3; there are 1 key blocks"),
        ([[[1]]], [[[[-1]]]], {}, "lists key block -1"),
        ([[[2]]], [[[[0, 0]]]], {}, "lists key block 0 twice"),
        ([[[3]]], [[[[0, 1]]]], {}, "between 0 and 2 blocks"),
        ([[[1]]], [[[[0]]]], {"full_kv_num_blocks": [[[1]]], "full_kv_indices": [[[[0]]]]}, "lists key block 0 twice"),
        ([[[1]]], [[[[0]]]], {"full_kv_num_blocks": [[[1]]]}, "belong together"),
        ([[1]], [[[0]]], {}, "must be"),
        ([[[1]]], [[[[0]]]], {"seq_lengths": (999, 10)}, "the lists have 1 rows"),
        ([[[1]]], [[[[0]]]], {"seq_lengths": (128,)}, "it must be two lengths"),
        ([[[1]]], [[[[0]]]], {"seq_lengths": (128, -1)}, "it must be two lengths"),
        ([[[1]]], [[[[2**32]]]], {}, "lists key block 4294967296"),
        ([[[1.5]]], [[[[0]]]], {}, "kv_num_blocks is torch.float32 .* must be integers"),
        ([[[1]]], [[[[False]]]], {}, "kv_indices torch.bool; both must be integers"),
    ],
)
def test_impossible_lists_are_refused(count: Any, index: Any, extra: dict[str, Any], message: str) -> None:
    extra = {k: torch.tensor(v) if k.startswith("full") else v for k, v in extra.items()}
    with pytest.raises(ValueError, match=message):
        BlockMask.from_kv_blocks(torch.tensor(count), torch.tensor(index), **extra)


def test_lists_with_any_strides_are_followed() -> None:
    mask = create_block_mask(per_batch_and_head, 3, 2, 160, 160, "cpu", 20)
    strided = [t.mT.contiguous().mT if t.dim() == 4 else t.repeat_interleave(2, -1)[..., ::2] for t in mask.kv_lists()]
    assert not any(t.is_contiguous() for t in strided)
    again = BlockMask.from_kv_blocks(*strided, 20, mask.mask_mod)
    assert torch.equal(dense_of(again), dense_of(mask))
    q, k, v = (torch.randn(3, 2, 160, 8) for _ in range(3))
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=again), flex_attention(q, k, v, block_mask=mask))


def test_lists_by_key_block_follow_a_replaced_list() -> None:
    mask = diagonal()
    assert mask.q_num_blocks.tolist() == [[[1, 1, 1, 1]]]
    assert mask.q_indices is mask.q_indices  # made once
    mask.kv_num_blocks = torch.tensor([[[1, 0, 0, 1]]], dtype=torch.int32)
    assert mask.q_num_blocks.tolist() == [[[1, 0, 0, 1]]]


def test_adjust_crops_to_the_upper_left() -> None:
    mask = create_block_mask(masks.prefix_lm(30), None, None, 160, 160, "cpu", 32)
    cropped = mask._adjust(100, 70)
    assert cropped.shape == (1, 1, 100, 70)
    assert torch.equal(dense_of(cropped), dense_of(mask)[..., :100, :70])
    with pytest.raises(ValueError, match="create it anew"):
        mask._adjust(200, 160)


def test_it_copies_pickles_and_flattens() -> None:
    mask = create_block_mask(masks.document_mask(docs), None, None, 160, 160, "cpu", 32)
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert torch.equal(dense_of(other), dense_of(mask))
    leaves, spec = pytree.tree_flatten(mask)
    assert len(leaves) == 4
    again = pytree.tree_unflatten([t.clone() for t in leaves], spec)
    assert torch.equal(dense_of(again), dense_of(mask))
    assert pytree.tree_map(lambda t: t + 0, mask).mask_mod is mask.mask_mod
    sliced = pickle.loads(pickle.dumps(mask[:, :, 2:]))
    assert torch.equal(dense_of(sliced), dense_of(mask[:, :, 2:]))


def test_moving_a_mask_leaves_the_original_and_its_module_alone() -> None:
    class Documents(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ids", docs)

        def forward(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return self.ids[i] == self.ids[j]

    for mask_mod in (Documents(), masks.and_masks(masks.causal_mask, Documents())):
        mask = create_block_mask(mask_mod, None, None, 160, 160, "cpu", 32)
        before = dense_of(mask)
        assert mask.to("meta").kv_indices.is_meta
        assert torch.equal(dense_of(mask), before)


@pytest.mark.parametrize("rows", [torch.tensor([3, 0]), slice(None, None, -1)], ids=str)
def test_the_maps_of_a_slice_live_with_its_lists_as_int32(rows: Any) -> None:
    part = create_block_mask(masks.document_mask(docs), None, None, 160, 160, "cpu", 20)[:, :, rows]
    assert (part.mask_mod.row.device, part.mask_mod.row.dtype) == (part.device, torch.int32)
    moved = part.to("meta")
    assert moved.mask_mod.row.is_meta and moved.mask_mod.mask.document_ids.is_meta
    name = f"ShiftedMask(mask=document_mask([160]), b=None, h=None, row=tensor[{part.kv_indices.shape[2]}], block=20)"
    assert part.mask_mod.__name__ == name


def test_separate_full_blocks_can_be_switched_off() -> None:
    mask = create_block_mask(masks.causal_mask, None, None, 64, 64, "cpu", 16, separate_full_blocks=False)
    assert mask.full_kv_num_blocks is None
    assert torch.equal(dense_of(mask)[0, 0], torch.ones(64, 64).tril().bool())


def test_pictures() -> None:
    mask = create_block_mask(masks.causal_mask, None, None, 64, 64, "cpu", 16)
    assert mask.to_string(-1) == "██      \n████    \n██████  \n████████"
    assert mask.to_string(2) == "░░  \n██░░"
    assert str(mask).startswith("BlockMask(shape=(1, 1, 64, 64), sparsity=37.50%)\n██")
    assert "mask_mod=causal_mask" in repr(mask)
    assert str(mask.to("meta")) == repr(mask)  # no data, no picture
    many = create_block_mask(per_batch_and_head, 3, 2, 40, 40, "cpu", 20).to_string(limit=2)
    assert many.startswith("(batch 0, head 0)\n") and many.endswith("... and 4 more")


def test_a_block_far_larger_than_the_sequence_costs_no_more_than_the_sequence() -> None:
    mask = create_block_mask(masks.causal_mask, None, None, 4, 4, "cpu", 2**30)
    assert mask.kv_num_blocks.tolist() == [[[1]]]
    q = torch.randn(1, 1, 4, 8)
    torch.testing.assert_close(
        flex_attention(q, q, q, block_mask=mask),
        flex_attention(q, q, q, mask_mod=masks.causal_mask),
    )


def test_building_evaluates_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexattn.codegen import tiles

    # Nothing but its elements tells of such a mask.
    noise = torch.rand(3, 2, 160, 160, generator=torch.Generator().manual_seed(0)) > 0.002

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return noise[b, h, i, j]

    monkeypatch.setattr(tiles, "_CHUNK", 20 * 20)
    largest = 0
    original = tiles.evaluate

    def watched(nodes: Any, inputs: Any, pool: Any) -> Any:
        nonlocal largest
        result = original(nodes, inputs, pool)
        largest = max(largest, *(t.numel() for t in result))
        return result

    monkeypatch.setattr(tiles, "evaluate", watched)
    pieces = create_block_mask(mask, 3, 2, 160, 160, "cpu", 20)
    monkeypatch.undo()
    assert 0 < largest <= 20 * 20
    whole = create_block_mask(mask, 3, 2, 160, 160, "cpu", 20)
    assert torch.equal(dense_of(pieces), dense_of(whole))
    assert torch.equal(pieces.kv_num_blocks, whole.kv_num_blocks) and torch.equal(pieces.kv_indices, whole.kv_indices)


def test_a_build_for_gpus_without_one_makes_masks_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def accelerator(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    assert create_block_mask(masks.causal_mask, None, None, 64, 64).kv_num_blocks.device.type == "cpu"
