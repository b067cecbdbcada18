"""What `inspect` says of elements is what the attention call makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flexattn
from flexattn import BlockMask, create_block_mask, create_mask, flex_attention, inspection, masks, mods
from flexattn.block_mask_cells import EMPTY, FULL, PARTIAL

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + SLOPES[h] * (kv_idx - q_idx)


def by_batch(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx + b >= kv_idx) & (q_idx != 5)


def qkv(
    B: int = 2,
    H: int = 4,
    Hkv: int = 2,
    L: int = 40,
    S: int = 50,
    kv_batch: int | None = None,
    dtype: Any = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    kv = B if kv_batch is None else kv_batch
    made = torch.randn(B, H, L, 8), torch.randn(kv, Hkv, S, 8), torch.randn(kv, Hkv, S, 6)
    return made[0].to(dtype), made[1].to(dtype), made[2].to(dtype)


def listed() -> BlockMask:
    """Lists that say other than the mask: row 0 lists nothing, row 1 a partial and a full block, row 2 a partial one."""
    partial = (
        torch.tensor([[[0, 1, 1]]], dtype=torch.int32),
        torch.tensor([[[[0, 0], [2, 0], [1, 0]]]], dtype=torch.int32),
    )
    full = torch.tensor([[[0, 1, 0]]], dtype=torch.int32), torch.tensor([[[[0, 0], [0, 0], [0, 0]]]], dtype=torch.int32)
    return BlockMask.from_kv_blocks(*partial, *full, (16, 20), by_batch, seq_lengths=(40, 50))


CALLS: dict[str, Callable[[], tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]]] = {
    "plain": lambda: (qkv(Hkv=4), {}),
    "grouped heads and a mod": lambda: (qkv(), {"score_mod": alibi, "enable_gqa": True, "scale": 0.7}),
    "one key for the batch": lambda: (qkv(kv_batch=1), {"score_mod": alibi, "mask_mod": by_batch, "enable_gqa": True}),
    "lists": lambda: (qkv(), {"block_mask": listed(), "enable_gqa": True}),
    "lists without a mask": lambda: (
        qkv(Hkv=4),
        {"block_mask": BlockMask.from_kv_blocks(*listed().kv_lists()[:2], None, None, (16, 20), seq_lengths=(40, 50))},
    ),
    "lists of each batch entry": lambda: (
        qkv(Hkv=4),
        {"block_mask": create_block_mask(by_batch, 2, None, 40, 50, "cpu", 16), "score_mod": mods.softcap(2.0)},
    ),
    "one element": lambda: (qkv(L=1, S=1), {"enable_gqa": True}),
    "no keys": lambda: (qkv(S=0), {"score_mod": alibi, "enable_gqa": True}),
    "no queries": lambda: (qkv(L=0), {"score_mod": alibi, "mask_mod": masks.causal_mask, "enable_gqa": True}),
    "score of -inf": lambda: (
        qkv(Hkv=4),
        {"score_mod": lambda s, b, h, i, j: torch.where((i + j) % 3 == 0, s, -torch.inf), "mask_mod": by_batch},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_weights_times_values_are_the_output(name: str) -> None:
    (q, k, v), given = CALLS[name]()
    out, lse = flex_attention(q, k, v, return_lse=True, **given)
    for b, h in ((0, 0), (1, 2), (0, 3)):
        found = flexattn.inspect(q, k, v, b=b, h=h, **given)
        values = v[b % v.shape[0], h // (q.shape[1] // v.shape[1])]
        torch.testing.assert_close(found.weight @ values, out[b, h], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found.lse, lse[b, h], rtol=1e-12, atol=1e-13)
        assert found.shape == (*q.shape[:3], k.shape[2]) and found.weight.shape == found.shape[2:]
        assert bool((found.weight[~found.mask] == 0).all())
        sums = found.weight.sum(-1)
        torch.testing.assert_close(sums, (found.lse > -torch.inf).double())


def test_scores_masks_and_blocks_are_those_of_the_call() -> None:
    q, k, v = qkv()
    found = flexattn.inspect(q, k, v, alibi, block_mask=listed(), enable_gqa=True, b=1, h=3)
    raw = q[1, 3] @ k[1, 1].mT / math.sqrt(8)
    torch.testing.assert_close(found.score, raw)
    torch.testing.assert_close(found.modified, raw + 0.0625 * (torch.arange(50) - torch.arange(40).view(-1, 1)))
    dense = create_mask(by_batch, 2, 1, 40, 50, "cpu")[1, 0]
    kinds = torch.full((3, 3), EMPTY)
    kinds[1, 2] = kinds[2, 1] = PARTIAL
    kinds[1, 0] = FULL
    block = kinds.repeat_interleave(16, 0).repeat_interleave(20, 1)[:40, :50]
    assert torch.equal(found.mask_mod, dense) and torch.equal(found.block.long(), block)
    assert torch.equal(found.mask, (block == FULL) | (block == PARTIAL) & dense)


def test_a_mask_mod_has_the_blocks_that_the_call_builds() -> None:
    q, k, _ = qkv(H=1, Hkv=1, L=300, S=300)
    found = flexattn.inspect(q, k, mask_mod=masks.causal_mask, q_idx=[0, 200], kv_idx=[0, 100, 260])
    assert found.block.tolist() == [[PARTIAL, PARTIAL, EMPTY], [FULL, FULL, EMPTY]]
    assert flexattn.inspect(q, k, q_idx=3, kv_idx=3).block.item() == FULL


SELECTIONS: dict[str, tuple[Any, list[int] | int]] = {
    "int": (3, 3),
    "from the end": (-1, 39),
    "slice": (slice(2, 30, 7), [2, 9, 16, 23]),
    "slice beyond": (slice(38, 100), [38, 39]),
    "range": (range(4, 0, -2), [4, 2]),
    "list": ([5, -40, 5], [5, 0, 5]),
    "tensor": (torch.tensor([7, -2]), [7, 38]),
    "0-d tensor": (torch.tensor(7), 7),
    "number of another type": (np.int64(7), 7),
    "none": (None, list(range(40))),
    "empty": ([], []),
}


@pytest.mark.parametrize("columns", ["int", "list", "none"])
@pytest.mark.parametrize("rows", SELECTIONS)
def test_selections_pick_from_the_whole(rows: str, columns: str) -> None:
    q, k, v = qkv(S=40)
    (q_idx, wanted_q), (kv_idx, wanted_kv) = SELECTIONS[rows], SELECTIONS[columns]
    given: dict[str, Any] = {"score_mod": alibi, "mask_mod": by_batch, "enable_gqa": True, "b": -1, "h": 2}
    whole = flexattn.inspect(q, k, v, **given)
    found = flexattn.inspect(q, k, v, q_idx=q_idx, kv_idx=kv_idx, **given)
    assert (found.b, found.h) == (1, 2)
    assert found.q_idx == (wanted_q if isinstance(wanted_q, int) else tuple(wanted_q))
    assert found.kv_idx == (wanted_kv if isinstance(wanted_kv, int) else tuple(wanted_kv))
    pick = torch.tensor(wanted_q, dtype=torch.int64), torch.tensor(wanted_kv, dtype=torch.int64)
    for name in ("score", "modified", "mask", "mask_mod", "block", "weight"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name)[pick[0]][..., pick[1]])
    torch.testing.assert_close(found.lse, whole.lse[pick[0]])


def test_rows_are_taken_as_many_at_a_time_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    given: dict[str, Any] = {"score_mod": alibi, "block_mask": listed(), "enable_gqa": True}
    whole = flexattn.inspect(q, k, v, **given)
    sizes: list[int] = []
    solved = inspection._solved
    monkeypatch.setattr(inspection, "_AT_ONCE", 300)
    monkeypatch.setattr(
        inspection, "_solved", lambda p, b, h, rows, score: sizes.append(len(rows)) or solved(p, b, h, rows, score)
    )
    torch.testing.assert_close(flexattn.inspect(q, k, v, **given).weight, whole.weight)
    assert sizes == [6] * 6 + [4]


def test_inputs_of_lower_precision_are_taken_as_they_are() -> None:
    q, k, v = qkv(dtype=torch.bfloat16)
    found = flexattn.inspect(q, k, v, alibi, enable_gqa=True)
    exact = flexattn.inspect(q.double(), k.double(), v.double(), alibi, enable_gqa=True)
    assert torch.equal(found.weight, exact.weight) and found.weight.dtype is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        rounded = flexattn.inspect(q.float() * 1.001, k.float(), v.float(), alibi, enable_gqa=True)
    again = (q.float() * 1.001).to(torch.bfloat16)
    assert torch.equal(rounded.score, flexattn.inspect(again, k, v, alibi, enable_gqa=True).score)


def test_nothing_is_recorded_for_gradients() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(Hkv=4))
    slopes = SLOPES.clone().requires_grad_()
    found = flexattn.inspect(q, k, v, lambda s, b, h, i, j: s * slopes[h])
    assert not any(t.requires_grad for t in (found.score, found.modified, found.weight, found.lse))


def test_a_nan_is_shown_as_the_call_has_it() -> None:
    q, k, v = qkv(B=1, H=1, Hkv=1, L=4, S=4)
    mod = lambda s, b, h, i, j: torch.where((i == 2) & (j == 1), torch.nan, s)
    found = flexattn.inspect(q, k, v, mod)
    torch.testing.assert_close(found.weight @ v[0, 0], flex_attention(q, k, v, mod)[0, 0], equal_nan=True)
    assert found.weight[2].isnan().all() and found.to_dict()["weight"][2] == ["nan"] * 4


# ---- single elements, as text and as JSON


def test_an_element_tells_how_its_score_came_about() -> None:
    q, k = torch.ones(1, 4, 8, 4), torch.ones(1, 2, 8, 4)
    found = flexattn.inspect(q, k, None, alibi, masks.causal_mask, enable_gqa=True, h=1, q_idx=6, kv_idx=2)
    lines = [(o.role, o.name, o.text, o.read, o.value) for o in found.operations]
    assert lines == [
        ("score_mod", "t0", "kv_idx - q_idx", "", -4),
        ("score_mod", "", "SLOPES[h]", "SLOPES[1]", 0.25),
        ("score_mod", "t1", "t0 * SLOPES[h]", "", -1.0),
        ("score_mod", "t2", "score + t1", "", 1.0),
        ("mask_mod", "t3", "q_idx >= kv_idx", "", True),
    ]
    first, *facts = str(found).splitlines()
    assert first == "b=0, h=1, q_idx=6, kv_idx=2"
    said = {line.split()[0]: " ".join(line.split()[1:]) for line in facts[:7]}
    assert said["score"] == "2" and said["modified"] == "1" and said["mask"] == "True: attended"
    assert said["weight"] == f"{found.weight.item():.6g}" and said["lse"] == f"{found.lse.item():.6g} of the row"
    assert "  SLOPES[h] = SLOPES[1] = 0.25" in facts and "  t2 = score + t1 = 1" in facts
    assert any(line.startswith("score_mod `alibi` at test_inspection.py:") for line in facts)
    assert repr(found) == "<Inspection of b=0, h=1, [] elements; print() it>"


def test_an_index_of_any_type_is_one_element() -> None:
    q, k, v = qkv()
    given: dict[str, Any] = {"score_mod": alibi, "enable_gqa": True}
    expected = flexattn.inspect(q, k, v, q_idx=5, kv_idx=3, **given)
    for five in (torch.tensor(5), np.int64(5)):
        found = flexattn.inspect(q, k, v, q_idx=five, kv_idx=3, **given)
        assert str(found) == str(expected) and found.operations == expected.operations != ()


def test_an_index_beyond_a_tensor_is_shown_with_what_is_read() -> None:
    short = torch.arange(3.0)
    q = torch.ones(1, 1, 8, 4)
    found = flexattn.inspect(q, q, None, lambda s, b, h, i, j: s + short[i], q_idx=7, kv_idx=0)
    assert "short[q_idx] = short[2] (for [7], out of range) = 2" in str(found)


def test_long_programs_are_cut() -> None:
    features = torch.ones(8, 60)
    q = torch.ones(1, 1, 8, 4)
    found = flexattn.inspect(q, q, None, lambda s, b, h, i, j: s + (features[i] * features[j]).sum(), q_idx=7, kv_idx=0)
    assert len(found.operations) > 100 and f"and {len(found.operations) - 40} more operations" in str(found)


def test_a_tile_is_a_table() -> None:
    q, k, _ = qkv(B=1, H=1, Hkv=1, L=200, S=200)
    found = flexattn.inspect(q, k, None, alibi, masks.causal_mask, q_idx=range(126, 130), kv_idx=[0, 127, 128, 129])
    head, mod, mask, names, *rows, legend = str(found).splitlines()
    assert head == "weights of b=0, h=0: 4 of 200 queries, 4 of 200 keys"
    assert names.split() == ["q_idx", "kv", "0", "kv", "127", "kv", "128", "kv", "129", "lse"]
    assert mod.startswith("score_mod `alibi`") and mask.startswith("mask_mod") and legend.startswith("·")
    assert rows[0].split()[0] == "126" and rows[0].count("·") == 1 and rows[2].count("·") == 1 and "·" not in rows[3]
    assert rows[3].split()[1:] == [f"{x:.4g}" for x in (*found.weight[3].tolist(), found.lse[3].item())]
    whole = str(flexattn.inspect(q, k)).splitlines()
    assert len(whole) == 16 and "…" in whole[1] and whole[-2].strip() == "…"


@pytest.mark.parametrize("place", [{}, {"q_idx": 5, "kv_idx": 3}, {"q_idx": 1}])
def test_it_is_json(place: dict[str, int]) -> None:
    q, k, v = qkv()
    found = flexattn.inspect(q, k, v, alibi, by_batch, enable_gqa=True, **place)
    made = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(made) == set(found.__dataclass_fields__)
    assert made["mask"] == found.mask.tolist() and made["score"] == found.score.tolist()
    expected = found.lse.tolist()
    floats = lambda x: [float(y) for y in x] if isinstance(x, list) else float(x)
    assert floats(made["lse"]) == expected
    assert [o["text"] for o in made["operations"]] == [o.text for o in found.operations]


# ---- refusals


def test_bad_arguments_say_what_to_write_instead() -> None:
    q, k, v = qkv(Hkv=4)
    for given, error, message in (
        ({"q_idx": 40}, IndexError, r"q_idx=40 is out of range; valid: 0 to 39, or -40 to -1 from the end"),
        ({"kv_idx": [0, -51]}, IndexError, r"an entry of kv_idx=-51 is out of range; valid: 0 to 49"),
        ({"b": 2}, IndexError, r"b=2 is out of range; valid: 0 to 1"),
        ({"h": 1.0}, TypeError, r"h is 1.0; it must be an int"),
        ({"q_idx": 1.5}, TypeError, r"q_idx is a float; choose by an int, a slice, a range, a list of ints, or None"),
        ({"q_idx": True}, TypeError, r"q_idx is a bool"),
        ({"mask_mod": by_batch, "block_mask": listed()}, ValueError, "both block_mask and mask_mod"),
        ({"block_mask": by_batch}, TypeError, "a mask function is passed as mask_mod="),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale is a Tensor"),
    ):
        with pytest.raises(error, match=message):
            flexattn.inspect(q, k, v, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="enable_gqa=True"):
        flexattn.inspect(*qkv())
    with pytest.raises(IndexError, match="valid: none, there is nothing"):
        flexattn.inspect(*qkv(Hkv=4, L=0), q_idx=0)
    with pytest.raises(TypeError, match="query is a NoneType"):
        flexattn.inspect(None, k)  # type: ignore[arg-type]


def test_what_would_be_gigantic_is_refused_and_a_part_of_it_is_not() -> None:
    q = torch.zeros(1, 1, 1 << 20, 1)
    with pytest.raises(ValueError, match=r"1048576 queries and 1048576 keys .* at most 16777216 at once; choose fewer"):
        flexattn.inspect(q, q)
    found = flexattn.inspect(
        q, q, None, None, masks.sliding_window(1 << 10), q_idx=[1 << 19], kv_idx=slice(1 << 19, None)
    )
    assert found.weight.shape == (1, 1 << 19) and found.weight[0, 0].item() == pytest.approx(2.0**-10)


def test_tensors_without_numbers_are_refused() -> None:
    meta = torch.empty(1, 1, 4, 4, device="meta")
    with pytest.raises(TypeError, match="tensors with numbers in them"):
        flexattn.inspect(meta, meta)
    q = torch.ones(1, 1, 4, 4)
    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.func.grad(lambda q: flexattn.inspect(q, q).weight.sum())(q)
