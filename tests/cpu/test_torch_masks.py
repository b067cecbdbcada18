"""Block masks from and to PyTorch: the same lists, and the same attention by PyTorch's own flex_attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.attention.flex_attention as theirs
from hypothesis import given
from torch import Tensor

import flexattn
from flexattn import BlockMask, and_masks, create_block_mask, masks

pytestmark = pytest.mark.feature("block masks from and to PyTorch's")

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
BY_KEY = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


def made(mask_mod: Callable[..., Tensor], Q: int = 300, KV: int = 300, size: Any = 32, B: Any = None, H: Any = None):
    return create_block_mask(mask_mod, B, H, Q, KV, "cpu", size)


def by_torch(q: Tensor, k: Tensor, v: Tensor, block_mask: theirs.BlockMask) -> Tensor:
    """PyTorch's eager attention, which looks at the mask_mod of every element."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        return theirs.flex_attention(q, k, v, block_mask=block_mask)


def dense(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """[B, H, rows, columns]: which blocks lists say, read entry by entry."""
    found = torch.zeros(*counts.shape, columns, dtype=torch.bool)
    for b, h, row in (counts >= 0).nonzero().tolist():
        for column in indices[b, h, row, : counts[b, h, row]].tolist():
            assert not found[b, h, row, column]
            found[b, h, row, column] = True
    return found


def assert_same_lists(ours: BlockMask, other: theirs.BlockMask) -> None:
    """`other` lists the blocks of `ours`, by query and by key, in the layout that PyTorch's kernels rely on."""
    assert isinstance(other, theirs.BlockMask)
    assert (other.seq_lengths, other.BLOCK_SIZE) == (ours.seq_lengths, ours.BLOCK_SIZE)
    rows, columns = (-(-n // size) for n, size in zip(ours.seq_lengths, ours.BLOCK_SIZE, strict=True))
    B, H = ours.shape[:2]
    for kind in ("", "full_"):
        count, index = (getattr(ours, f"{kind}kv_{what}") for what in ("num_blocks", "indices"))
        lists = [getattr(other, f"{kind}{side}_{what}") for side in ("kv", "q") for what in ("num_blocks", "indices")]
        if count is None:
            assert lists == [None] * 4
            continue
        assert all(t.dtype is torch.int32 and t.is_contiguous() for t in lists)
        assert lists[1].shape == (B, H, rows, columns) and lists[3].shape == (B, H, columns, rows)
        expected = dense(count, index, columns)
        assert torch.equal(dense(lists[0], lists[1], columns), expected)
        assert torch.equal(dense(lists[2], lists[3], rows), expected.mT)
        for t, size in ((lists[1], columns), (lists[3], rows)):
            assert bool(((t >= 0) & (t < size)).all())


def assert_same_attention(block_mask: BlockMask, B: int = 2, H: int = 4) -> None:
    """PyTorch with the converted mask, and this library with the one converted back, attend as with `block_mask`."""
    q = torch.randn(B, H, block_mask.seq_lengths[0], 16)
    k, v = (torch.randn(B, H, block_mask.seq_lengths[1], 16) for _ in range(2))
    expected = flexattn.flex_attention(q, k, v, block_mask=block_mask)
    other = block_mask.to_torch()
    assert_same_lists(block_mask, other)
    torch.testing.assert_close(by_torch(q, k, v, other), expected)
    back = BlockMask.from_torch(other)
    assert torch.equal(back.to_dense(), block_mask.to_dense())
    assert torch.equal(flexattn.flex_attention(q, k, v, block_mask=back), expected)


IDS = torch.tensor([0] * 70 + [1] * 45 + [2] * 100 + [3] * 85)
PER_ROW = torch.stack([IDS, IDS.flip(0)])
KEEP = torch.rand(300, 300, generator=torch.Generator().manual_seed(1)) > 0.98


def by_head(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 20 * (h + 1) + 10 * b)


MASKS: dict[str, Callable[[], BlockMask]] = {
    "causal": lambda: made(masks.causal_mask),
    "blocks of two sizes": lambda: made(masks.causal_mask, size=(32, 64)),
    "key length": lambda: made(masks.causal(100), 200, 333),
    "everything": lambda: made(flexattn.noop_mask),
    "nothing": lambda: made(lambda b, h, q_idx, kv_idx: q_idx < 0),
    "no full blocks": lambda: made(lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 7 == 0),
    "full blocks not apart": lambda: create_block_mask(
        masks.causal_mask, None, None, 300, 300, "cpu", 32, False, False
    ),
    "trimmed lists": lambda: made(masks.sliding_window(40), 1000, 1000, 16),
    "documents": lambda: made(and_masks(masks.causal_mask, masks.document_mask(IDS))),
    "documents of a batch": lambda: made(masks.document_mask(PER_ROW), B=2),
    "heads and batch": lambda: made(by_head, B=2, H=4),
    "matrix": lambda: made(lambda b, h, q_idx, kv_idx: KEEP[q_idx, kv_idx]),
    "rows": lambda: made(and_masks(masks.causal_mask, masks.document_mask(IDS)))[:, :, 3:],
    "one row": lambda: made(masks.causal_mask)[:, :, 2],
    "rows picked": lambda: made(masks.causal_mask)[:, :, torch.tensor([4, 1, 9])],
    "every other row": lambda: made(masks.causal_mask)[:, :, ::2],
    "heads turned": lambda: made(by_head, B=2, H=4)[:, [3, 0, 0, 1]],
    "cropped": lambda: made(masks.causal_mask)._adjust(201, 170),
    "offset": lambda: made(masks.sliding_window(90)).offset(q=130, kv=11, Q_LEN=77),
    "offset by tensor": lambda: made(masks.sliding_window(90)).offset(q=torch.tensor(130), Q_LEN=77),
    "offset of each": lambda: made(masks.sliding_window(90)).offset(q=torch.tensor([130, 5]), Q_LEN=77),
    "and": lambda: made(masks.causal_mask) & made(masks.document_mask(IDS)),
    "or": lambda: made(masks.chunked(50)) | made(masks.sliding_window(33)),
    "not": lambda: ~made(masks.causal_mask),
    "slice of combined": lambda: (~made(masks.document_mask(PER_ROW), B=2) & made(masks.causal_mask))[:, :, 2:7],
    "natten": lambda: made(masks.natten_2d(15, 20, 5)),
    "tree": lambda: made(masks.tree.from_parents(torch.tensor([-1, 0, 0, 1, 2, 2])), 6, 6, 16),
    "prefix": lambda: made(masks.prefix_lm(torch.tensor([10, 50])), B=2),
    "global tokens": lambda: made(masks.or_masks(masks.global_tokens(3), masks.sliding_window(20))),
}


@pytest.mark.parametrize("name", MASKS)
def test_pytorch_attends_as_we_do(name: str) -> None:
    torch.manual_seed(0)
    assert_same_attention(MASKS[name]())


def test_one_batch_entry_and_head_serve_all() -> None:
    block_mask = create_block_mask(masks.causal_mask, 2, 4, 300, 300, "cpu", 32)
    assert block_mask.sizes == (2, 4) and block_mask.to_torch().kv_indices.shape[:2] == (1, 1)


def test_lists_are_padded_where_ours_are_trimmed() -> None:
    block_mask = MASKS["trimmed lists"]()
    assert block_mask.kv_indices.shape[-1] < 63 and block_mask.to_torch().kv_indices.shape[-1] == 63


def test_lists_that_are_wider_than_the_mask_are_cut() -> None:
    count, index = torch.tensor([[[2, 1]]]), torch.tensor([[[[1, 0, -5, 99], [1, 99, 99, 7]]]])
    block_mask = BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=16, seq_lengths=(32, 30))
    assert_same_attention(block_mask)


def test_lists_say_more_than_the_mask_mod() -> None:
    """PyTorch in eager mode never reads lists, so the mask_mod it gets reads them."""
    window = made(masks.sliding_window(90))
    assert_same_attention(window.with_mask_mod(masks.sliding_window(40)))
    assert_same_attention(window.with_mask_mod(None))
    count, index = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [0, 1]]]])
    assert_same_attention(BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=50, mask_mod=masks.causal_mask))
    assert_same_attention(BlockMask.from_kv_blocks(count * 0, index, count, index, BLOCK_SIZE=50))


def test_the_mask_mod_stays_the_same_where_it_says_all() -> None:
    block_mask = made(masks.causal_mask)
    assert block_mask.to_torch().mask_mod is masks.causal_mask
    assert BlockMask.from_torch(block_mask.to_torch()).mask_mod is masks.causal_mask


@pytest.mark.parametrize("lengths", [(0, 64), (64, 0)])
def test_no_queries_and_no_keys(lengths: tuple[int, int]) -> None:
    block_mask = made(masks.causal_mask, *lengths)
    assert_same_lists(block_mask, block_mask.to_torch())


def test_pytorch_compiles_with_a_converted_mask() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 128, 16) for _ in range(3))
    compiled = torch.compile(theirs.flex_attention, backend="aot_eager", fullgraph=True)
    for block_mask in (
        made(and_masks(masks.causal_mask, masks.document_mask(IDS)), 128, 128),
        made(masks.sliding_window(30), 256, 128)[:, :, 4:],
        made(masks.sliding_window(30), 128, 128).with_mask_mod(None),
    ):
        expected = flexattn.flex_attention(q, k, v, block_mask=block_mask)
        torch.testing.assert_close(compiled(q, k, v, block_mask=block_mask.to_torch()), expected)


def test_pytorch_slices_and_prints_a_converted_mask() -> None:
    block_mask = MASKS["trimmed lists"]()
    other = block_mask.to_torch()
    assert torch.equal(other.to_dense(), block_mask.to_dense())
    assert torch.equal(other[:, :, 4:9].to_dense(), block_mask[:, :, 4:9].to_dense())
    assert "BlockMask(shape=(1, 1, 1000, 1000)" in str(other)


# ---- from PyTorch


def test_a_mask_of_pytorch_attends_here_as_there() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 300, 16) for _ in range(3))
    for mask_mod, B, H in ((masks.causal_mask, None, None), (by_head, 2, 4), (masks.document_mask(PER_ROW), 2, None)):
        other = theirs.create_block_mask(mask_mod, B, H, 300, 300, "cpu", 32)
        block_mask = BlockMask.from_torch(other)
        assert block_mask.seq_lengths == (300, 300) and block_mask.mask_mod is mask_mod
        assert block_mask.kv_indices is other.kv_indices  # no copy
        assert_same_lists(block_mask, other)
        expected = flexattn.flex_attention(q, k, v, block_mask=create_block_mask(mask_mod, B, H, 300, 300, "cpu", 32))
        assert torch.equal(flexattn.flex_attention(q, k, v, block_mask=block_mask), expected)
        torch.testing.assert_close(by_torch(q, k, v, other), expected)


def test_a_mask_of_pytorch_without_lists_by_key_and_with_wide_integers() -> None:
    count, index = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [0, 1]]]])
    other = theirs.BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=(64, 32), compute_q_blocks=False)
    block_mask = BlockMask.from_torch(other)
    assert block_mask.seq_lengths == (128, 64) and block_mask.kv_indices.dtype is torch.int32
    assert block_mask.to_dense().tolist() == [[[[0, 1], [1, 1]]]]


def test_a_slice_of_a_mask_of_pytorch_is_refused() -> None:
    other = theirs.create_block_mask(masks.causal_mask, None, None, 256, 256, "cpu", 32)
    with pytest.raises(ValueError, match=r"from_torch\(block_mask\)\[:, :, rows\]"):
        BlockMask.from_torch(other[:, :, 2:])
    whole = BlockMask.from_torch(other)
    assert torch.equal(whole[:, :, 2:].to_dense(), whole.to_dense()[:, :, 2:])


def test_a_slice_of_a_mask_of_pytorch_with_a_mask_of_its_own() -> None:
    other = theirs.create_block_mask(masks.causal_mask, None, None, 256, 256, "cpu", 32)
    row = other[:, :, 3:4]
    row.mask_mod, row.seq_lengths = masks.causal(96), (32, 256)
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 1, 32, 16), (torch.randn(1, 1, 256, 16) for _ in range(2))
    expected = flexattn.flex_attention(q, k, v, mask_mod=masks.causal(96))
    torch.testing.assert_close(flexattn.flex_attention(q, k, v, block_mask=BlockMask.from_torch(row)), expected)


def test_a_mask_of_pytorch_that_does_not_fit_together_is_refused() -> None:
    count, index = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [0, 0]]]])
    with pytest.raises(ValueError, match="key block 0 twice"):
        BlockMask.from_torch(theirs.BlockMask.from_kv_blocks(count, index))
    without_batch = theirs.BlockMask.from_kv_blocks(count[0, 0], index[0, 0], compute_q_blocks=False)
    with pytest.raises(ValueError, match=r"must be \[B, H, rows\]"):
        BlockMask.from_torch(without_batch)


@pytest.mark.parametrize("value", [torch.ones(2, 2), None, masks.causal_mask], ids=["tensor", "None", "function"])
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"from_torch takes a torch\.nn\.attention\.flex_attention\.BlockMask"):
        BlockMask.from_torch(value)


def test_a_mask_of_ours_needs_no_conversion() -> None:
    with pytest.raises(TypeError, match="it needs no conversion"):
        BlockMask.from_torch(made(masks.causal_mask))  # type: ignore[arg-type]


def test_attention_with_a_mask_of_pytorch_names_both_ways_out() -> None:
    q = torch.randn(1, 1, 64, 16)
    other = theirs.create_block_mask(masks.causal_mask, None, None, 64, 64, "cpu", 32)
    with pytest.raises(TypeError, match=r"BlockMask\.from_torch\(block_mask\).*integrations\.torch_flex\.route\(\)"):
        flexattn.flex_attention(q, q, q, block_mask=other)  # type: ignore[call-overload]


# ---- any lists


@st.composite
def listed(draw: st.DrawFn) -> BlockMask:
    """A block mask of any lists: partial and full ones, narrow or wide, and garbage past the counts."""
    B, H = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    size = draw(st.sampled_from([(8, 8), (16, 8), (8, 16)]))
    Q, KV = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rows, columns = -(-Q // size[0]), -(-KV // size[1])
    kinds = torch.tensor(
        draw(st.lists(st.integers(0, 2), min_size=B * H * rows * columns, max_size=B * H * rows * columns))
    )
    kinds = kinds.view(B, H, rows, columns)
    lists = []
    for kind in (1, 2):
        count = (kinds == kind).sum(-1)
        width = int(count.max()) + draw(st.integers(0, 3))
        order = torch.argsort((kinds == kind).int(), dim=-1, descending=True, stable=True)
        padded = torch.nn.functional.pad(order, (0, 4), value=draw(st.integers(-3, 50)))
        lists += [count, padded[..., :width]]
    with_full = draw(st.booleans())
    mask_mod = draw(st.sampled_from([None, masks.causal_mask, masks.sliding_window(5), by_head]))
    given = lists if with_full else lists[:2]
    return BlockMask.from_kv_blocks(*given, BLOCK_SIZE=size, mask_mod=mask_mod, seq_lengths=(Q, KV))


@given(listed())
def test_any_lists_survive_the_way_there_and_back(block_mask: BlockMask) -> None:
    assert_same_lists(block_mask, block_mask.to_torch())
    back = BlockMask.from_torch(block_mask.to_torch())
    assert back.seq_lengths == block_mask.seq_lengths and back.BLOCK_SIZE == block_mask.BLOCK_SIZE
    q = torch.randn(2, 2, block_mask.seq_lengths[0], 8)
    k = torch.randn(2, 2, block_mask.seq_lengths[1], 8)
    expected = flexattn.flex_attention(q, k, k, block_mask=block_mask)
    torch.testing.assert_close(flexattn.flex_attention(q, k, k, block_mask=back), expected)
    attended = theirs.create_mask(block_mask.to_torch().mask_mod, 2, 2, *block_mask.seq_lengths, "cpu")
    scores = (q @ k.mT / 8**0.5).masked_fill(~attended, float("-inf"))
    torch.testing.assert_close(torch.softmax(scores, -1).nan_to_num(0.0) @ k, expected)
