"""Copies of block masks, masks, mods and documents: by copy, deepcopy, pickle, torch.save, and in another process."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexattn
from flexattn import BlockMask, Documents, and_masks, create_block_mask, flex_attention, masks, mods, not_mask, or_masks

pytestmark = pytest.mark.feature("deepcopy, pickle and state_dict")

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
IDS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def pickled_by_the_first_protocol(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value, 0))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.copy, copy.deepcopy, pickled, pickled_by_the_first_protocol, saved]
copies = pytest.mark.parametrize("copied", COPIES, ids=lambda f: f.__name__)


def by_batch(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 20 * (b + 1))


def stripes(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx // 16 % 2 == 0


def made(mask_mod: Any, B: int | None = None, H: int | None = None) -> BlockMask:
    return create_block_mask(mask_mod, B, H, 100, 90, "cpu", 16)


def from_lists() -> BlockMask:
    count, index = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [0, 1]]]])
    return BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=64, mask_mod=masks.causal_mask)


BLOCK_MASKS: dict[str, Callable[[], BlockMask]] = {
    "causal": lambda: made(masks.causal_mask),
    "a window for a batch": lambda: made(masks.sliding_window(20), 3, 4),
    "of the batch": lambda: made(by_batch, 2),
    "of the first entry": lambda: made(by_batch, 1),
    "not contiguous": lambda: made(stripes),
    "rows": lambda: made(masks.sliding_window(30))[:, :, 2:5],
    "rows picked": lambda: made(masks.sliding_window(30))[:, :, [4, 1]],
    "offset": lambda: made(masks.sliding_window(30)).offset(q=torch.tensor(30), Q_LEN=33),
    "combined": lambda: ~made(masks.sliding_window(30)) & made(masks.causal_mask),
    "from lists": from_lists,
    "combined with lists": lambda: from_lists() | made_like(from_lists()),
    "another mask_mod": lambda: made(masks.causal_mask).with_mask_mod(masks.sliding_window(5)),
    "from PyTorch": lambda: BlockMask.from_torch(made(masks.causal_mask).to_torch()),
}


def made_like(other: BlockMask) -> BlockMask:
    return create_block_mask(masks.sliding_window(3), None, None, *other.seq_lengths, "cpu", other.BLOCK_SIZE)


def assert_same(one: BlockMask, other: BlockMask) -> None:
    """All that is known of a block mask, and the attention it gives."""
    for name in LISTS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or (torch.equal(a, b) and a.dtype is b.dtype), name
    for name in ("seq_lengths", "BLOCK_SIZE", "sizes", "is_exact", "contiguous", "only_first", "shape"):
        assert getattr(one, name) == getattr(other, name), name
    assert torch.equal(one.q_indices, other.q_indices) and str(one) == str(other)
    B, H = one.sizes
    q, k = torch.randn(B, H, one.seq_lengths[0], 8), torch.randn(B, H, one.seq_lengths[1], 8)
    attended = [flex_attention(q, k, k, block_mask=block_mask) for block_mask in (one, other)]
    assert torch.equal(*attended)


@copies
@pytest.mark.parametrize("name", BLOCK_MASKS)
def test_a_copy_of_a_block_mask_knows_what_the_mask_knows(name: str, copied: Callable[..., Any]) -> None:
    assert_same(copied(BLOCK_MASKS[name]()), BLOCK_MASKS[name]())


def test_these_block_masks_differ_in_what_is_known_of_them() -> None:
    all_of_them = [make() for make in BLOCK_MASKS.values()]
    assert {m.is_exact for m in all_of_them} == {True, False}
    assert {m.contiguous for m in all_of_them} == {True, False, None}
    assert {(1, 1), (3, 4), (2, 1)} <= {m.sizes for m in all_of_them}
    assert {m.only_first for m in all_of_them} == {(False, False), (True, False)}


@copies
def test_lists_by_key_block_do_not_travel(copied: Callable[..., Any]) -> None:
    block_mask = made(masks.causal_mask)
    before = block_mask.q_indices
    other = copied(block_mask)
    assert other.q_indices is not before and torch.equal(other.q_indices, before)
    assert block_mask.q_indices is before


def test_copies_share_nothing_that_is_written_to() -> None:
    block_mask = made(masks.causal_mask)
    for copied in (copy.deepcopy, pickled, saved):
        copied(block_mask).kv_num_blocks.zero_()
        assert block_mask.kv_num_blocks.any()
    shallow = copy.copy(block_mask)
    assert shallow.kv_indices is block_mask.kv_indices
    shallow.mask_mod = masks.noop_mask
    assert block_mask.mask_mod is masks.causal_mask and block_mask.is_exact and not shallow.is_exact


MASK_MODS = [
    masks.causal_mask,
    masks.causal(3),
    masks.noop_mask,
    masks.sliding_window(3),
    masks.window(2, 1),
    masks.dilated(4, 2),
    masks.chunked(3),
    masks.streaming(1, 3),
    masks.prefix_lm(2),
    masks.prefix_lm(torch.tensor([2])),
    masks.padding(torch.tensor([5])),
    masks.global_tokens(2),
    masks.document_mask(IDS),
    masks.natten_2d(2, 4, (1, 3)),
    masks.transfusion(IDS - 1),
    masks.tree.from_parents(torch.tensor([-1, 0, 0, 1, 1, 2, 2, 3])),
    masks.block_diffusion(4, 2),
    and_masks(masks.causal_mask, or_masks(masks.document_mask(IDS), not_mask(masks.chunked(2)))),
    Documents.from_document_ids(IDS).mask(masks.causal_mask),
    Documents.from_document_ids(IDS).mask(masks.chunked(2), local=True),
]


@copies
@pytest.mark.parametrize("mask_mod", MASK_MODS, ids=lambda m: m.__name__)
def test_a_copy_of_a_mask_masks_alike(mask_mod: Any, copied: Callable[..., Any]) -> None:
    other = copied(mask_mod)
    assert other.__name__ == mask_mod.__name__
    values = [flexattn.create_mask(m, 1, 1, 8, 8, "cpu") for m in (mask_mod, other)]
    assert torch.equal(*values)


SCORE_MODS = [
    mods.identity,
    mods.softcap(3.0),
    mods.alibi(torch.rand(2)),
    mods.relative_bias(torch.randn(2, 15)),
    mods.compose(mods.softcap(3.0), mods.alibi(nn.Parameter(torch.rand(2)))),
]


@copies
@pytest.mark.parametrize("score_mod", SCORE_MODS, ids=lambda m: m.__name__)
def test_a_copy_of_a_score_mod_scores_alike(score_mod: Any, copied: Callable[..., Any]) -> None:
    q = torch.randn(1, 2, 8, 4)
    results = [flex_attention(q, q, q, m) for m in (score_mod, copied(score_mod))]
    assert torch.equal(*results)


@copies
def test_documents_travel_without_what_was_computed(copied: Callable[..., Any]) -> None:
    documents = Documents.from_lengths([3, 2, 0, 3])
    before = documents.position_ids, documents.lengths, documents.mask()
    other = copied(documents)
    assert torch.equal(other.document_ids, documents.document_ids) and other.count == documents.count == 4
    assert other._values == {}
    assert torch.equal(other.position_ids, before[0]) and torch.equal(other.lengths, before[1])
    assert documents.mask() is before[2] and other.mask() is not before[2]


# ---- what cannot be pickled


def lambda_of_a_function() -> Any:
    return lambda b, h, q_idx, kv_idx: q_idx >= kv_idx


@pytest.mark.parametrize("wrap", [made, and_masks, lambda f: made(f)[:, :, 1:], lambda f: ~made(f)])
def test_a_lambda_raises_what_python_says_of_lambdas(wrap: Any) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"Can't (pickle|get) .*lambda"):
        pickle.dumps(wrap(lambda_of_a_function()))
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"Can't (pickle|get) .*lambda"):
        torch.save(wrap(lambda_of_a_function()), io.BytesIO())


def test_a_block_mask_of_a_lambda_can_be_copied() -> None:
    block_mask = made(lambda_of_a_function())
    for copied in (copy.copy, copy.deepcopy):
        assert_same(copied(block_mask), block_mask)


def test_a_file_that_may_hold_tensors_only_is_refused_by_torch() -> None:
    file = io.BytesIO()
    torch.save(made(masks.causal_mask), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(file, weights_only=True)


# ---- modules


class Attention(nn.Module):
    """A module that holds one of each as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(2))
        self.register_buffer("ids", IDS.clone())
        self.score_mod = mods.compose(mods.softcap(5.0), mods.alibi(self.slopes))
        self.documents = Documents.from_document_ids(IDS)
        self.block_mask = create_block_mask(self.documents.mask(masks.causal_mask), None, None, 8, 8, "cpu", 4)
        self.own = create_block_mask(self.mask, None, None, 8, 8, "cpu", 4)

    def mask(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (self.ids[q_idx] == self.ids[kv_idx]) & (q_idx >= kv_idx)

    def forward(self, x: Tensor) -> Tensor:
        one = flex_attention(x, x, x, self.score_mod, self.block_mask)
        return one + flex_attention(x, x, x, mask_mod=self.mask) + flex_attention(x, x, x, block_mask=self.own)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=lambda f: f.__name__)
def test_a_copy_of_a_module_is_a_module_of_its_own(copied: Callable[..., Any]) -> None:
    module, x = Attention(), torch.randn(1, 2, 8, 4)
    before = module(x)
    other = copied(module)
    assert torch.equal(other(x), before)
    # Parameters in its mods are its own ones, and so is the module in its mask.
    assert other.score_mod.mods[1].slopes is other.slopes
    assert other.own.mask_mod.__self__ is other and other.own.is_exact
    with torch.no_grad():
        other.slopes.add_(1)
    assert torch.equal(module(x), before) and not torch.equal(other(x), before)
    other(x).sum().backward()
    assert other.slopes.grad is not None and module.slopes.grad is None


def test_masks_are_no_part_of_the_state_and_parameters_in_mods_are_loaded() -> None:
    module, other, x = Attention(), Attention(), torch.randn(1, 2, 8, 4)
    assert set(module.state_dict()) == {"slopes", "ids"}
    assert not torch.equal(module(x), other(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x), other(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_changes_its_dtype(dtype: torch.dtype) -> None:
    module, x = Attention(), torch.randn(1, 2, 8, 4)
    expected = module(x)
    module.to(dtype)
    assert module.score_mod.mods[1].slopes.dtype is dtype
    assert module.block_mask.kv_indices.dtype is torch.int32 and module.ids.dtype is torch.int64
    found = module(x.to(dtype))
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=3e-2)


def test_a_module_leaves_its_masks_where_they_are_and_the_error_says_how_to_move_them() -> None:
    module, x = Attention(), torch.randn(1, 2, 8, 4, device="meta")
    module.to("meta")
    assert module.ids.is_meta and module.block_mask.device.type == "cpu"
    with pytest.raises(ValueError, match=r"move it with block_mask\.to\('meta'\)"):
        flex_attention(x, x, x, block_mask=module.block_mask)
    module.block_mask = module.block_mask.to("meta")
    assert flex_attention(x, x, x, block_mask=module.block_mask).is_meta
    assert flex_attention(x, x, x, mask_mod=masks.document_mask(module.ids)).is_meta  # made of the buffer, in forward


def test_a_moved_sliced_or_replaced_mask_is_still_that_of_the_first_entry() -> None:
    first = made(by_batch, 1)
    q, k = torch.randn(2, 1, 100, 8), torch.randn(2, 1, 90, 8)
    leaves, tree = torch.utils._pytree.tree_flatten(first)
    for other in (first.to("cpu"), first[0:1], torch.utils._pytree.tree_unflatten(leaves, tree)):
        assert other.only_first == (True, False)
        with pytest.raises(ValueError, match="made with B=1 of a mask that depends on b"):
            flex_attention(q, k, k, block_mask=other)


# ---- other processes


def attended(block_mask: BlockMask, score_mod: Any) -> Tensor:
    q, k = (torch.linspace(-1, 1, n * 8).view(1, 1, n, 8) for n in block_mask.seq_lengths)
    return flex_attention(q, k, k, score_mod, block_mask)


def test_a_new_process_reads_a_file(tmp_path: Path) -> None:
    block_mask = made(and_masks(masks.causal_mask, masks.document_mask(torch.arange(100) // 33)))[:, :, 1:]
    score_mod = mods.compose(mods.alibi(torch.tensor([0.5])), mods.softcap(3.0))
    (tmp_path / "pickled").write_bytes(pickle.dumps((block_mask, score_mod)))
    torch.save((block_mask, score_mod), tmp_path / "saved")
    script = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    one = pickle.load(file)
results = []
for block_mask, score_mod in (one, torch.load(sys.argv[2], weights_only=False)):
    import flexattn
    assert block_mask.is_exact and block_mask.contiguous is not None
    q, k = (torch.linspace(-1, 1, n * 8).view(1, 1, n, 8) for n in block_mask.seq_lengths)
    results.append(flexattn.flex_attention(q, k, k, score_mod, block_mask))
torch.save(results, sys.argv[3])
"""
    names = [str(tmp_path / name) for name in ("pickled", "saved", "results")]
    subprocess.run([sys.executable, "-c", script, *names], check=True, timeout=300)
    for result in torch.load(tmp_path / "results"):
        torch.testing.assert_close(result, attended(block_mask, score_mod))


def _child(connection: Any, block_mask: BlockMask, score_mod: Any) -> None:
    connection.send(attended(block_mask, score_mod).tolist())
    connection.close()


def test_a_spawned_process_takes_masks_as_arguments() -> None:
    block_mask, score_mod = made(masks.sliding_window(20)), mods.softcap(2.0)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(there, block_mask, score_mod))
    process.start()
    assert here.poll(300)
    received = torch.tensor(here.recv())
    process.join(60)
    assert process.exitcode == 0
    torch.testing.assert_close(received, attended(block_mask, score_mod))
