"""Plans against the whole way: the same launches with the same arguments, whatever changes between calls.

Collected in a process of its own by test_plans.py.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import triton
from fake_calls import Case, Device, causal, causal_mask, use_fake_device
from torch import Tensor

from flexattn.backends import captured_gradients, plans
from flexattn.block_mask import BlockMask
from flexattn.templates.backward_delta import attention_delta
from flexattn.templates.backward_dkdv import attention_backward_dkdv
from flexattn.templates.backward_dq import attention_backward_dq
from flexattn.templates.forward import attention_forward


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_device(monkeypatch)


@pytest.mark.parametrize("L", [256, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_calls_with_other_tensors_are_done_by_the_plan(masked: bool, L: int) -> None:
    case = Case(L, mask=causal_mask(L) if masked else None)
    case.warm()
    kept_alive = []
    for _ in range(3):
        kept_alive.append((case.q, case.k, case.v))
        case.q, case.k, case.v = (torch.randn_like(t).requires_grad_() for t in (case.q, case.k, case.v))
        case.mask = causal_mask(L) if masked else None
        case.assert_same(hits=2)


def test_memory_that_is_freed_and_used_again() -> None:
    case = Case(mask=causal_mask())
    case.warm()
    for _ in range(5):
        case.q = case.k = case.v = case.mask = None  # type: ignore[assignment]
        gc.collect()
        case.q, case.k, case.v = (torch.randn(2, 4, 256, 32, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        case.mask = causal_mask()
        case.assert_same(hits=2)


def test_one_tensor_in_three_places_and_three_tensors() -> None:
    case = Case()
    k, v = case.k, case.v
    case.k = case.v = case.q
    case.warm()
    case.k, case.v = k, v
    case.assert_same(hits=2)
    case.q = v
    case.assert_same(hits=2)


@pytest.mark.parametrize("change", ["offset", "strides", "one head", "one query", "shared keys", "dtype", "no grad"])
def test_another_layout_is_another_kind(change: str) -> None:
    case = Case()
    case.warm()
    generator = torch.Generator().manual_seed(0)

    def fresh(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if change == "offset":  # addresses that are no multiples of 16
        case.k = fresh(2 * 4 * 256 * 32 + 1)[1:].view(2, 4, 256, 32).requires_grad_()
    elif change == "strides":
        case.q = fresh(2, 256, 4, 32).transpose(1, 2).requires_grad_()
    elif change == "one head":  # Triton makes a constant of a stride or a number that is 1
        case.q, case.k, case.v = (fresh(2, 1, 256, 32).requires_grad_() for _ in range(3))
    elif change == "one query":
        case.q = fresh(2, 4, 1, 32).requires_grad_()
    elif change == "shared keys":
        case.k, case.v = (fresh(1, 4, 256, 32).requires_grad_() for _ in range(2))
    elif change == "dtype":
        case.q, case.k, case.v = (fresh(2, 4, 256, 32, dtype=torch.float16).requires_grad_() for _ in range(3))
    else:
        case.q, case.k, case.v = (t.detach() for t in (case.q, case.k, case.v))
    case.assert_same(hits=1 if change == "no grad" else 0)
    case.assert_same()
    case.assert_same(hits=1 if change == "no grad" else 2)


def test_only_one_tensor_out_of_line() -> None:
    case = Case()
    data = [torch.randn(2 * 4 * 256 * 32 + 1).to(torch.bfloat16) for _ in range(3)]
    straight = [t[:-1].view(2, 4, 256, 32).requires_grad_() for t in data]
    shifted = [t[1:].view(2, 4, 256, 32).requires_grad_() for t in data]
    for _ in range(3):
        for number in range(3):
            given = [*straight[:number], shifted[number], *straight[number + 1 :]]
            case.q, case.k, case.v = given
            case.assert_same()
    case.assert_same(hits=2)


def test_numbers_that_mods_capture() -> None:
    case = Case()
    for number in [2.5, 2.5, 2.5, 3.5, 0.0, 0.0, 0.0, -0.0, 1.0, 16.0, 2.5]:
        case.mod = lambda score, b, h, q_idx, kv_idx, by=number: score * by + torch.where(q_idx > kv_idx, by, 1.0)
        case.assert_same()
    for position in [1, 1, 1, 2, 16, 17, 32, 1]:
        case.mod = lambda score, b, h, q_idx, kv_idx, at=position: torch.where(q_idx > at, score, 0.0)
        case.assert_same()
    for scale in [0.5, 0.5, 0.5, 0.25, 1, 1.0, -0.5, 0.5]:
        case.mod, case.options = None, {"scale": scale}
        case.assert_same()


def test_captured_tensors_that_change() -> None:
    case = Case()
    table = torch.rand(64)

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[h]

    case.mod = mod
    for made in [
        *(table, table, table),
        torch.rand(64),  # another one
        torch.rand(65)[1:],  # not aligned
        torch.rand(128)[::2],
        torch.rand(1),
        torch.rand(()).expand(64),
        torch.rand(64, dtype=torch.float16),
        torch.rand(64),
    ]:
        table = made
        case.more = {"table": table}
        case.assert_same()
    case.assert_same(hits=2)
    table.mul_(2)
    case.assert_same(hits=2)
    table.resize_(32)
    case.assert_same(hits=0)
    table.data = torch.rand(65)[1:33]
    case.assert_same(hits=0)
    table.requires_grad_()
    case.assert_same()


def test_block_lists_that_are_written_to() -> None:
    mask = causal_mask(1024, BLOCK_SIZE=128)
    case = Case(1024, mask=mask)
    case.warm()
    assert mask.full_kv_indices is not None
    # Blocks 0, 2, ... are not adjacent any more: a kernel that counts them would be wrong.
    mask.full_kv_indices[..., 3, :3] = torch.tensor([0, 2, 1], dtype=torch.int32)
    case.assert_same()
    mask.full_kv_indices[..., 3, :3] = torch.tensor([0, 1, 2], dtype=torch.int32)
    case.assert_same()
    for _ in range(3):
        case.assert_same()
    case.mask = causal_mask(1024, BLOCK_SIZE=128)
    case.assert_same(hits=2)
    case.mask.full_kv_indices[..., 3, :3] = torch.tensor([0, 2, 1], dtype=torch.int32)
    case.assert_same()


def test_masks_of_one_shape_take_turns() -> None:
    case = Case(1024)
    adjacent = causal_mask(1024)
    count, index = adjacent.full_kv_num_blocks, adjacent.full_kv_indices
    assert count is not None and index is not None
    scattered = BlockMask.from_kv_blocks(
        adjacent.kv_num_blocks, adjacent.kv_indices, (count - 1).clamp(min=0), index.clone() + 1, mask_mod=causal,
        seq_lengths=(1024, 1024),
    )  # fmt: skip
    scattered.full_kv_indices[..., 4, :3] = torch.tensor([1, 0, 2], dtype=torch.int32)  # type: ignore[index]
    case.options = {"kernel_options": {"BLOCKS_ARE_CONTIGUOUS": True}}
    for number in range(8):
        case.mask = (adjacent, scattered)[number % 2]
        case.assert_same()


def test_lists_out_of_order_are_sorted_for_each_mask() -> None:
    case = Case(300, mask=causal_mask(300))
    case.warm()
    case.mask.kv_indices.copy_(case.mask.kv_indices.flip(-1))
    case.assert_same(hits=2)


def test_a_gradient_of_lse_is_another_kind() -> None:
    case = Case()
    case.warm()
    case.lse = True
    case.assert_same(hits=1)
    case.assert_same()
    case.assert_same(hits=2)


def test_learned_tensors_have_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_gradients, "KEPT_ELEMENTS", 0)  # kept on a CPU alone: tensors from elsewhere
    case = Case(mask=causal_mask())
    slopes, bias = (torch.rand(*shape, requires_grad=True) for shape in ((4,), (4, 256)))

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + bias[h, kv_idx] + slopes[h] * (kv_idx - q_idx)

    case.mod = mod
    for hits in (0, 0, 2, 2):
        case.assert_same(hits)
        slopes, bias = (torch.rand(*shape, requires_grad=True) for shape in ((4,), (4, 256)))
        case.more = {"slopes": slopes, "bias": bias}


def test_torchs_settings_are_part_of_a_kind() -> None:
    case = Case()
    case.q, case.k, case.v = (torch.randn(1, 2, 64, 32).requires_grad_() for _ in range(3))
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "highest", "highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            case.assert_same()
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_hook_sees_every_launch() -> None:
    case = Case()
    case.warm()
    seen: list[str] = []
    hook = lambda metadata: seen.append(metadata.get()["name"])
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        case.call()
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 4 and "forward" in seen[0], seen
    case.assert_same(hits=2)


def test_kernels_belong_to_a_driver() -> None:
    case = Case()
    case.warm()
    triton.runtime.driver.set_active(Device())
    case.assert_same(hits=0)


def test_a_plan_keeps_nothing_alive() -> None:
    case = Case(300, mask=causal_mask(300))
    table = torch.rand(4)
    case.mod = lambda score, b, h, q_idx, kv_idx, t=table: score + t[h]
    case.warm()
    lists = case.mask.kv_lists()
    gone = [weakref.ref(t) for t in (case.q, case.k, case.v, table, *lists)]
    del case, table, lists
    gc.collect()
    assert plans.plan_info().size == 2
    assert [reference() is None for reference in gone] == [True] * len(gone)


def test_a_tensor_of_a_mode_goes_the_whole_way() -> None:
    case = Case()
    case.warm()
    before = plans.plan_info()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        case.call()
    assert counter.get_total_flops() > 0
    assert plans.plan_info().hits == before.hits + 2  # the mode counts operators, and does not look inside


def test_the_number_of_tiles_makes_no_other_kernel() -> None:
    """Lengths of one remainder by 16 share their kernels, whether 16 divides the tiles and the batches or not."""
    kernels = attention_forward, attention_delta, attention_backward_dq, attention_backward_dkdv

    def call(L: int, batch: int) -> list[int]:
        case = Case(L, kernel_options={"ONE_PASS": False, "BLOCK_M": 64, "BLOCK_M2": 64, "BLOCK_N1": 64})
        case.q, case.k, case.v = (
            torch.randn(batch, 4, L, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        case.call()
        return [sum(len(made[0]) for made in kernel.device_caches.values()) for kernel in kernels]

    # 4, 16 and 1 tiles
    assert call(200, 2) == call(1016, 2) == call(200, 16) == call(200, 1) == call(24, 2)
