"""`mask_diff` says of two masks what brute force says, names where they differ, and stays small."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from strategies import Mod, environment, mask_mods, rich_masks
from torch.utils._python_dispatch import TorchDispatchMode

import flexattn
from flexattn import BlockMask, and_masks, create_block_mask, create_mask, masks
from flexattn.codegen.errors import TraceError
from flexattn.codegen.replay import Replay
from flexattn.testing import mask_diff
from flexattn.testing.traced_mask import TracedMask

sizes = st.tuples(st.integers(1, 2), st.sampled_from([1, 4]), st.integers(0, 150), st.integers(0, 150))
ids = torch.arange(200) // 30


def wide(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= 64)


@settings(max_examples=100)
@given(a=st.one_of(mask_mods(), rich_masks(2)), b=mask_mods(), shape=sizes, same=st.booleans())
def test_masks_are_compared_as_by_brute_force(a: Mod, b: Mod, shape: Any, same: bool) -> None:
    env = environment()
    one, two = a.bind(env), b.bind(env)
    if same:  # equal but for what one adds
        two = lambda *i: one(*i) & ~(b.bind(env)(*i) & (i[2] > 20))
    try:
        dense = [create_mask(m, *shape) for m in (one, two)]
        diff = mask_diff(one, two, shape)
    except (TraceError, IndexError):
        return  # a constant number is no mask, and a tensor shorter than the mask is refused
    except (
        RuntimeError,
        TypeError,
    ) as error:  # torch refuses a zero divisor, a negative power, and logic of Python's bools
        assert any(words in str(error) for words in ("ZeroDivision", "negative", "must be Tensor, not bool")), error
        return
    differ = dense[0] ^ dense[1]
    assert diff.count == int(differ.sum()) and diff.equal == (diff.count == 0) == (diff.counterexample is None)
    if diff.counterexample is not None:
        assert list(diff.counterexample[:4]) == differ.nonzero()[0].tolist()
        at = tuple(diff.counterexample[:4])
        assert diff.counterexample[4:] == (bool(dense[0][at]), bool(dense[1][at]))


def test_the_report_names_masks_number_and_place() -> None:
    text = str(mask_diff(wide, masks.sliding_window(64), (2, 1, 256, 256)))
    assert "A  `wide` at test_mask_diff.py:" in text and "B  sliding_window(size=64)" in text
    assert "differ in 384 of 131,072 elements of (B, H, Q_LEN, KV_LEN) = (2, 1, 256, 256)" in text
    assert "first at b=0, h=0, q_idx=64, kv_idx=0: A attends, B does not" in text


def test_the_picture_shows_the_elements_around_the_first_difference() -> None:
    diff = mask_diff(masks.sliding_window(3), masks.window(2, 1), 6)
    assert diff.picture == "\n".join(
        [
            "kv_idx 0 to 5",
            "> q_idx 0  1B....",
            "  q_idx 1  11B...",
            "  q_idx 2  111B..",
            "  q_idx 3  .111B.",
            "  q_idx 4  ..111B",
            "  q_idx 5  ...111",
            "1 both attend   . neither",
            "A only A        B only B",
        ]
    )


def test_a_long_mask_has_a_map_of_where_it_differs() -> None:
    diff = mask_diff(masks.causal_mask, and_masks(masks.causal_mask, lambda b, h, q, k: k >= 1024), 2048)
    around, _, drawn = diff.picture.partition("\n\n")
    assert "> q_idx  0  A...." in around
    rows = [line.strip() for line in drawn.splitlines() if line.startswith("  ")]
    assert len(rows) == 12 and all(len(row) == 16 for row in rows), rows
    assert [row[:8].count(".") for row in rows][6:] == [0] * 6 and {row[8:] for row in rows} == {"........"}
    assert rows[0][0] == "+" and rows[-1][:8] == "########"
    assert all(len(line) <= 42 for line in diff.picture.splitlines())


def test_equal_masks_are_proved_or_compared() -> None:
    proved = mask_diff(wide, masks.sliding_window(65), 100)
    assert proved.equal and proved.proved and proved.picture == "" and "for every shape" in str(proved)
    plain = mask_diff(masks.document_mask(ids), masks.document_mask(ids * 3 - 8), 200)
    assert plain.equal and not plain.proved and "in every element of" in str(plain)


def test_tensors_of_equal_values_are_one_to_a_proof() -> None:
    assert mask_diff(masks.document_mask(ids), masks.document_mask(ids.clone()), 200).proved
    assert not mask_diff(masks.document_mask(ids), masks.document_mask(ids.int()), 200).proved
    table = torch.rand(200)

    def above(limit: float, scale: float) -> Any:
        return lambda b, h, q, k: table[q] * scale > limit

    assert mask_diff(above(0.5, 1.5), above(0.5, 1.5), 200).proved
    assert not mask_diff(above(0.5, 1.5), above(0.5, 1.25), 200).equal
    signed = [torch.zeros(200), -torch.zeros(200)]
    inverse = [lambda b, h, q, k, z=z: 1 / z[q] > 0 for z in signed]
    assert mask_diff(*inverse, 3).count == 9  # zeros of either sign are not one tensor


def test_what_is_proved_still_holds_where_integers_wrap() -> None:
    grown = lambda b, h, q, k: q * 10_000_000 - k * 10_000_000 >= 0
    assert mask_diff(grown, masks.causal_mask, 200).proved
    diff = mask_diff(grown, masks.causal_mask, 300)  # 300 * 10,000,000 is beyond int32
    differ = create_mask(grown, None, None, 300, 300) ^ create_mask(masks.causal_mask, None, None, 300, 300)
    assert not diff.equal and not diff.proved and diff.count == int(differ.sum()) > 0
    assert diff.counterexample is not None and list(diff.counterexample[:4]) == differ.nonzero()[0].tolist()


def test_masks_that_depend_on_batch_and_head_are_compared_for_all() -> None:
    lengths = torch.tensor([9, 17])
    one, two = masks.padding(lengths), lambda b, h, q, k: k < torch.where(h == 3, lengths[b] + 1, lengths[b])
    diff = mask_diff(one, two, (2, 4, 30, 30))
    assert diff.count == 60 and diff.counterexample == (0, 3, 0, 9, False, True)
    assert mask_diff(one, two, (2, 3, 30, 30)).equal
    assert mask_diff(masks.causal_mask, masks.noop_mask, (5, 7, 30, 30)).count == 35 * 435


def test_block_masks_are_compared_by_what_they_attend_to() -> None:
    exact = create_block_mask(masks.causal_mask, None, None, 300, 300, device="cpu", BLOCK_SIZE=64)
    assert mask_diff(exact, masks.causal_mask).proved
    whole = BlockMask.from_kv_blocks(*exact.kv_lists()[:2], BLOCK_SIZE=64, seq_lengths=(300, 300))
    diff = mask_diff(masks.causal_mask, whole)
    dense = create_mask(masks.causal_mask, None, None, 300, 300)
    listed = (torch.arange(300).view(-1, 1) // 64 == torch.arange(300) // 64).expand_as(dense)
    assert diff.count == int((dense ^ listed).sum()) and diff.names[1] == "BlockMask of noop_mask, by its lists"


def test_sizes_that_do_not_fit_are_refused() -> None:
    mask = create_block_mask(masks.causal_mask, None, None, 256, 128, device="cpu")
    with pytest.raises(ValueError, match=r"\(Q_LEN, KV_LEN\) = \(256, 128\), the shape says \(256, 256\)"):
        mask_diff(mask, masks.causal_mask, 256)
    padded = masks.padding(torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="for B = 2, the shape says 3"):
        mask_diff(create_block_mask(padded, 2, None, 256, 256, device="cpu"), padded, (3, 1, 256, 256))
    with pytest.raises(ValueError, match="for B = 1, the shape says 2"):
        mask_diff(create_block_mask(padded, 1, None, 256, 256, device="cpu"), padded, (2, 1, 256, 256))
    with pytest.raises(TypeError, match="needs a shape"):
        mask_diff(masks.causal_mask, masks.causal_mask)
    with pytest.raises(TypeError, match="mask_diff takes mask functions"):
        mask_diff(torch.ones(3, 3).bool(), masks.causal_mask, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape is -1"):
        mask_diff(masks.causal_mask, masks.causal_mask, -1)
    with pytest.raises(IndexError):
        mask_diff(masks.document_mask(ids), masks.causal_mask, 300)


def test_a_difference_as_plain_values_is_json() -> None:
    diff = mask_diff(wide, masks.sliding_window(64), 100)
    found = json.loads(json.dumps(diff.to_dict()))
    assert found["count"] == 36 and found["shape"] == [1, 1, 100, 100]
    assert found["counterexample"] == {"b": 0, "h": 0, "q_idx": 64, "kv_idx": 0, "in_a": True, "in_b": False}
    assert mask_diff(wide, wide, 100).to_dict()["counterexample"] is None


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes, in bytes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.untyped_storage().nbytes())
        return result


def test_long_masks_are_compared_in_little_memory() -> None:
    with Largest() as most:
        diff = mask_diff(wide, masks.sliding_window(64), 16_384, max_memory=16 << 20)
        whole = mask_diff(masks.causal_mask, masks.noop_mask, 131_072, max_memory=16 << 20)
    assert diff.count == 16_384 - 64 and diff.counterexample is not None and diff.counterexample[:4] == (0, 0, 64, 0)
    assert whole.count == 131_072 * 131_071 // 2
    assert 1 << 16 < most.size < 16 << 20  # a byte for each element of the longer one is 16 GiB


def test_a_graph_is_a_mask_function_again() -> None:
    small = torch.rand(9)
    traced = TracedMask.of(and_masks(masks.document_mask(ids), lambda b, h, q, k: small[h] * 0.5 < 2.0))
    again = traced.mask_mod
    assert isinstance(again, Replay) and "c0[q_idx] == c0[kv_idx]" in repr(again)
    expected = create_mask(masks.document_mask(ids), 2, 3, 200, 200)
    assert torch.equal(create_mask(again, 2, 3, 200, 200), expected)
    block_mask = create_block_mask(again, None, 3, 200, 200, device="cpu")
    assert mask_diff(block_mask, masks.document_mask(ids)).equal
    index = [torch.tensor(i) for i in (0, 1, 31, 59)]
    assert bool(again(*index)) and not bool(again(*index[:3], torch.tensor(60)))
    q = torch.randn(1, 3, 200, 8)
    out = flexattn.flex_attention(q, q, q, mask_mod=again)
    assert torch.equal(out, flexattn.flex_attention(q, q, q, mask_mod=masks.document_mask(ids)))


def test_a_tensor_that_is_too_short_has_its_own_name() -> None:
    short = torch.zeros(30, dtype=torch.int32)
    other = torch.zeros(40, dtype=torch.int32)
    reads = lambda b, h, q, k: (other[q] == other[k]) & (short[k] == 0)
    with pytest.raises(IndexError, match=r"reads short, a captured tensor of shape \[30\], at short\[kv_idx\]"):
        mask_diff(reads, masks.causal_mask, 40)
    assert not mask_diff(reads, masks.causal_mask, 30).equal


def test_masks_of_batch_entries_and_heads_need_their_numbers() -> None:
    second = lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) | (h == 1)
    third = lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) | (b == 2)
    for mask, name in ((second, "head h"), (third, "batch entry b")):
        with pytest.raises(ValueError, match=rf"depends on the {name}.*give shape=\(B, H, Q_LEN, KV_LEN\)"):
            mask_diff(mask, masks.causal_mask, 40)
        assert mask_diff(mask, masks.causal_mask, (3, 2, 40, 40)).count > 0
    # A difference that is there, and a proof for all of them, need no number.
    assert mask_diff(lambda b, h, q, k: (q >= k) | (h == 0), masks.causal_mask, 40).count > 0
    assert mask_diff(second, lambda b, h, q, k: (h == 1) | (k <= q), 40).proved
