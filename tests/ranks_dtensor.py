"""Attention on DTensors equals attention in one process: outputs, statistics, gradients, placements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from ranks import scenario
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from flexattn import AuxRequest, BlockMask, create_block_mask, flex_attention

B, H, L, S, E = 3, 4, 40, 48, 8
Mods = Callable[..., dict[str, Any]]


def qkv(b: int = B, h: int = H, kv_b: int | None = None, kv_h: int | None = None) -> list[Tensor]:
    kv = (b if kv_b is None else kv_b, h if kv_h is None else kv_h, S, E)
    return [torch.randn(n, dtype=torch.float64) for n in ((b, h, L, E), kv, (*kv[:3], E + 1))]


def by_plain_index(slopes: Tensor, gate: Tensor, **_: Any) -> dict[str, Any]:
    """Nothing needs the global index but the captured tensors."""
    return {"score_mod": lambda s, b, h, i, j: s * gate[b, h].sigmoid() + slopes[h] * (j - i)}


def by_arithmetic(slopes: Tensor, table: Tensor, **_: Any) -> dict[str, Any]:
    """Indices as numbers, and in computed places of captured tensors."""

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s * (0.5 * h - 0.3 * b + 1) + slopes[(h + 1) % slopes.shape[0]] + table[h, (i - j) // 4 + 12]

    return {"score_mod": score_mod, "mask_mod": lambda b, h, i, j: (j <= i + 3 * b) & ((j + h) % 3 != 0)}


def by_all(bias: Tensor, slopes: Tensor, gate: Tensor, lengths: Tensor, **_: Any) -> dict[str, Any]:
    """A dense bias; tensors that are read at the plain index and at another; a mask for each batch entry."""

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + bias[b, h, i, j] * slopes[h] + slopes[h // 2] + gate[b, h] * 0.01 * i

    return {"score_mod": score_mod, "mask_mod": lambda b, h, i, j: (j < lengths[b]) & (j <= i + 9)}


def tensors(b: int = B, h: int = H) -> dict[str, Tensor]:
    made = {
        "slopes": torch.randn(h),
        "gate": torch.randn(b, h),
        "table": torch.randn(h, 30),
        "bias": torch.randn(b, h, L, S),
    }
    return {**{n: t.double() for n, t in made.items()}, "lengths": torch.tensor([40, 17, 5, 31][:b])}


def alone(operands: Sequence[Tensor], captured: dict[str, Tensor], mods: Mods, **options: Any) -> list[Any]:
    """Outputs of one process, and gradients of the operands and of the captured floats."""
    operands = [t.clone().requires_grad_() for t in operands]
    captured = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in captured.items()}
    out, aux = flex_attention(*operands, **mods(**captured), return_aux=AuxRequest(True, True), **options)
    wrt = [*operands, *(t for t in captured.values() if t.requires_grad)]
    weights = [torch.randn_like(out), torch.randn_like(aux.lse)]
    torch.autograd.backward([out, aux.lse], weights)
    return [out, aux.lse, aux.max_scores, *weights, *(t.grad for t in wrt)]


def check(
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    mods: Mods,
    operands: Sequence[Tensor],
    captured: dict[str, Tensor],
    held: Callable[[str, Tensor], Tensor] = lambda name, t: t.clone(),
    kv_placements: Sequence[Placement] | None = None,
    call: Any = flex_attention,
    **options: Any,
) -> None:
    """`held` says how a captured tensor is held: plain, or as which DTensor."""
    out, lse, max_scores, d_out, d_lse, *gradients = alone(operands, captured, mods, **options)
    kv_placements = placements if kv_placements is None else kv_placements
    leaves = [
        distribute_tensor(t, mesh, p).requires_grad_()
        for t, p in zip(operands, (placements, kv_placements, kv_placements), strict=True)
    ]
    held_captured = {n: held(n, t).requires_grad_(t.is_floating_point()) for n, t in captured.items()}
    made, aux = call(*leaves, **mods(**held_captured), return_aux=AuxRequest(True, True), **options)
    assert not aux.max_scores.requires_grad
    for result, expected in ((made, out), (aux.lse, lse), (aux.max_scores, max_scores)):
        assert isinstance(result, DTensor) and list(result.placements) == list(placements), result.placements
        assert result.shape == expected.shape
        torch.testing.assert_close(result.full_tensor(), expected)
    torch.autograd.backward(
        [made, aux.lse], [distribute_tensor(d_out, mesh, placements), distribute_tensor(d_lse, mesh, placements)]
    )
    leaves += [t for t in held_captured.values() if t.requires_grad]
    for leaf, expected in zip(leaves, gradients, strict=True):
        grad = leaf.grad
        if expected is None:  # these mods do not use it
            assert grad is None
            continue
        assert grad is not None and isinstance(grad, DTensor) == isinstance(leaf, DTensor)
        torch.testing.assert_close(grad.full_tensor() if isinstance(grad, DTensor) else grad, expected)


def ring() -> DeviceMesh:
    return init_device_mesh("cpu", (2,), mesh_dim_names=("ranks",))


ALL_MODS = [by_plain_index, by_arithmetic, by_all]


@scenario()
def plain_captured_tensors_get_the_whole_gradient_on_every_rank() -> None:
    for mods in ALL_MODS:
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            check(ring(), [placement], mods, qkv(), tensors(), kv_placements=[Replicate()])


@scenario()
def captured_dtensors_may_have_any_placement() -> None:
    mesh = ring()

    def partial(name: str, t: Tensor) -> Tensor:
        own = t if mesh.get_local_rank() else torch.zeros_like(t)
        return DTensor.from_local(own, mesh, [Partial()])

    def shard(dim: int) -> Callable[[str, Tensor], Tensor]:
        return lambda name, t: distribute_tensor(t, mesh, [Shard(min(dim, t.dim() - 1))])

    for held in (lambda name, t: distribute_tensor(t, mesh, [Replicate()]), shard(0), shard(1), partial):
        for placement in (Shard(0), Shard(1), Replicate()):
            check(mesh, [placement], by_all, qkv(), tensors(), held)


@scenario()
def keys_and_values_are_placed_as_the_query_needs_them() -> None:
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        for other in (Shard(0), Shard(1), Shard(2), Shard(3), Replicate()):
            check(ring(), [placement], by_arithmetic, qkv(), tensors(), kv_placements=[other])


@scenario()
def parts_may_be_uneven_or_empty() -> None:
    for b, h in ((1, 3), (3, 1), (1, 1), (3, 3)):
        for mods in ALL_MODS:
            for placement in (Shard(0), Shard(1)):
                check(ring(), [placement], mods, qkv(b, h), tensors(b, h))


@scenario()
def grouped_and_shared_heads_and_shared_batches() -> None:
    for kv_h, kv_b in ((2, B), (1, B), (2, 1), (1, 1), (H, 1)):
        for placement in (Shard(0), Shard(1), Shard(2)):
            check(
                ring(),
                [placement],
                by_arithmetic,
                qkv(kv_h=kv_h, kv_b=kv_b),
                tensors(),
                kv_placements=[Replicate()],
                enable_gqa=True,
            )


def block_mask(size: int = 8) -> tuple[Tensor, BlockMask]:
    """A mask that differs between batch entries and heads, and what it reads."""
    lengths = torch.tensor([40, 17, 5])

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < lengths[b]) & (j <= i + 4 * h)

    return lengths, create_block_mask(mask_mod, B, H, L, S, "cpu", size)


@scenario()
def block_masks_are_cut_to_the_part_of_a_rank() -> None:
    _, made = block_mask()
    of_batches = create_block_mask(lambda b, h, i, j: j <= i + 3 * b, B, None, L, S, "cpu", 8)
    of_heads = create_block_mask(lambda b, h, i, j: j <= i + 3 * h, None, H, L, S, "cpu", (4, 16))
    lists_alone = BlockMask.from_kv_blocks(*made.kv_lists(), BLOCK_SIZE=8, seq_lengths=(L, S))
    for mask in (made, of_batches, of_heads, lists_alone):
        for placement in (Shard(0), Shard(1), Replicate()):
            check(ring(), [placement], by_plain_index, qkv(), tensors(), block_mask=mask)
    for mask in (of_heads, create_block_mask(lambda b, h, i, j: j <= i + 3 * h, None, H, L, S, "cpu", (10, 16))):
        check(ring(), [Shard(2)], by_all_but_mask, qkv(), tensors(), kv_placements=[Replicate()], block_mask=mask)


def by_all_but_mask(**captured: Tensor) -> dict[str, Any]:
    return {"score_mod": by_all(**captured)["score_mod"]}


@scenario()
def block_masks_may_hold_dtensors() -> None:
    mesh = ring()
    operands, captured = qkv(), tensors()
    _, made = block_mask()
    mods = by_plain_index(**captured)
    expected = flex_attention(*operands, **mods, block_mask=made)
    for held in (Replicate(), Shard(0), Shard(1), Shard(2)):
        lists = [distribute_tensor(t, mesh, [held]) for t in made.kv_lists()]
        mask = BlockMask.from_kv_blocks(*lists, made.BLOCK_SIZE, made.mask_mod, (L, S))
        for placement in (Shard(0), Shard(1), Replicate()):
            q, k, v = (distribute_tensor(t, mesh, [placement]) for t in operands)
            torch.testing.assert_close(flex_attention(q, k, v, **mods, block_mask=mask).full_tensor(), expected)


@scenario()
def masks_may_read_dtensors() -> None:
    mesh = ring()
    operands = qkv()
    lengths = torch.tensor([40, 17, 5])
    expected = flex_attention(*operands, mask_mod=lambda b, h, i, j: j < lengths[b])
    for held in (Shard(0), Replicate()):
        held_lengths = distribute_tensor(lengths.clone(), mesh, [held])
        for placement in (Shard(0), Shard(1)):
            q, k, v = (distribute_tensor(t, mesh, [placement]) for t in operands)
            for _ in range(2):  # the second time the block mask comes from the cache
                out = flex_attention(q, k, v, mask_mod=lambda b, h, i, j: j < held_lengths[b])
                torch.testing.assert_close(out.full_tensor(), expected)
        with torch.no_grad():
            held_lengths.sub_(4)
        out = flex_attention(q, k, v, mask_mod=lambda b, h, i, j: j < held_lengths[b])
        changed = flex_attention(*operands, mask_mod=lambda b, h, i, j: j < lengths[b] - 4)
        torch.testing.assert_close(out.full_tensor(), changed)


@scenario()
def layouts_dtypes_and_backends() -> None:
    mesh = ring()
    for placement in (Shard(0), Shard(1)):
        check(mesh, [placement], by_all, qkv(h=3), tensors(h=3), backend="reference", scale=0.2)
        # As a model makes them: [batch, length, heads, head_dim], seen from another side.
        operands = qkv(h=3)
        before = [Shard({0: 0, 1: 2}[placement.dim])]
        q, k, v = (distribute_tensor(t.transpose(1, 2).contiguous(), mesh, before).transpose(1, 2) for t in operands)
        out, lse = flex_attention(q, k, v, return_lse=True)
        expected = flex_attention(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands))
        assert out.stride() == expected.stride() and lse.is_contiguous()
        assert out.transpose(1, 2).is_contiguous() and out.to_local().transpose(1, 2).is_contiguous()
        torch.testing.assert_close(out.full_tensor(), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = flex_attention(*(t.float() for t in (q, k, v)))
        assert out.dtype is torch.bfloat16 and out.to_local().dtype is torch.bfloat16


@scenario()
def no_data_moves_that_a_rank_does_not_need() -> None:
    """A captured DTensor that lies along the query's heads: no collective, and a gradient that lies there too."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = ring()
    q, k, v = (distribute_tensor(t, mesh, [Shard(1)]).requires_grad_() for t in qkv())
    slopes = distribute_tensor(torch.randn(H).double(), mesh, [Shard(0)]).requires_grad_()
    with CommDebugMode() as counted:
        out = flex_attention(q, k, v, lambda s, b, h, i, j: s + slopes[h] * j)
        out.backward(distribute_tensor(torch.ones(out.shape).double(), mesh, [Shard(1)], src_data_rank=None))
    assert counted.get_total_counts() == 0, counted.get_comm_counts()
    assert slopes.grad is not None and slopes.grad.placements == (Shard(0),)
    assert slopes.grad.to_local().shape == (H // 2,)


@scenario()
def what_cannot_be_computed_is_refused_on_every_rank() -> None:
    mesh = ring()
    plain = qkv()
    q, k, v = (distribute_tensor(t, mesh, [Shard(1)]) for t in plain)
    whole = [Replicate()]
    total = DTensor.from_local(plain[0], mesh, [Partial()])
    local = torch.zeros(H // 2).double()
    held = distribute_tensor(torch.zeros(H).double(), mesh, whole)
    other_mesh = init_device_mesh("cpu", (2, 1))
    elsewhere = distribute_tensor(plain[1], other_mesh, [Replicate(), Replicate()])
    six, _, _ = (distribute_tensor(t, mesh, [Shard(1)]) for t in qkv(h=6))
    three = [distribute_tensor(t, mesh, whole) for t in qkv(kv_h=3)[1:]]
    rows = create_block_mask(lambda b, h, i, j: i >= j, None, None, L, S, "cpu", 16)
    by_query = distribute_tensor(plain[0], mesh, [Shard(2)])

    def slopes(t: Tensor) -> Any:
        return lambda s, b, h, i, j: s + t[h]

    for call, kind, message in (
        (
            lambda: flex_attention(q, k, plain[2]),
            TypeError,
            "query is a DTensor, key is a DTensor, value is a plain tensor",
        ),
        (lambda: flex_attention(plain[0], k, v), TypeError, "query is a plain tensor, key is a DTensor"),
        (lambda: flex_attention(*plain, slopes(held)), TypeError, r"captures a DTensor of shape \(4,\).*full_tensor"),
        (lambda: flex_attention(q, elsewhere, v), ValueError, "key of shape .* is on another mesh"),
        (
            lambda: flex_attention(q.redistribute(placements=[Shard(3)]), k, v),
            ValueError,
            r"head_dim on dimension 0 \('ranks'\).*redistribute\(placements=\[Replicate\(\)\]\)",
        ),
        (lambda: flex_attention(total, k, v), ValueError, r"is a sum whose terms .*redistribute\(placements"),
        (
            lambda: flex_attention(six, *three, enable_gqa=True),
            ValueError,
            r"6 heads are sharded over 2 ranks, and 3 key and value heads.*repeat_interleave\(2, 1\)",
        ),
        (
            lambda: flex_attention(q, k, v, slopes(local)),
            ValueError,
            r"plain tensor of shape \(2,\) at h, which goes up to 3",
        ),
        (lambda: flex_attention(by_query, k, v, block_mask=rows), ValueError, "begin at 20, inside a block of 16"),
    ):
        with pytest.raises(kind, match=message):
            call()


@scenario()
def compiled_calls_take_dtensors() -> None:
    compiled = torch.compile(flex_attention, fullgraph=True, backend="aot_eager")
    mesh = ring()
    _, made = block_mask()
    check(mesh, [Shard(0)], by_all_but_mask, qkv(), tensors(), call=compiled, block_mask=made)
    torch._dynamo.reset()
    held = lambda name, t: distribute_tensor(t, mesh, [Shard(0)])
    check(mesh, [Shard(1)], by_plain_index, qkv(), tensors(), held, call=compiled)


@scenario()
def a_rank_does_not_take_what_another_has_compiled() -> None:
    """The part of a rank is a constant of its graph, and ranks on one machine share the caches of torch.compile."""
    mesh = ring()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, lambda s, b, h, i, j: s * (h + 1))

    operands = qkv()
    q, k, v = (distribute_tensor(t, mesh, [Shard(1)]) for t in operands)
    compiled = torch.compile(call, fullgraph=True, backend="inductor")
    if mesh.get_local_rank() == 1:
        torch.distributed.barrier()  # until rank 0 has compiled it
    out = compiled(q, k, v)
    if mesh.get_local_rank() == 0:
        torch.distributed.barrier()
    torch.testing.assert_close(out.full_tensor(), call(*operands))


@scenario(world=4)
def a_mesh_of_two_dimensions() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    held = lambda name, t: distribute_tensor(t, mesh, [Replicate(), Shard(0)])
    for placements in (
        [Shard(0), Shard(1)],
        [Shard(1), Shard(0)],
        [Shard(0), Shard(0)],
        [Shard(1), Shard(1)],
        [Replicate(), Shard(1)],
        [Shard(0), Shard(2)],
    ):
        check(mesh, placements, by_all, qkv(), tensors(), kv_placements=[Replicate(), Shard(0)])
        check(mesh, placements, by_arithmetic, qkv(5, 3), tensors(5, 3), held)
