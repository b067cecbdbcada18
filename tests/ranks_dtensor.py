"""Attention on DTensors equals attention in one process: outputs, statistics, gradients, placements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ranks import scenario
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import flexattn
from flexattn import AuxRequest, flex_attention

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
    made = {"slopes": torch.randn(h), "gate": torch.randn(b, h), "table": torch.randn(h, 30), "bias": torch.randn(b, h, L, S)}
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
        assert result.shape == expected.shape and result.stride() == expected.stride()
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
