"""The registered operators: schema, fake, autograd, FLOPs; and the order of work of the tiled backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flexattn
from flexattn import create_block_mask, flex_attention, masks, ops
from flexattn.backends.schedule import Span, chunks, schedule
from flexattn.codegen.trace import trace
from flexattn.notices import say_once
from flexattn.operands import split


def operands(requires_grad: bool) -> list[Any]:
    q, k, v = (torch.randn(2, h, 40, 8, requires_grad=requires_grad) for h in (4, 2, 2))
    bias = torch.randn(4, requires_grad=requires_grad)
    program, captured, ints = trace(lambda s, b, h, i, j: s * 0.5 + bias[h] * i, masks.causal_mask)
    lists = list(create_block_mask(masks.causal_mask, None, None, 40, 40, "cpu", 16).kv_lists())
    inside, floats = split(captured, program)
    return [q, k, v, inside, lists, ints, floats, [16, 16], program, 0.3, "tiled", ""]


@pytest.mark.feature("torch.library.opcheck of every operator")
def test_opcheck_of_forward() -> None:
    torch.library.opcheck(ops.FORWARD, operands(True))


@pytest.mark.feature("torch.library.opcheck of every operator")
def test_opcheck_of_backward() -> None:
    arguments = operands(False)
    out, lse, _ = ops.FORWARD(*arguments)
    torch.library.opcheck(
        ops.BACKWARD, (*arguments[:3], out, lse, torch.randn_like(out), torch.randn_like(lse), *arguments[3:], [0])
    )


@pytest.mark.feature("torch.library.opcheck of every operator")
@pytest.mark.parametrize("trim", [False, True])
def test_opcheck_of_block_mask(trim: bool) -> None:
    program, captured, ints = trace(None, masks.document_mask(torch.arange(40) // 7))
    torch.library.opcheck(
        torch.ops.flexattn.block_mask.default,
        (captured, ints, [], program, [1, 2, 40, 40], [16, 8], 1 << 28, trim, torch.empty(0)),
    )


def test_meta_tensors_give_shapes() -> None:
    q = torch.empty(2, 4, 40, 8, device="meta")
    assert flex_attention(q, q, q[..., :5]).shape == (2, 4, 40, 5)


def test_a_gpu_gets_fused_kernels_and_is_told_once_where_it_does_not() -> None:
    say_once.cache_clear()
    with FakeTensorMode():
        q = torch.empty(2, 4, 40, 8, device="cuda", dtype=torch.bfloat16)
        assert flexattn.api.choose_backend("auto", q, q) == "triton"
        for refused, why in (
            (q.double(), "float32, not in float64"),
            (q.expand(2, 4, 40, 8).repeat(1, 1, 1, 64), "512"),
        ):
            with pytest.warns(UserWarning, match=f"operators .*{why}"):
                assert flexattn.api.choose_backend("auto", refused, refused) == "tiled"
            with pytest.raises(ValueError, match=f"{why}.*Use backend='tiled'"):
                flexattn.api.choose_backend("triton", refused, refused)


@pytest.mark.feature("FlopCounterMode counts visited blocks")
def test_flops_are_those_of_the_visited_blocks() -> None:
    q, k, v = (torch.randn(2, 4, 40, 8, requires_grad=True) for _ in range(3))
    mask = create_block_mask(masks.causal_mask, None, None, 40, 40, "cpu", 16)
    area = 2 * 4 * (16 * 16 + 16 * 32 + 8 * 40)
    with FlopCounterMode(display=False) as counter:
        flex_attention(q, k, v, block_mask=mask).sum().backward()
    assert counter.get_total_flops() == 2 * area * (8 + 8) + 2 * area * 5 * 8
    with FlopCounterMode(display=False) as counter:
        flex_attention(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * 4 * 40 * 40 * 16


# ---- schedule


def lists_of(mask: Any, B: int | None, H: int | None, n: int = 64) -> list[Tensor]:
    return list(create_block_mask(mask, B, H, n, n, "cpu", 16).kv_lists())


def test_equal_rows_are_joined_and_adjacent_blocks_make_one_span() -> None:
    (group,) = schedule(lists_of(masks.chunked(32), None, None), (16, 16), (2, 4, 64, 64), 512)
    assert [(t.start, t.stop, t.spans) for t in group.tiles] == [
        (0, 32, (Span(0, 32, False),)),
        (32, 64, (Span(32, 64, False),)),
    ]
    (group,) = schedule(lists_of(masks.causal_mask, None, None), (16, 16), (1, 1, 64, 64), 512)
    assert group.tiles[2].spans == (Span(0, 32, False), Span(32, 48, True))


def test_equal_heads_and_batches_share_a_group() -> None:
    assert len(schedule(lists_of(masks.causal_mask, 2, 4), (16, 16), (2, 4, 64, 64), 512)) == 1
    by_batch = lambda b, h, i, j: i >= j + 16 * b
    assert len(schedule(lists_of(by_batch, 2, 4), (16, 16), (2, 4, 64, 64), 512)) == 2
    assert len(schedule(lists_of(lambda b, h, i, j: i >= j + 16 * h, 2, 4), (16, 16), (2, 4, 64, 64), 512)) == 4


def test_every_listed_element_is_scheduled_exactly_once() -> None:
    mask = lambda b, h, i, j: ((i // 16 + j // 16 + b) % 3 == 0) | (i // 16 == 1 + h)
    lists = lists_of(mask, 2, 3)
    visits = torch.zeros(2, 3, 64, 64, dtype=torch.int32)
    for group in schedule(lists, (16, 16), (2, 3, 64, 64), 32):
        for tile in group.tiles:
            for part in chunks(tile.spans, 24):
                assert sum(s.stop - s.start for s in part) <= 24
                for s in part:
                    where = (slice(group.batch_start, group.batch_stop), slice(group.head_start, group.head_stop))
                    visits[where][:, :, tile.start : tile.stop, s.start : s.stop] += 1
    expected = create_block_mask(mask, 2, 3, 64, 64, "cpu", 16).to_dense()
    assert torch.equal(visits, expected.repeat_interleave(16, 2).repeat_interleave(16, 3))


def test_full_blocks_never_evaluate_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexattn.backends import indices, tiled

    indices.kept_place_of.cache_clear()
    seen = []
    original = tiled.evaluate

    def watched(nodes: Any, inputs: Any, pool: Any = None) -> Any:
        seen.append((tuple(inputs.named["q_idx"].flatten().tolist()), tuple(inputs.named["kv_idx"].tolist())))
        return original(nodes, inputs, pool)

    for module in (tiled, indices):
        monkeypatch.setattr(module, "evaluate", watched)
    q = torch.randn(1, 1, 64, 8)
    mask = create_block_mask(masks.causal_mask, None, None, 64, 64, "cpu", 16)
    flex_attention(q, q, q, block_mask=mask)
    assert seen == [(tuple(range(i, i + 16)),) * 2 for i in range(0, 64, 16)]  # the diagonal, nothing else


def test_explain_prints_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    slopes = torch.ones(4)
    report = flexattn.explain(
        lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx), masks.causal_mask
    )
    printed = capsys.readouterr().out
    assert str(report) in printed
    assert "score' = score + (kv_idx - q_idx) * slopes[h]" in report.formula
    assert "keep = q_idx >= kv_idx" in report.formula
    assert report.derivative == "d score = grad\nd slopes[h] = grad * (kv_idx - q_idx)"
    assert "captured c0 float32 1" in report.program
    assert report.captured == ("c0: slopes, float32 [4]",)
    flexattn.explain(mask_mod=masks.causal_mask, quiet=True)
    assert capsys.readouterr().out == ""
    cap = flexattn.explain(flexattn.mods.softcap(30.0), quiet=True)
    assert cap.formula == "score' = tanh(score / 30) * 30"


def test_forward_mode_is_refused_where_it_would_give_no_tangent() -> None:
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
    slope = torch.tensor(0.5)

    def of_query(x: Any) -> Any:
        return flex_attention(x, k, v)

    def of_slope(x: Any) -> Any:
        return flex_attention(q, k, v, lambda score, b, h, q_idx, kv_idx: score * x)

    for function, at in ((of_query, q), (of_slope, slope)):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"), forward_ad.dual_level():
            function(forward_ad.make_dual(at, torch.ones_like(at)))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(function, (at,), (torch.ones_like(at),))


def test_explain_refuses_what_no_kernel_has() -> None:
    for wrong, complaint in (
        ({"dtype": torch.int32}, "dtype is torch.int32; use one of torch.float16"),
        ({"dtype": "bf16"}, "dtype is 'bf16'; use one of"),
        ({"head_dim": 0}, "head_dim is 0; it must be a positive integer"),
        ({"target": 90}, "target is a int; name a GPU"),
        ({"kernel_options": {"BLOK_M": 64}}, "unknown kernel option 'BLOK_M'; did you mean 'BLOCK_M'"),
    ):
        with pytest.raises((TypeError, ValueError), match=complaint):
            flexattn.explain(None, masks.causal_mask, quiet=True, **wrong)
    report = flexattn.explain(None, masks.causal_mask, quiet=True, head_dim=300, dtype=torch.bfloat16, target="sm_90")
    assert report.kernels == "none: a head dimension over 256 is computed by torch operators"


def test_explain_says_which_dtype_it_assumed() -> None:
    said = "for float32, since no dtype was given; pass dtype=torch.bfloat16"
    assert said in flexattn.explain(None, masks.causal_mask, quiet=True).kernels
    for dtype in (torch.float32, torch.bfloat16):
        assert "float32" not in flexattn.explain(None, masks.causal_mask, dtype=dtype, quiet=True).kernels


def test_explain_prints_the_functions_that_options_ask_for() -> None:
    table, group = torch.ones(3, 3, requires_grad=True), torch.arange(16) % 3
    indirect = lambda score, b, h, q, k: 20 * torch.tanh((score + table[group[q], group[k]]) / 20)

    def functions(**options: Any) -> str:
        return flexattn.explain(indirect, kernel_options=options, quiet=True).functions

    assert "atomic_add" in functions() and "fast_tanh" not in functions()
    assert "atomic_add" not in functions(DETERMINISTIC=True)
    assert "fast_tanh" in functions(FAST_TANH=True)


def test_a_derivative_through_a_shared_index_is_printed_whole() -> None:
    table = torch.zeros(2, 32)
    report = flexattn.explain(
        lambda score, b, h, q_idx, kv_idx: score + table[h, (q_idx - kv_idx).clamp(0, 31)] * 2, quiet=True
    )
    assert "d table[h, where(31 < x2, 31, x2)] = grad * 2" in report.derivative
    whole = flexattn.explain(lambda score, b, h, q_idx, kv_idx: score + table[h, (score * 1.5).long()], quiet=True)
    assert "table[h, trunc(score * 1.5)]" in whole.formula


def test_explain_says_how_the_gradient_of_each_captured_tensor_is_added_up() -> None:
    slopes, temperature = torch.ones(4, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    gate, frozen = torch.ones(2, 4, 16, requires_grad=True), torch.ones(31)
    pair, plane = torch.ones(2, 4, 16, 16, requires_grad=True), torch.ones(16, 16, requires_grad=True)
    experts, group = torch.ones(3, 3, requires_grad=True), torch.arange(16) % 3

    def gradients(mod: Any) -> list[str]:
        report = flexattn.explain(mod, quiet=True)
        assert f"gradients\n  {report.gradients.splitlines()[0]}" in str(report)
        return sorted(report.gradients.splitlines())

    assert gradients(lambda score, b, h, q, k: score * temperature + slopes[h] * (k - q)) == [
        "slopes[h]: by head; summed in registers over the keys, then over the queries; no atomics",
        "temperature: one entry for all; summed in registers over the keys, then over the queries; no atomics",
    ]
    assert gradients(lambda score, b, h, q, k: score + gate[b, h, q] - gate[b, h, k]) == [
        "gate[b, h, kv_idx]: by key, head and batch entry; "
        "summed in registers over the queries, one float32 for each key; no atomics",
        "gate[b, h, q_idx]: by query, head and batch entry; "
        "summed in registers over the keys, one float32 for each query; no atomics",
    ]
    assert gradients(lambda score, b, h, q, k: score + frozen[k - q + 15]) == [
        "frozen[kv_idx - q_idx + 15]: by kv_idx - q_idx; summed along the diagonals of each tile, then added up in a fixed "
        "order; no atomics (only if it requires grad: now it does not)"
    ]
    stored = "each element stored; no atomics"
    assert gradients(lambda score, b, h, q, k: score + pair[b, h, q, k]) == [
        f"pair[b, h, q_idx, kv_idx]: by query, key, head and batch entry; {stored}"
    ]
    assert gradients(lambda score, b, h, q, k: score + plane[q, k]) == [
        f"plane[q_idx, kv_idx]: by query and key; {stored}, "
        "by way of a workspace where several batch entries or heads may share it"
    ]
    (indirect,) = gradients(lambda score, b, h, q, k: score + experts[group[q], group[k]])
    assert indirect.startswith(
        "experts[group[q_idx], group[kv_idx]]: any entry; each element added by itself: on a GPU by"
    )
    assert '{"DETERMINISTIC": True}' in indirect
    for nothing in (None, lambda score, b, h, q, k: score * 2 + group[q]):
        assert gradients(nothing) == ["no captured tensor receives a gradient"]
