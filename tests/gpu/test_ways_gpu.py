"""Every way through the kernels on a GPU: by pointers and by TMA, one pass and two, divided groups, orders of programs.

Each is right by float64, and what says that it changes no result changes none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from gpu.cases import DEVICE, Case, Results, assert_results, assert_right, qkv
from gpu.test_attention_gpu import LENGTH as LONG
from gpu.test_attention_gpu import VARIANTS
from torch import Tensor

from flexattn import BlockMask, and_masks, create_block_mask, masks, mods
from flexattn.backends import agreement, descriptors, plans, work_order

B, H, HKV, LENGTH = 2, 4, 2, 333  # no multiple of any tile
NAMES = ("out", "lse", "max_scores", "dq", "dk", "dv")
TWO = {"ONE_PASS": False}
WAYS: dict[str, dict[str, Any]] = {
    "pointers": {"USE_TMA": False, **TWO},
    "tma": {"USE_TMA": True, "OVERLAP": False, "UPRIGHT": False, **TWO},
    "overlap": {"USE_TMA": True, "OVERLAP": True, **TWO},
    "upright": {"USE_TMA": True, "UPRIGHT": True, **TWO},
    "upright, pointers": {"USE_TMA": False, "UPRIGHT": True, **TWO},
    "one pass": {"USE_TMA": True, "UPRIGHT": False, "ONE_PASS": True},
    "one pass, pointers": {"USE_TMA": False, "UPRIGHT": False, "ONE_PASS": True},
    "one pass, upright": {"USE_TMA": True, "UPRIGHT": True, "ONE_PASS": True},
}
IN_TWO = [name for name, options in WAYS.items() if not options["ONE_PASS"]]
FEW = ["pointers", "overlap", "upright", "one pass", "one pass, upright"]  # where every way would take long to compile


def from_40_on(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Causal; the first rows attend to nothing."""
    return (q_idx >= kv_idx) & (q_idx >= 40)


def window_of_each_head(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Lists of blocks that differ from head to head; the first attends to itself alone."""
    return abs(q_idx - kv_idx) <= 60 * h


def fixed_alibi(heads: int) -> Callable[[], Any]:
    """A score_mod without learned tensors, which a backward in one pass could not collect gradients of."""
    slopes = mods.alibi_slopes(heads, DEVICE)
    return lambda: mods.alibi(slopes)


def alibi_case(way: str, **more: Any) -> Case:
    heads = more.setdefault("H", H)
    sizes = {"B": B, "Hkv": HKV, "L": LENGTH} | more
    return Case(*qkv(**sizes), mask=from_40_on, score=fixed_alibi(heads), options=WAYS[way])


def named(mask: Any, length: int, heads: int | None = None) -> BlockMask:
    return create_block_mask(mask, None, heads, length, length, DEVICE)


def differing(found: Results, expected: Results) -> list[str]:
    return [name for name in NAMES if not torch.equal(found[name], expected[name])]


def assert_agree(found: Results, expected: Results) -> None:
    """Equal but for rounding."""
    for name in NAMES:
        assert agreement.agree([found[name]], [expected[name]], "half"), name


@pytest.fixture
def orders() -> Iterator[list[Any]]:
    """The orders that programs got from here on."""
    given: list[Any] = []
    longest_first = work_order.longest_first

    def spy(*args: Any, **more: Any) -> Any:
        given.append(longest_first(*args, **more))
        return given[-1]

    with patch.object(work_order, "longest_first", spy), plans.whole_way():
        yield given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("E", [64, 72, 96, 128, 256])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_right_at_every_head_size(way: str, E: int, dtype: torch.dtype) -> None:
    case = alibi_case(way, E=E, dtype=dtype)
    results = case.run()
    for name in ("out", "dq"):
        assert not results[name][:, :, :40].any(), name
    assert (results["lse"][:, :, :40] == -math.inf).all()
    assert_results(case, results)


LEARNED = ("alibi", "learned softcap", "relative bias", "row and column")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in LEARNED])
@pytest.mark.parametrize("way", FEW)
def test_every_way_is_right_for_every_variant(way: str, variant: str) -> None:
    assert_right(Case(*qkv(B, H, HKV, L=LONG), **VARIANTS[variant](), options=WAYS[way]))


@pytest.mark.parametrize(("L", "S"), [(1, 1), (1, 700), (127, 129), (129, 127), (700, 257)], ids=str)
@pytest.mark.parametrize("way", FEW)
def test_every_way_is_right_at_any_two_lengths(way: str, L: int, S: int) -> None:
    assert_right(Case(*qkv(1, 2, L=L, S=S), mask=masks.causal(S - L), options=WAYS[way]))
    assert_right(Case(*qkv(1, 2, L=L, S=S), options=WAYS[way]))


@pytest.mark.parametrize("way", FEW)
@pytest.mark.parametrize(("E", "Ev"), [(64, 128), (192, 128)])
def test_values_of_another_head_size(way: str, E: int, Ev: int) -> None:
    assert_right(alibi_case(way, E=E, Ev=Ev))


@pytest.mark.parametrize("way", FEW)
@pytest.mark.parametrize(("heads", "parts"), [(8, 8), (6, 4)])
def test_a_group_divided_among_programs_gives_all_of_its_gradients(
    way: str, heads: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans.clear()  # of calls in another number of parts
    monkeypatch.setattr(work_order, "splits", lambda *args: parts)  # 4 parts of 6 heads: not all work for as many
    with plans.whole_way():
        assert_right(alibi_case(way, B=1, H=heads, Hkv=1))
        mask = {"mask": window_of_each_head, "block_mask": named(window_of_each_head, LENGTH, heads)}
        assert_right(Case(*qkv(1, heads, 1, L=LENGTH), **mask, options=WAYS[way]))


def test_few_programs_are_divided_by_themselves() -> None:
    q, k, v = qkv(1, 16, 1, L=LENGTH)
    assert work_order.splits(LENGTH, 1, 16, q.device) > 1
    assert_right(Case(q, k, v, mask=masks.causal_mask, options=TWO))


@pytest.mark.parametrize("way", FEW)
def test_lists_of_each_head_are_ordered_by_their_own_lengths(way: str, orders: list[Any]) -> None:
    mask = and_masks(window_of_each_head, lambda b, h, q_idx, kv_idx: q_idx >= kv_idx * b)
    block_mask = create_block_mask(mask, B, H, LONG, LONG, DEVICE)
    case = Case(*qkv(B, H, HKV, L=LONG), mask=mask, block_mask=block_mask, options=WAYS[way])
    results = case.run()
    assert orders and all(order.stride_b > 0 and order.stride_h > 0 for order in orders)
    assert_results(case, results)


@pytest.mark.parametrize("way", IN_TWO)
def test_the_order_of_programs_changes_no_bit(way: str) -> None:
    # Of query heads whose lists are longer for later ones, so that the order is none of those that programs have anyway.
    case = Case(*qkv(B, H, HKV, L=LONG), mask=window_of_each_head, options=WAYS[way])
    with plans.whole_way():
        expected = case.run()
        with patch.object(work_order, "longest_first", lambda *args, **more: None):
            assert differing(case.run(), expected) == []
        with patch.object(work_order, "together", lambda *args: 1):
            assert differing(case.run(), expected) == []


@pytest.mark.parametrize("E", [64, 128])
@pytest.mark.parametrize("way", IN_TWO)
def test_two_passes_give_the_same_bits_in_every_run(way: str, E: int) -> None:
    case = alibi_case(way, E=E, L=LONG)
    expected = case.run()
    for _ in range(10):  # the later ones by a plan
        assert differing(case.run(), expected) == []


@pytest.mark.parametrize("E", [64, 128])
def test_deterministic_means_two_passes(E: int) -> None:
    case = alibi_case("pointers", E=E, L=LONG)
    case.options = TWO
    expected = case.run()
    case.options = {"DETERMINISTIC": True}
    assert differing(case.run(), expected) == []
    case.options = None
    torch.use_deterministic_algorithms(True)
    try:
        assert differing(case.run(), expected) == []
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("E", [64, 96, 128])
@pytest.mark.parametrize("way", [name for name in WAYS if name not in IN_TWO])
def test_one_pass_agrees_with_two_up_to_rounding(way: str, E: int) -> None:
    case = alibi_case(way, E=E, L=LONG)
    one = [case.run() for _ in range(5)]
    case.options = {**WAYS[way], **TWO}
    two = case.run()
    for found in one:
        assert_agree(found, two)
        assert differing({**found, "dq": two["dq"], "dk": two["dk"], "dv": two["dv"]}, two) == [], (
            "one forward for both"
        )


def transposed(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def one_head_for_all(t: Tensor) -> Tensor:
    return t[:, :1].expand_as(t)


def one_entry_for_all(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


def columns_of_a_wider_one(t: Tensor) -> Tensor:
    return torch.cat([t, t], -1)[..., 8 : 8 + t.shape[-1]]


@pytest.mark.parametrize(
    "layout", [transposed, one_head_for_all, one_entry_for_all, columns_of_a_wider_one], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_reads_any_layout_that_a_descriptor_has(way: str, layout: Callable[[Tensor], Tensor]) -> None:
    case = alibi_case(way)
    case.query, case.key, case.value, case.dout = (layout(t) for t in (case.query, case.key, case.value, case.dout))
    assert all(map(descriptors.describable, (case.query, case.key, case.value, case.dout)))
    assert not all(t.is_contiguous() for t in (case.query, case.key, case.value, case.dout))
    assert_right(case)


def odd_offset(t: Tensor) -> Tensor:
    return torch.cat([t, t], -1)[..., 3 : 3 + t.shape[-1]]


def odd_rows(t: Tensor) -> Tensor:
    return torch.cat([t, t[..., :1]], -1)[..., :-1]


def columns_apart(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def one_row_for_all(t: Tensor) -> Tensor:
    return t[:, :, :1].expand_as(t)


# Equal rows of keys, or of values, would leave gradients that are nothing but rounding.
UNDESCRIBABLE = [(f, n) for f in (odd_offset, odd_rows, columns_apart) for n in ("query", "key", "value", "dout")]
UNDESCRIBABLE += [(one_row_for_all, "query"), (one_row_for_all, "dout")]


@pytest.mark.parametrize(("layout", "name"), UNDESCRIBABLE, ids=lambda x: getattr(x, "__name__", x))
def test_what_no_descriptor_can_describe_is_read_by_pointers_or_refused(
    layout: Callable[[Tensor], Tensor], name: str
) -> None:
    case = alibi_case("tma")
    setattr(case, name, layout(getattr(case, name)))
    assert not descriptors.describable(getattr(case, name))
    if name == "dout":  # which is copied: nobody chooses its layout
        assert_right(case)
    else:
        with pytest.raises(ValueError, match=f'"USE_TMA": True}} cannot be followed: {name} '):
            case.run()
    free = {"OVERLAP": False, "UPRIGHT": False, **TWO}
    case.options = free
    results = case.run()
    assert_results(case, results)
    case.options = {**free, "USE_TMA": False}
    pointers = case.run()
    if name != "dout":  # with an odd dout alone, the forward still reads by descriptors
        assert differing(results, pointers) == []
    assert_agree(results, pointers)
    for upright in (False, True):
        case.options = {"UPRIGHT": upright, "ONE_PASS": True}
        assert_right(case)


@pytest.mark.parametrize("E", [64, 72, 96, 128])
@pytest.mark.parametrize("way", WAYS)
def test_nan_around_the_operands_reaches_no_result(way: str, E: int) -> None:
    def surrounded(t: Tensor) -> Tensor:
        around = t.new_full((t.shape[0] + 2, t.shape[1] + 2, t.shape[2] + 256, t.shape[3] + 256), math.nan)
        inside = around[1:-1, 1:-1, 128:-128, 128:-128]
        return inside.copy_(t)

    case = alibi_case(way, E=E, L=257)  # one row in the last tile, whose others would be nan
    case.query, case.key, case.value, case.dout = (surrounded(t) for t in (case.query, case.key, case.value, case.dout))
    assert all(map(descriptors.describable, (case.query, case.key, case.value, case.dout)))
    results = case.run()
    assert all(results[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))
    assert_results(case, results)


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_of_forward_and_backward_sorts_at_each_replay(way: str, orders: list[Any]) -> None:
    case = alibi_case(way, E=64, L=LONG)
    case.block_mask = named(from_40_on, LONG)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are chosen before the capture
        case.run()
    torch.cuda.current_stream().wait_stream(side)
    assert orders and None not in orders
    orders.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = case.run()
    assert orders and None not in orders, "the same kernels as before the capture"
    for _ in range(3):  # what is added to starts from zero each time
        for t in (case.query, case.key, case.value, case.dout, case.dlse):
            t.copy_(torch.randn_like(t))
        graph.replay()
        assert_results(case, replayed)
        eager = case.run()
        assert_agree(replayed, eager)
        if way in IN_TWO:
            assert differing(replayed, eager) == []
