"""What a document gets is the same, to the bit, alone, packed in any way, and in any batch; and it is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from flexattn import AuxRequest, Documents, create_block_mask, flex_attention, masks, mods
from flexattn.aligned import BLOCK, of_ids
from flexattn.testing import Sizes, assert_batch_invariant

SMALL = Sizes(Hq=2, Hkv=1, E=8, Ev=8)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
Function = Callable[..., Tensor]


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + SLOPES[h] * (kv_idx - q_idx)


def wider_for_each_head(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx - kv_idx).abs() <= 20 * h


VARIANTS: dict[str, tuple[Function | None, Function | None]] = {
    "bidirectional": (None, None),
    "causal": (None, masks.causal_mask),
    "window, ALiBi": (alibi, masks.sliding_window(100)),
    "softcap, causal": (mods.softcap(5.0), masks.causal_mask),
    "window of each head": (None, wider_for_each_head),
}
BACKENDS = ("tiled", "reference")
backends = pytest.mark.parametrize("backend", BACKENDS)


def drawn(B: int, Hq: int, Hkv: int, L: int, E: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value, and the gradient of the output."""
    shapes = (B, Hq, L, E), (B, Hkv, L, E), (B, Hkv, L, E), (B, Hq, L, E)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def results(operands: list[Tensor], *args: Any, **options: Any) -> dict[str, Tensor]:
    *given, dout = operands
    leaves = [t.detach().requires_grad_() for t in given]
    asked = AuxRequest(lse=True, max_scores=True)
    out, aux = flex_attention(*leaves, *args, enable_gqa=True, return_aux=asked, **options)
    gradients = torch.autograd.grad(out, leaves, dout)
    found = {"out": out, "lse": aux.lse, "max_scores": aux.max_scores}
    return {k: t.detach() for k, t in (found | dict(zip(("dq", "dk", "dv"), gradients, strict=True))).items()}


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, t in expected.items():
        integers = torch.int64 if t.dtype is torch.float64 else torch.int32 if t.dtype is torch.float32 else torch.int16
        assert torch.equal(found[name].contiguous().view(integers), t.contiguous().view(integers)), name


def tokens(found: dict[str, Tensor], picked: slice | Tensor, batch: slice = slice(None)) -> dict[str, Tensor]:
    return {name: t[batch, :, picked] for name, t in found.items()}


# ---- the same bits


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_gets_the_same_bits_wherever_it_stands(variant: str, dtype: torch.dtype, backend: str) -> None:
    shape = Sizes(Hq=4, Hkv=2, E=16, Ev=24)
    assert_batch_invariant(
        *VARIANTS[variant], Documents.from_lengths([37, 130, 1]), shape=shape, dtype=dtype, backend=backend
    )


@backends
def test_a_learned_bias_for_each_token_goes_with_its_document(backend: str) -> None:
    bias = torch.randn(2, 168)

    def of_packing(at: Tensor) -> tuple[Function, Function]:
        mine = bias[:, at.clamp_min(0)].requires_grad_()
        return lambda score, b, h, q_idx, kv_idx: score + mine[h, kv_idx] * mine[h, q_idx], masks.causal_mask

    packed = Documents.from_lengths([37, 130, 1])
    assert_batch_invariant(documents=packed, mods=of_packing, shape=SMALL, backend=backend)


@settings(max_examples=12)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=4), st.sampled_from(sorted(VARIANTS)), st.sampled_from(BACKENDS)
)
def test_documents_of_any_lengths_get_the_same_bits(lengths: list[int], variant: str, backend: str) -> None:
    assert_batch_invariant(*VARIANTS[variant], Documents.from_lengths(lengths), shape=SMALL, backend=backend)


@backends
@pytest.mark.parametrize("n", [1, 37, 128, 200])
def test_a_batch_entry_alone_is_a_document_of_its_own(backend: str, n: int) -> None:
    operands = drawn(1, 4, 2, n)
    alone = results(operands, alibi, mask_mod=masks.causal_mask, batch_invariant=True, backend=backend)
    document = Documents.from_lengths([n])
    assert_equal_bits(
        results(operands, alibi, mask_mod=masks.causal_mask, batch_invariant=document, backend=backend), alone
    )
    batch = [torch.cat([torch.randn_like(t), t, torch.randn_like(t)]) for t in operands]
    found = results(batch, alibi, mask_mod=masks.causal_mask, batch_invariant=True, backend=backend)
    assert_equal_bits(tokens(found, slice(None), slice(1, 2)), alone)


@backends
def test_rows_may_be_packed_in_different_ways(backend: str) -> None:
    rows = Documents.from_seq_idx(torch.tensor([[0] * 50 + [1] * 110, [3] * 130 + [-1] * 30]))
    operands = drawn(2, 4, 2, 160)
    found = results(operands, mask_mod=masks.causal_mask, batch_invariant=rows, backend=backend)
    for b, start, stop in ((0, 0, 50), (0, 50, 160), (1, 0, 130)):
        alone = [t[b : b + 1, :, start:stop] for t in operands]
        expected = results(alone, mask_mod=masks.causal_mask, batch_invariant=True, backend=backend)
        assert_equal_bits(tokens(found, slice(start, stop), slice(b, b + 1)), expected)


@backends
def test_a_document_in_pieces_is_the_document_in_one(backend: str) -> None:
    ids = torch.tensor([0, 1, 2]).repeat(60)
    operands = drawn(1, 2, 1, 180)
    found = results(
        operands, mask_mod=masks.causal_mask, batch_invariant=Documents.from_document_ids(ids), backend=backend
    )
    for document in range(3):
        at = (ids == document).nonzero()[:, 0]
        expected = results(
            [t[:, :, at] for t in operands], mask_mod=masks.causal_mask, batch_invariant=True, backend=backend
        )
        assert_equal_bits(tokens(found, at), expected)


@backends
@pytest.mark.parametrize("listed", [False, True])
def test_the_size_of_a_batch_changes_nothing_where_lengths_differ_or_blocks_are_given(
    backend: str, listed: bool
) -> None:
    q, k, v, dout = (torch.randn(3, 2, n, 16) for n in (50, 170, 170, 50))
    mask: dict[str, Any] = {"mask_mod": lambda b, h, q_idx, kv_idx: q_idx + 120 >= kv_idx}
    if listed:
        mask = {"block_mask": create_block_mask(mask["mask_mod"], None, None, 50, 170, "cpu", BLOCK_SIZE=(64, 256))}
    together = results([q, k, v, dout], alibi, batch_invariant=True, backend=backend, **mask)
    for b in range(3):
        alone = [t[b : b + 1] for t in (q, k, v, dout)]
        expected = results(alone, alibi, batch_invariant=True, backend=backend, **mask)
        assert_equal_bits(tokens(together, slice(None), slice(b, b + 1)), expected)


@backends
def test_keys_that_all_entries_share_give_the_bits_of_their_copies(backend: str) -> None:
    q, k, v, dout = drawn(2, 4, 2, 150)
    k, v = k[:1], v[:1]
    packed = Documents.from_lengths([100, 50])
    shared = results([q, k, v, dout], mask_mod=masks.causal_mask, batch_invariant=packed, backend=backend)
    copies = [q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), dout]
    copied = results(copies, mask_mod=masks.causal_mask, batch_invariant=packed, backend=backend)
    assert_equal_bits({n: shared[n] for n in ("out", "lse", "dq")}, {n: copied[n] for n in ("out", "lse", "dq")})
    assert shared["dk"].shape == k.shape


@backends
@pytest.mark.parametrize("n", [128, 150])
def test_memory_layouts_change_no_bits_and_the_output_has_that_of_the_query(backend: str, n: int) -> None:
    operands = drawn(2, 4, 2, n)
    contiguous = results(operands, mask_mod=masks.causal_mask, batch_invariant=True, backend=backend)
    q, *rest = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands)
    shifted = torch.empty(q.numel() + 1)[1:].view(2, n, 4, 16).transpose(1, 2).copy_(q)  # at no multiple of 16 bytes
    found = results([shifted, *rest], mask_mod=masks.causal_mask, batch_invariant=True, backend=backend)
    assert found["out"].stride() == q.stride()
    assert_equal_bits(found, contiguous)


# ---- the right numbers


@backends
@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_an_entry_may_begin_at_any_address(backend: str, seed: int) -> None:
    """Entries of 30 and of 21 floats: some begin where the next 16 bytes do, some do not."""
    torch.manual_seed(seed)
    for Hq, L, S, E, Ev in ((2, 3, 128, 4, 5), (1, 3, 65, 8, 7)):
        q, k, v, dout = (torch.randn(5, Hq, n, d) for n, d in ((L, E), (S, E), (S, Ev), (L, Ev)))
        together = results([q, k, v, dout], batch_invariant=True, backend=backend)
        for b in range(5):
            alone = results([t[b : b + 1].clone() for t in (q, k, v, dout)], batch_invariant=True, backend=backend)
            assert_equal_bits({name: t[b : b + 1] for name, t in together.items()}, alone)


@backends
def test_results_are_those_of_documents_kept_apart_by_a_mask(backend: str) -> None:
    packed = Documents.from_lengths([70, 0, 130], 210)
    real = packed.document_ids >= 0
    operands = drawn(2, 4, 2, 210, dtype=torch.float64)
    found = results(operands, alibi, mask_mod=masks.causal_mask, batch_invariant=packed, backend=backend)
    operands[3] = operands[3] * real.view(-1, 1)  # without the option, padding attends to padding
    expected = results(operands, alibi, mask_mod=packed.mask(masks.causal_mask), backend="reference")
    for name, t in expected.items():
        torch.testing.assert_close(found[name][:, :, real], t[:, :, real], rtol=1e-10, atol=1e-10, msg=name)


@backends
def test_padding_attends_to_nothing_and_gets_no_gradient(backend: str) -> None:
    packed = Documents.from_seq_idx(torch.tensor([-1, -1, 0, 0, 0, -1, 1, 1]))
    padding = packed.document_ids < 0
    found = results(drawn(1, 2, 2, 8), batch_invariant=packed, backend=backend)
    assert all(not found[name][:, :, padding].any() for name in ("out", "dq", "dk", "dv"))
    assert all((found[name][:, :, padding] == -float("inf")).all() for name in ("lse", "max_scores"))
    assert found["lse"][:, :, ~padding].isfinite().all()


@backends
@pytest.mark.parametrize("ids", [[], [-1, -1, -1]])
def test_rows_without_documents(backend: str, ids: list[int]) -> None:
    packed = Documents.from_seq_idx(torch.tensor(ids, dtype=torch.int32))
    found = results(drawn(2, 2, 2, len(ids)), batch_invariant=packed, backend=backend)
    assert found["out"].shape == (2, 2, len(ids), 16) and not found["out"].any()
    assert not found["dq"].any()


@backends
def test_gradients_of_captured_tensors_are_those_without_the_option(backend: str) -> None:
    packed, operands = Documents.from_lengths([70, 60]), drawn(1, 2, 2, 130, dtype=torch.float64)
    found = []
    for option in (
        {"batch_invariant": packed, "mask_mod": masks.causal_mask},
        {"mask_mod": packed.mask(masks.causal_mask)},
    ):
        table = torch.linspace(0, 1, 260, dtype=torch.float64).requires_grad_()
        q, k, v, dout = operands
        out = flex_attention(
            q, k, v, lambda s, b, h, q, kv: s + table[q - kv + 130] * table[kv], backend=backend, **option
        )
        found += torch.autograd.grad(out, table, dout)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@backends
def test_transforms_of_torch_func_go_through(backend: str) -> None:
    packed = Documents.from_lengths([70, 60])
    operands = drawn(2, 2, 2, 130)

    def loss(*tensors: Tensor) -> Tensor:
        q, k, v, dout = (t.unsqueeze(0) for t in tensors)
        return (
            flex_attention(q, k, v, mask_mod=masks.causal_mask, batch_invariant=packed, backend=backend) * dout
        ).sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(*operands)
    expected = results(operands, mask_mod=masks.causal_mask, batch_invariant=packed, backend=backend)
    assert_equal_bits({"dq": mapped}, {"dq": expected["dq"]})


def test_the_reference_has_forward_mode_and_second_derivatives() -> None:
    def attend(q: Tensor) -> Tensor:
        return flex_attention(q, k, k, mask_mod=masks.causal_mask, batch_invariant=packed, backend="reference")

    packed, k = Documents.from_lengths([3, 2]), torch.randn(1, 1, 5, 4, dtype=torch.float64)
    q = torch.randn(1, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(attend, (q,))
    direction = torch.randn_like(q)
    _, tangent = torch.func.jvp(attend, (q.detach(),), (direction,))
    dense = lambda q: flex_attention(q, k, k, mask_mod=packed.mask(masks.causal_mask), backend="reference")
    torch.testing.assert_close(tangent, torch.func.jvp(dense, (q.detach(),), (direction,))[1])


# ---- the layout


@given(st.lists(st.lists(st.integers(-2, 3), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(1, 100))
def test_the_layout_is_the_plain_one(rows: list[list[int]], times: int) -> None:
    ids = Documents.from_seq_idx(torch.tensor(rows).repeat_interleave(times, 1)).document_ids
    layout = of_ids(ids)
    used = []
    for b, row in enumerate(ids.tolist()):
        start = 0
        for document in range(max(row) + 1):
            at = [i for i, own in enumerate(row) if own == document]
            stop = start + len(at)
            assert layout.position[b, start:stop].tolist() == at
            assert layout.place[b, at].tolist() == list(range(start, stop))
            assert set(layout.first[b, start:stop].tolist()) == {start} and set(
                layout.stop[b, start:stop].tolist()
            ) == {stop}
            end = -(-stop // BLOCK) * BLOCK
            assert not layout.stop[b, stop:end].any() and set(layout.position[b, stop:end].tolist()) <= {at[-1]}
            start = end
        used.append(start)
        assert not layout.stop[b, start:].any()
        assert (layout.padding[b].tolist() if layout.padding is not None else [False] * len(row)) == [
            i < 0 for i in row
        ]
    assert layout.length == max(BLOCK, *used)


def test_tokens_there_and_back_keep_their_bits_and_the_signs_of_zeros() -> None:
    layout = Documents.from_lengths([3, 2]).aligned
    x = torch.tensor([-0.0, 1.0, -2.0, -0.0, 3.0]).view(1, 1, 5, 1).requires_grad_()
    back = layout.packed(layout.spread(x), 0.0)
    (gradient,) = torch.autograd.grad(back, x, x.detach())
    for t in (back, gradient):
        assert torch.equal(t.detach().view(torch.int32), x.detach().view(torch.int32))


# ---- what is refused


def refused(**options: Any) -> tuple[type[Exception], str]:
    q, k, v, _ = drawn(2, 2, 2, 8)
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
        flex_attention(q, options.pop("key", k), options.pop("value", v), **options)
    return error.type, str(error.value)


PACKED = Documents.from_lengths([5, 3])
BLOCKS = create_block_mask(masks.causal_mask, None, None, 8, 8, "cpu")
LONGER = torch.randn(2, 2, 9, 16)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"batch_invariant": torch.tensor([0, 5, 8])}, TypeError, "flexattn.Documents.from_cu_seqlens(cu_seqlens)"),
        ({"batch_invariant": None}, TypeError, "pass True, or for packed rows their documents"),
        ({"batch_invariant": PACKED, "block_mask": BLOCKS}, ValueError, "mask_mod=flexattn.masks.causal_mask"),
        ({"batch_invariant": Documents.from_lengths([9])}, ValueError, "documents of 9 tokens, query has 8 and key 8"),
        ({"batch_invariant": PACKED, "key": LONGER, "value": LONGER}, ValueError, "write batch_invariant=True"),
        ({"batch_invariant": Documents(torch.zeros(3, 8, dtype=torch.int32))}, ValueError, "one row for each batch entry"),
        ({"batch_invariant": Documents(torch.zeros(8, dtype=torch.int32, device="meta"))}, ValueError, "documents.to('cpu')"),
        ({"batch_invariant": True, "kernel_options": {"AUTOTUNE": True}}, ValueError, "depends on the batch that was timed"),
        ({"batch_invariant": True, "kernel_options": {"ONE_PASS": True}}, ValueError, "by atomics"),
        ({"batch_invariant": True, "mask_mod": 5}, TypeError, "mask_mod is a int; pass a function (b, h, q_idx, kv_idx)"),
        ({"kernel_options": {"fwd_BATCH_INVARIANT": True}}, ValueError, "write 'BATCH_INVARIANT'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_to_write(options: dict[str, Any], kind: type, said: str) -> None:
    found, text = refused(**options)
    assert found is kind and said in text, text


# ---- the assertion itself


@backends
def test_the_assertion_fails_without_the_option_and_says_what_to_pass(backend: str) -> None:
    with pytest.raises(AssertionError) as error:
        assert_batch_invariant(mask_mod=masks.causal_mask, backend=backend, batch_invariant=False)
    text = str(error.value)
    assert "pass batch_invariant=documents" in text and "(0x" in text and "document 0, of 37 tokens" in text


def test_the_assertion_tests_a_function_of_ones_own() -> None:
    def invariant(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        return flex_attention(query, key, value, enable_gqa=True, batch_invariant=documents)

    def leaking(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        return flex_attention(query, key, value, enable_gqa=True, batch_invariant=True)

    assert_batch_invariant(attention=invariant, shape=SMALL)
    with pytest.raises(AssertionError, match="If the function calls flex_attention"):
        assert_batch_invariant(attention=leaking, shape=SMALL)


def test_the_assertion_finds_a_mod_that_reads_positions() -> None:
    with pytest.raises(AssertionError, match="A mod that reads absolute positions"):
        assert_batch_invariant(lambda score, b, h, q_idx, kv_idx: score + kv_idx / 10, shape=SMALL)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"documents": torch.tensor([0, 3])}, TypeError, "Documents.from_lengths"),
        ({"mask_mod": masks.causal_mask, "attention": flex_attention}, ValueError, "one of the three"),
        ({"attention": 3}, TypeError, "pass a function"),
        ({"attention": lambda q, k, v, documents: q[..., :2]}, ValueError, "it returned a tensor of shape"),
        ({"shape": Sizes(Hq=3)}, ValueError, "no multiple of Hkv"),
    ],
)
def test_wrong_arguments_of_the_assertion(options: dict[str, Any], kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        assert_batch_invariant(**options)
