"""Block masks combined, complemented and shifted, trimmed, broadcast and marked: they attend to what their elements say."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from dense_mask import dense_of
from hypothesis import given, settings
from torch import Tensor

import flexattn
from flexattn import BlockMask, create_block_mask, create_mask, flex_attention, masks
from flexattn.block_lists import _DENSE, by_column, dense
from flexattn.testing import mask_diff
from flexattn.testing.strategies import mask_mods

ids = torch.arange(300) // 37


def from_lists(Q: int, KV: int, mask_mod: Any = None) -> BlockMask:
    """A mask whose lists say more than its mask_mod: partial blocks of some, full ones elsewhere."""
    rows, columns = -(-Q // 16), -(-KV // 32)
    kinds = torch.randint(0, 3, (1, 2, rows, columns), generator=torch.Generator().manual_seed(Q))
    lists = []
    for kind in (1, 2):
        found = (kinds == kind).int()
        lists += [found.sum(-1), torch.argsort(found, dim=-1, descending=True, stable=True)]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=(16, 32), mask_mod=mask_mod, seq_lengths=(Q, KV))


@settings(max_examples=60)
@given(
    mods=st.tuples(mask_mods(), mask_mods()),
    Q=st.integers(1, 120),
    KV=st.integers(1, 120),
    listed=st.booleans(),
)
def test_masks_combine_as_their_elements_do(mods: Any, Q: int, KV: int, listed: bool) -> None:
    a, b = (create_block_mask(mod, 2, 4, Q, KV, "cpu", (16, 32)) for mod in mods)
    if listed:
        b = from_lists(Q, KV, b.mask_mod)
        a = create_block_mask(masks.causal_mask, None, None, Q, KV, "cpu", (16, 32))
    one, two = dense_of(a), dense_of(b)
    for result, expected in ((a & b, one & two), (a | b, one | two), (~b, ~two), (~a & (b | a), ~one & (two | one))):
        assert torch.equal(*torch.broadcast_tensors(dense_of(result), expected))
        # Exact lists: no partial block is empty or full, no full block is partial.
        again = create_block_mask(result.mask_mod, *result.sizes, Q, KV, "cpu", (16, 32))
        assert torch.equal(again.kv_num_blocks, result.kv_num_blocks) and result.is_exact


def test_lists_that_say_more_than_the_mask_mod_are_what_is_combined() -> None:
    listed = from_lists(64, 64, masks.causal_mask)
    assert not listed.is_exact
    assert torch.equal(dense_of(~~listed), dense_of(listed))
    replaced = create_block_mask(masks.causal_mask, None, None, 64, 64, "cpu", 16)
    replaced.mask_mod = masks.noop_mask  # its partial blocks are now attended whole
    assert torch.equal(dense_of(~~replaced), dense_of(replaced))
    assert not torch.equal(
        dense_of(replaced), dense_of(create_block_mask(masks.causal_mask, None, None, 64, 64, "cpu", 16))
    )
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    both = listed & create_block_mask(masks.chunked(48), None, None, 64, 64, "cpu", (16, 32))
    torch.testing.assert_close(
        flex_attention(q, k, v, block_mask=both), flex_attention(q, k, v, block_mask=both, backend="reference")
    )
    scores = (q @ k.mT / 8**0.5).masked_fill(~dense_of(both), -torch.inf)
    expected = torch.softmax(scores, -1).nan_to_num(0.0) @ v
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=both), expected)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: create_block_mask(masks.causal_mask, None, None, 64, 96, "cpu", 16), "different lengths"),
        (lambda: create_block_mask(masks.causal_mask, None, None, 64, 64, "cpu", 32), "different block sizes"),
        (lambda: from_three_heads(), "H = 2 and H = 3 cannot be combined"),
    ],
)
def test_masks_that_do_not_fit_together_are_refused(other: Any, message: str) -> None:
    mask = create_block_mask(lambda b, h, q, k: q + h >= k, 1, 2, 64, 64, "cpu", 16)
    with pytest.raises(ValueError, match=message):
        mask | other()
    with pytest.raises(TypeError):
        mask & masks.causal_mask  # type: ignore[operator]


def from_three_heads() -> BlockMask:
    return create_block_mask(lambda b, h, q, k: q + h >= k, 1, 3, 64, 64, "cpu", 16)


@given(q=st.integers(0, 90), kv=st.integers(0, 90), Q=st.integers(1, 64), KV=st.integers(1, 64), kind=st.integers(0, 2))
def test_an_offset_is_a_part_of_the_mask(q: int, kv: int, Q: int, KV: int, kind: int) -> None:
    mask = (
        create_block_mask(
            flexattn.and_masks(masks.causal(3), masks.document_mask(ids)), None, None, 160, 160, "cpu", 16
        ),
        create_block_mask(lambda b, h, q, k: q + 9 * h >= k + 5 * b, 2, 3, 160, 160, "cpu", 16),
        from_lists(160, 160, masks.sliding_window(20)),
    )[kind]
    part = mask.offset(q, kv, Q_LEN=Q, KV_LEN=KV)
    assert part.seq_lengths == (Q, KV)
    assert torch.equal(dense_of(part), dense_of(mask)[..., q : q + Q, kv : kv + KV])
    rest = mask.offset(q, kv)
    assert torch.equal(dense_of(rest), dense_of(mask)[..., q:, kv:])


def test_offsets_may_be_tensors_and_go_beyond_the_mask() -> None:
    mask = create_block_mask(masks.sliding_window(40), 2, None, 128, 128, "cpu", 16)
    position = torch.tensor([7, 500])
    step = mask.offset(q=position, kv=torch.tensor(3), Q_LEN=1, KV_LEN=600)
    assert step.sizes == (2, 1)
    once = create_block_mask(masks.sliding_window(40), None, None, 128, 128, "cpu", 16)
    assert torch.equal(dense_of(once.offset(q=position, kv=3, Q_LEN=1, KV_LEN=600)), dense_of(step))
    expected = torch.stack([(p - torch.arange(3, 603) >= 0) & (p - torch.arange(3, 603) < 40) for p in position])
    assert torch.equal(dense_of(step)[:, 0, 0], expected)
    q, k = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 600, 8)
    out = flex_attention(q, k, k, block_mask=step)
    scores = (q @ k.mT / 8**0.5).masked_fill(~expected[:, None, None], -torch.inf)
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ k)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: m.offset(q=-1), r"offset\(q=-1\): an offset is 0 or more"),
        (lambda m: m.offset(kv=1.5), "an offset is an int, or an integer tensor"),
        (lambda m: m.offset(kv=torch.zeros(2, 2, dtype=torch.int32)), "0-d, or"),
        (lambda m: m.offset(q=torch.tensor(3)), "needs Q_LEN"),
        (lambda m: m.offset(q=torch.tensor([-5, 2]), Q_LEN=1), "an offset is 0 or more"),
        (
            lambda m: m.offset(q=torch.tensor([1, 2]), kv=torch.tensor([1, 2, 3]), Q_LEN=1, KV_LEN=9),
            "3 entries, .* B = 2",
        ),
        (lambda m: from_lists(64, 64).offset(q=60, Q_LEN=10), "reaches position 70 of a mask for 64"),
    ],
)
def test_an_offset_that_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(create_block_mask(masks.causal_mask, None, None, 64, 64, "cpu", 16))


def test_lists_are_as_wide_as_the_longest_row() -> None:
    mask = create_block_mask(masks.sliding_window(40), None, None, 16 * 100, 16 * 100, "cpu", 16)
    assert mask.kv_indices.shape == (1, 1, 100, 16) and mask.full_kv_indices is not None
    assert mask.full_kv_indices.shape == (1, 1, 100, 16)
    causal = create_block_mask(masks.causal_mask, None, None, 16 * 100, 16 * 100, "cpu", 16)
    assert causal.full_kv_indices is not None and causal.full_kv_indices.shape[-1] == 100
    # Without seq_lengths narrow lists would be a narrower mask.
    with pytest.raises(ValueError, match="need seq_lengths"):
        BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices, BLOCK_SIZE=16)
    same = BlockMask.from_kv_blocks(
        *mask.kv_lists(), BLOCK_SIZE=16, mask_mod=mask.mask_mod, seq_lengths=mask.seq_lengths
    )
    assert torch.equal(dense_of(same), dense_of(mask))
    q, k, v = (torch.randn(1, 1, 1600, 8, requires_grad=True) for _ in range(3))
    results = []
    for backend in ("tiled", "reference"):
        out = flex_attention(q, k, v, block_mask=mask, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v])])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_long_lists_by_key_block_are_made_without_an_array_of_all_blocks() -> None:
    rows = columns = 1100
    assert rows * columns > _DENSE
    mask = create_block_mask(masks.window(20, 3), None, None, 16 * rows, 16 * columns, "cpu", 16)
    count, index = by_column(mask.kv_num_blocks, mask.kv_indices, columns)
    assert index.shape == (1, 1, columns, 16)
    exact = dense(mask.kv_num_blocks, mask.kv_indices, columns)
    assert torch.equal(dense(count, index, rows), exact.mT)


def test_the_batch_and_the_heads_are_kept_once_where_they_do_not_matter() -> None:
    mask = create_block_mask(masks.causal_mask, 3, 5, 64, 64, "cpu", 16)
    assert mask.kv_indices.shape[:2] == (1, 1) and mask.sizes == (3, 5)
    assert mask[2, 4].sizes == (1, 1) and mask[:, 1:3].sizes == (3, 2)
    with pytest.raises(IndexError, match="index 3 is out of range for batch of size 3"):
        mask[3]
    heads = create_block_mask(lambda b, h, q, k: q + h >= k, 3, 5, 64, 64, "cpu", 16)
    assert heads.kv_indices.shape[:2] == (1, 5) and heads.sizes == (3, 5)
    part = heads[1:, torch.tensor([4, 0])]
    assert part.sizes == (2, 2) and part.kv_indices.shape[:2] == (1, 2)
    assert torch.equal(dense_of(part), dense_of(heads)[1:, [4, 0]])
    for made in (
        copy.deepcopy(heads),
        pickle.loads(pickle.dumps(create_block_mask(masks.causal(2), 3, 5, 64, 64, "cpu"))),
    ):
        assert made.sizes == (3, 5) and made.is_exact


def test_masks_know_whether_their_full_blocks_are_adjacent() -> None:
    window = create_block_mask(masks.sliding_window(90), None, None, 320, 320, "cpu", 16)
    gapped = create_block_mask(lambda b, h, q, k: (k < 32) | ((q - k).abs() < 48), None, None, 320, 320, "cpu", 16)
    assert window.contiguous is True and gapped.contiguous is False
    assert window[:, :, 3:].contiguous and window.with_mask_mod(None).contiguous and window.to("cpu").contiguous
    assert window._adjust(160, 160).contiguous is None and from_lists(64, 64).contiguous is None
    assert window.full_kv_indices is not None
    window.full_kv_indices = window.full_kv_indices.flip(-1)
    assert window.contiguous is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            masks.document_mask(ids),
            r"reads self.document_ids, a .* at self.document_ids\[q_idx\].* goes to 319, beyond dimension 0 of size 300",
        ),
        (lambda b, h, q, k: ids[k + 3] > 0, r"reads ids, a .* at ids\[kv_idx \+ 3\].* goes to 322"),
        (lambda b, h, q, k: ids[q - k] > 0, r"at ids\[q_idx - kv_idx\].* goes to 319"),
        (lambda b, h, q, k: ids[q - k - 5] > 0, r"goes to 314"),
        (lambda b, h, q, k: ids[-k - 1] > 0, r"goes to -320"),
        (
            (lambda b, h, q, k: (ids + 1)[k] > 0),
            r"reads a captured tensor of shape \[300\] at c0\[kv_idx\]",
        ),  # has no name
    ],
)
def test_tensors_that_are_too_short_are_an_error(mask: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        create_block_mask(mask, None, None, 320, 320, "cpu")
    if isinstance(mask, masks.document_mask):
        create_block_mask(mask, None, None, 300, 300, "cpu")
    x = torch.randn(1, 1, 320, 8)
    for options in ({}, {"batch_invariant": True}):
        with pytest.raises(IndexError, match=message):
            flex_attention(x, x, x, mask_mod=mask, **options)
    with pytest.raises(IndexError, match=message):
        mask_diff(mask, masks.causal_mask, 320)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device; runs where there is no GPU")
@pytest.mark.parametrize("create", [create_block_mask, create_mask])
def test_a_device_that_is_not_there_is_said(create: Any) -> None:
    with pytest.raises(ValueError, match=r"device='cuda' cannot be used here: .* Write device='cpu'"):
        create(masks.causal_mask, None, None, 64, 64, device="cuda")


def test_indices_that_are_kept_within_are_no_error() -> None:
    create_block_mask(lambda b, h, q, k: ids[q.clamp(max=299)] == ids[k % 300], None, None, 320, 320, "cpu")
    create_block_mask(lambda b, h, q, k: ids[q - k] > 0, None, None, 300, 300, "cpu")


@pytest.mark.parametrize("memory", [1 << 16, 1 << 20])
def test_less_memory_gives_the_same_mask(memory: int) -> None:
    noise = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)) > 0.001
    for mask in (masks.natten_2d(15, 20, 5), lambda b, h, q, k: noise[q, k], masks.document_mask(ids)):
        exact = create_block_mask(mask, None, None, 300, 300, "cpu", 32)
        small = create_block_mask(mask, None, None, 300, 300, "cpu", 32, max_memory=memory)
        assert all(torch.equal(a, b) for a, b in zip(exact.kv_lists(), small.kv_lists(), strict=True))
    with pytest.raises(ValueError, match="max_memory is 0"):
        create_block_mask(masks.causal_mask, None, None, 16, 16, "cpu", max_memory=0)


def test_a_mask_is_built_within_its_memory() -> None:
    # Neither ranges nor bounds tell of it: every element of most blocks is looked at.
    noise = torch.ones(2048, 2048, dtype=torch.bool)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.numel() and out.data_ptr() != noise.data_ptr():
                largest = max(largest, out.numel() * out.element_size() if out._base is None else 0)
            return out

    from flexattn.codegen.pipeline import variant
    from flexattn.codegen.tiles import classify
    from flexattn.codegen.trace import trace

    program, captured, ints = trace(None, lambda b, h, q, k: noise[q, (k * 1)])
    with Watch():
        classify(variant(program), captured, ints, (1, 1, 2048, 2048), (128, 128), torch.device("cpu"), 1 << 20)
    assert 0 < largest <= 1 << 20


@pytest.mark.parametrize("name", ["B", "H"])
def test_a_mask_of_the_first_entry_does_not_stand_for_all(name: str) -> None:
    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx >= kv_idx + 20 * (b if name == "B" else h)

    x = torch.randn(2, 3, 64, 8)
    sizes = {"B": 2, "H": 3} | {name: 1}
    made = create_block_mask(mask, sizes["B"], sizes["H"], 64, 64, "cpu", 16)
    with pytest.raises(ValueError, match=f"made with {name}=1 of a mask that depends on {name.lower()}"):
        flex_attention(x, x, x, block_mask=made)
    one = x[:1, :] if name == "B" else x[:, :1]
    flex_attention(one, one, one, block_mask=made)
    causal = create_block_mask(masks.causal_mask, 1, 1, 64, 64, "cpu", 16)  # the same for all
    flex_attention(x, x, x, block_mask=causal)


def test_numbers_beyond_int32_are_no_limit() -> None:
    huge = torch.tensor([2**40, 3])
    for mask in (masks.padding(huge), masks.prefix_lm(huge)):
        kept = create_mask(mask, 2, None, 1, 8, "cpu")[:, 0, 0]
        assert kept[0].all() and kept[1].tolist() == [True] * 3 + [False] * 5
