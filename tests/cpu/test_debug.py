"""Debug mode: what it says is wrong is wrong, at that element, and it says nothing where nothing is."""

from __future__ import annotations

import functools
import importlib.util
import re
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from debug_calls import accepted, qkv, refused
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flexattn
from flexattn import BlockMask, create_block_mask, debug_mode, flex_attention, masks
from flexattn.debug import debugging

Mod = Callable[..., Tensor]


# ---- captured tensors by name, the user's line


short = torch.zeros(10)


def read_global(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    shifted = q_idx + kv_idx
    return score + short[shifted]


class Biased(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(2, 10))

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + self.table[h, kv_idx]


def read_argument(table: Tensor, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + table[q_idx]


def test_an_index_out_of_range_is_named_with_its_tensor_its_element_and_its_line() -> None:
    said = refused(IndexError, *qkv(), read_global)
    first, second = said.splitlines()
    assert first == (
        "index 10 is out of range for dimension 0 (size 10) of captured tensor short of shape [10], "
        "read as short[q_idx + kv_idx] at b=0, h=0, q_idx=0, kv_idx=10"
    )
    assert re.fullmatch(r"score_mod at .*test_debug\.py:\d+: `return score \+ short\[shifted\]`", second)


def test_tensors_are_named_as_attributes_arguments_or_by_number() -> None:
    inputs = qkv()
    assert "captured tensor self.table of shape [2, 10], read as self.table[h, kv_idx]" in refused(
        IndexError, *inputs, Biased()
    )
    assert "captured tensor argument 0 of shape [10]" in refused(
        IndexError, *inputs, functools.partial(read_argument, torch.zeros(10))
    )
    values = torch.zeros(10)
    computed = lambda s, b, h, i, j: s + values.exp()[j]
    assert "captured tensor c0 of shape [10], read as c0[kv_idx]" in refused(IndexError, *inputs, computed)


def test_tensors_in_containers_objects_submodules_and_defaults_are_named() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.tables = torch.nn.Linear(1, 10), {"near": torch.zeros(10)}

        def by_submodule(self, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + self.inner.bias[j]

        def by_key(self, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + self.tables["near"][j]

    layer, settings, several = Layer(), types.SimpleNamespace(bias=torch.zeros(10)), [torch.zeros(10)]

    def with_default(
        s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, table: Tensor = several[0] + 1
    ) -> Tensor:
        return s + table[j]

    mods: dict[str, Any] = {
        "self.inner.bias": layer.by_submodule,
        "self.tables['near']": layer.by_key,
        "settings.bias": lambda s, b, h, i, j: s + settings.bias[j],
        "several[0]": lambda s, b, h, i, j: s + several[0][j],
        "table": with_default,
    }
    for name, mod in mods.items():
        assert f"captured tensor {name} of shape [10], read as {name}[kv_idx]" in refused(IndexError, *qkv(), mod)


def test_two_tensors_are_told_apart_and_so_are_their_lines() -> None:
    first, second = torch.zeros(16), torch.zeros(12)

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score = score + first[q_idx]
        return score + second[q_idx]

    said = refused(IndexError, *qkv(), mod, mask_mod=lambda b, h, q, k: first[q] >= first[k])
    assert "captured tensor second of shape [12]" in said and said.endswith("`return score + second[q_idx]`")


def test_indices_of_the_mask_are_checked_in_the_blocks_that_are_visited() -> None:
    ids = torch.zeros(200, dtype=torch.int64)
    far = lambda b, h, q, k: ids[(q - k).abs() * 2] == 0
    q, k, v = qkv(L=200, S=200)
    said = refused(IndexError, q, k, v, mask_mod=far)
    assert "captured tensor ids of shape [200]" in said and "q_idx=0, kv_idx=100" in said and "mask_mod at" in said
    lists = torch.ones(1, 1, 2, dtype=torch.int32), torch.arange(2, dtype=torch.int32).view(1, 1, 2, 1)
    on_diagonal = BlockMask.from_kv_blocks(*lists, None, None, 100, far, seq_lengths=(200, 200))
    accepted(q, k, v, block_mask=on_diagonal)
    off_diagonal = BlockMask.from_kv_blocks(lists[0], 1 - lists[1], None, None, 100, far, seq_lengths=(200, 200))
    assert "q_idx=0, kv_idx=100" in refused(IndexError, q, k, v, block_mask=off_diagonal)


def test_an_index_that_was_read_is_checked() -> None:
    place, values = torch.tensor([0, 1, 5, 2] * 4), torch.zeros(4)
    said = refused(IndexError, *qkv(), lambda s, b, h, i, j: s + values[place[j]])
    assert "index 5 is out of range" in said and "read as values[place[kv_idx]] at b=0, h=0, q_idx=0, kv_idx=2" in said


def test_lines_are_found_where_numbers_and_operations_differ_from_the_programs() -> None:
    first, ids = torch.zeros(16), torch.zeros(12)

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + first[q_idx * 1 + 0]

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        x = ids[(kv_idx + 0) // 1]
        y = first[(kv_idx + 0) // 1]
        return x + y >= 0

    lists = create_block_mask(masks.noop_mask, None, None, 16, 16, "cpu").kv_lists()
    said = refused(IndexError, *qkv(), mod, BlockMask.from_kv_blocks(*lists, 128, mask, seq_lengths=(16, 16)))
    assert "captured tensor ids of shape [12]" in said and said.endswith("`x = ids[(kv_idx + 0) // 1]`")
    first = torch.zeros(10)
    assert refused(IndexError, *qkv(), mod).endswith("`return score + first[q_idx * 1 + 0]`")


# ---- indices that wrap


def warned(mod: Mod, **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, debug_mode():
        warnings.simplefilter("always")
        flex_attention(*qkv(), mod, **kwargs)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_an_index_that_is_negative_here_and_there_is_warned_of() -> None:
    table = torch.zeros(16)
    (said,) = warned(lambda s, b, h, i, j: s + table[i - j])
    assert said.startswith(
        "index -1 wraps to 15 in dimension 0 (size 16) of captured tensor table, read as table[q_idx - kv_idx] at b=0, h=0, "
        "q_idx=0, kv_idx=1"
    )
    assert "write (q_idx - kv_idx) % 16" in said and "score_mod at" in said
    assert warned(lambda s, b, h, i, j: s + table[(i - j) % 16]) == []
    assert warned(lambda s, b, h, i, j: s + table[i - j], mask_mod=masks.causal_mask) == []
    assert warned(lambda s, b, h, i, j: s + table[-1] + table[j - 16]) == []
    (said,) = warned(lambda s, b, h, i, j: s, mask_mod=lambda b, h, i, j: table[j - 8] == 0)
    assert "mask_mod at" in said


# ---- scores


def test_a_nan_is_traced_to_the_operation_that_makes_it() -> None:
    q, k, v = (torch.ones(1, 2, 4, 4) for _ in range(3))
    slopes = torch.tensor([1.0, -3.0])

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        x = torch.log(score + slopes[h])
        return torch.tanh(x) * 2

    first, second, third = refused(FloatingPointError, q, k, v, mod).splitlines()
    assert first == (
        "the modified score is nan at b=0, h=1, q_idx=0, kv_idx=0, which is attended to; the score was 2: "
        "`log(score + slopes[h])` is nan where score + slopes[h] = -1"
    )
    assert second == "score_mod reads slopes[1] = -3"
    assert third.endswith("`x = torch.log(score + slopes[h])`")


def test_a_captured_element_that_is_not_finite_is_named() -> None:
    bias = torch.zeros(2, 16)
    bias[1, 5] = float("nan")
    add = lambda s, b, h, i, j: s + bias[h, j]
    said = refused(FloatingPointError, *qkv(), add)
    assert "at b=0, h=1, q_idx=0, kv_idx=5" in said
    assert "captured tensor bias of shape [2, 16] has bias[1, 5] = nan" in said
    accepted(*qkv(), add, mask_mod=lambda b, h, i, j: j != 5)
    accepted(*qkv(), lambda s, b, h, i, j: torch.where(bias[h, j] == 0, s + bias[h, j], 0.0))
    bias[1, 5] = float("inf")
    assert "the modified score is inf" in refused(FloatingPointError, *qkv(), add)
    bias[1, 5] = -float("inf")
    accepted(*qkv(), add)


def test_infinities_that_meet_are_where_nan_begins() -> None:
    caps = torch.tensor([1.0, float("inf")])
    said = refused(FloatingPointError, *qkv(), lambda s, b, h, i, j: s + caps[h] - caps[h])
    assert "`score + caps[h] - caps[h]` is nan where score + caps[h] = inf, caps[h] = inf" in said
    divided = refused(FloatingPointError, *qkv(), lambda s, b, h, i, j: torch.where(i == j, (s * s) / (i - j), s))
    assert "is inf where" in divided and "q_idx - kv_idx = 0" in divided


def test_the_branch_that_is_taken_is_followed() -> None:
    near = lambda s, b, h, i, j: torch.where(i > 99, torch.exp(s), torch.log(-1 - s.abs()))
    assert "`log(" in refused(FloatingPointError, *qkv(), near)
    far = lambda s, b, h, i, j: torch.where(i < 99, torch.log(-1 - s.abs()), torch.exp(s))
    assert "`log(" in refused(FloatingPointError, *qkv(), far)


@pytest.mark.parametrize("size", [16, 128])
def test_hidden_elements_may_be_anything(size: int) -> None:
    inputs = qkv(L=300, S=300)
    inputs[0].requires_grad_()
    causal = create_block_mask(masks.causal_mask, None, None, 300, 300, "cpu", size)
    for mod in (
        lambda s, b, h, i, j: s + torch.log(i - j + 1),
        lambda s, b, h, i, j: torch.sqrt((s * (i >= j)).abs() + (i >= j)),
    ):
        accepted(*inputs, mod, block_mask=causal)
        refused(FloatingPointError, *inputs, mod)


def test_a_product_that_overflows_is_named() -> None:
    q, k, v = qkv()
    said = refused(FloatingPointError, q.abs() * 1e30, k.abs() * 1e30, v)
    assert "the modified score is inf" in said and "the product of query and key overflows" in said


def test_a_temperature_that_is_part_of_the_scale_is_told_from_the_score() -> None:
    q, k, v = (torch.ones(1, 1, 2, 4) for _ in range(3))
    temperature = -2.0
    said = refused(FloatingPointError, q, k, v, lambda s, b, h, i, j: torch.log(s * temperature))
    assert "the score was 2: `log(-2 * score)`" in said or "the score was 2: `log(score * -2)` is nan" in said


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_operands_that_are_not_finite_are_named_where_they_are_visited(name: str) -> None:
    q, k, v = qkv(B=2, H=4, Hkv=2, L=40, S=40, kv_batch=1)
    tensors = {"query": q, "key": k, "value": v}
    place = (1, 3, 33, 2) if name == "query" else (0, 1, 33, 2)
    tensors[name][place] = float("inf")
    said = refused(FloatingPointError, q, k, v, enable_gqa=True)
    assert said.startswith(f"{name}{list(place)} is inf") and f"{name} has shape {list(tensors[name].shape)}" in said
    visited = create_block_mask(lambda b, h, i, j: (i < 16) & (j < 16), None, None, 40, 40, "cpu", 16)
    out = accepted(q, k, v, block_mask=visited, enable_gqa=True)
    assert bool(out.isfinite().all())
    hidden = create_block_mask(lambda b, h, i, j: (i != 33) & (j != 33), None, None, 40, 40, "cpu", 16)
    refused(FloatingPointError, q, k, v, block_mask=hidden, enable_gqa=True)


# ---- where and when


@pytest.mark.parametrize("backend", ["tiled", "triton", "reference"])
def test_every_backend_is_checked(backend: str) -> None:
    said = refused(IndexError, *qkv(), read_global, backend=backend)
    assert "captured tensor short" in said


@pytest.mark.parametrize(("L", "S"), [(0, 0), (0, 5), (5, 0), (1, 1), (1, 5), (5, 1)])
def test_short_and_empty_sequences(L: int, S: int) -> None:
    table, nothing = torch.zeros(8), torch.zeros(0)
    accepted(*qkv(L=L, S=S), lambda s, b, h, i, j: torch.exp(s) + table[i + j])
    if L and S:
        assert "size 0" in refused(IndexError, *qkv(L=L, S=S), lambda s, b, h, i, j: s + nothing[i])


def test_rows_that_attend_to_nothing_are_not_looked_at() -> None:
    q, k, v = qkv()
    q[:, :, 3] = float("nan")
    mask = create_block_mask(lambda b, h, i, j: i != 3, None, None, 16, 16, "cpu", 1)
    assert bool(accepted(q, k, v, lambda s, b, h, i, j: s * s, block_mask=mask).isfinite().all())


def test_no_more_than_a_tile_is_in_memory() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            largest = max(largest, made.numel() if isinstance(made, Tensor) else 0)
            return made

    q, k, v = qkv(H=1, Hkv=1, L=2000, S=2000)
    q.requires_grad_()
    with Watch():
        accepted(q, k, v, lambda s, b, h, i, j: s * torch.tanh(s), mask_mod=masks.causal_mask)
    assert 1 << 15 < largest <= 1 << 20


def test_debug_mode_ends_and_can_be_switched_off_inside() -> None:
    assert not debugging()
    with debug_mode():
        with debug_mode(False):
            flex_attention(*qkv(), read_global)
        assert debugging()
    assert not debugging()
    flex_attention(*qkv(), read_global)


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_switches_it_on(value: str | None, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEXATTN_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("FLEXATTN_DEBUG", value)
    spec = importlib.util.spec_from_file_location("another_debug", flexattn.debug.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.debugging() is on


def test_transforms_and_graphs_run_and_are_not_looked_at() -> None:
    q, k, v = qkv()
    loss = lambda q: flex_attention(q, k, v, read_global).sum()
    compiled = torch.compile(lambda q: flex_attention(q, k, v, read_global), backend="aot_eager", fullgraph=True)
    with debug_mode():
        torch.func.grad(loss)(q)
        torch.testing.assert_close(compiled(q), flex_attention(q, k, v, _clamped))


def test_what_dynamo_replays_is_checked_without_names() -> None:
    q, k, v = qkv()
    compiled = torch.compile(lambda q: flex_attention(q, k, v, read_global), backend="eager", fullgraph=True)
    with debug_mode(), pytest.raises(IndexError, match="captured tensor c0 of shape") as caught:
        compiled(q)
    assert re.search(r"score_mod `read_global` at .*test_debug\.py:\d+$", str(caught.value))


def _clamped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + short[(q_idx + kv_idx).clamp(max=9)]
