"""Models with attention whose mods hold parameters train on several ranks as they do on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import scenario
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from flexattn import create_block_mask, flex_attention, masks

H, E, L, REACH = 4, 8, 24, 6


class Attention(nn.Module):
    """Learned slopes and a learned table of relative positions, read by the mod."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(H * E, H * E, bias=False) for _ in range(3))
        self.out = nn.Linear(H * E, H * E, bias=False)
        self.slopes = nn.Parameter(torch.randn(H))
        self.table = nn.Parameter(torch.randn(H, 2 * REACH + 1))

    def bias(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + self.slopes[h] * (j - i) + self.table[h, (j - i).clamp(-REACH, REACH) + REACH]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, E)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(flex_attention(q, k, v, self.bias, BLOCKS).transpose(1, 2).flatten(2))


BLOCKS = create_block_mask(masks.causal_mask, None, None, L, L, "cpu", 8)


class Block(nn.Module):
    """Attention with a residual connection, recomputed in the backward if asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(H * E)
        self.attention = Attention()
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            return x + checkpoint(self.inner, x, use_reentrant=False)
        return x + self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return self.attention(self.norm(x)).tanh()


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Block(), Block()).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(4, L, H * E).double(), torch.randn(4, L, H * E).double()


def trained(net: nn.Module, x: Tensor, y: Tensor, parameters: nn.Module | None = None) -> list[dict[str, Tensor]]:
    """Gradients and parameters of a few steps."""
    parameters = net if parameters is None else parameters
    optimizer = torch.optim.SGD(parameters.parameters(), lr=0.5)
    steps = []
    for _ in range(3):
        optimizer.zero_grad()
        out = net(x)
        (out - y).square().mean().backward()
        seen = {n: whole(p.grad) for n, p in parameters.named_parameters()}
        assert all(bool((g != 0).any()) for g in seen.values())
        optimizer.step()
        steps.append({**seen, **{f"new {n}": whole(p) for n, p in parameters.named_parameters()}})
    return steps


def whole(t: Any) -> Tensor:
    made: Tensor = t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()
    return made.clone()


def check(prepare: Callable[[nn.Sequential], nn.Module], split: bool = True) -> None:
    """`prepare` distributes the model; each rank has its part of the batch, unless the batch is not `split`."""
    x, y = data()
    expected = trained(model(), x, y)
    if split:
        x, y = (t.chunk(2)[get_rank() // (get_world_size() // 2)] for t in (x, y))
    net = model()
    for found, wanted in zip(trained(prepare(net), x, y, net), expected, strict=True):
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], msg=lambda m, name=name: f"{name}: {m}")


def sharded(net: nn.Sequential, reshard: bool = True, mesh: DeviceMesh | None = None) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (2,)) if mesh is None else mesh
    for block in net:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(net, mesh=mesh)
    return net


@scenario()
def fully_sharded() -> None:
    check(sharded)
    check(lambda net: sharded(net, False))


@scenario()
def fully_sharded_and_recomputed() -> None:
    def prepare(net: nn.Sequential) -> nn.Module:
        for block in net:
            block.recompute = True
        return sharded(net)

    check(prepare)


@scenario()
def fully_sharded_and_compiled() -> None:
    def prepare(net: nn.Sequential) -> nn.Module:
        for block in net:
            block.compile(backend="aot_eager", fullgraph=True)
        return sharded(net)

    check(prepare)


class Slopes(nn.Module):
    """A mod with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.ones(H))

    def forward(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + self.slopes[h] * (j - i)


@scenario()
def a_mod_that_is_sharded_apart_from_its_layer_is_refused() -> None:
    mod = Slopes()
    q = torch.randn(1, H, L, E)
    expected = flex_attention(q, q, q, mod)
    fully_shard(mod, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    with pytest.raises(ValueError, match=r"shape \(4,\) whose memory is freed.*fully_shard\(layer\)"):
        flex_attention(q, q, q, mod)
    held = mod.slopes
    with pytest.raises(TypeError, match=r"captures a DTensor of shape \(4,\), but query is a plain tensor"):
        flex_attention(q, q, q, lambda score, b, h, i, j: score + held[h] * (j - i))
    mod.unshard()
    torch.testing.assert_close(flex_attention(q, q, q, lambda *a: Slopes.forward(mod, *a)), expected)


@scenario()
def data_parallel() -> None:
    check(DistributedDataParallel)


def parallel(net: nn.Sequential, mesh: DeviceMesh | None = None) -> nn.Sequential:
    """Heads on different ranks; attention sees DTensors."""
    mesh = init_device_mesh("cpu", (2,)) if mesh is None else mesh
    for block in net:
        plan = {f"attention.{n}": ColwiseParallel(use_local_output=False) for n in ("query", "key", "value")}
        parallelize_module(block, mesh, {**plan, "attention.out": RowwiseParallel()})
        attention = block.attention
        attention.slopes = nn.Parameter(distribute_tensor(attention.slopes.detach(), mesh, [Shard(0)]))
    return net


@scenario()
def tensor_parallel() -> None:
    check(parallel, split=False)


@scenario(world=4)
def tensor_parallel_and_fully_sharded() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    check(lambda net: sharded(parallel(net, mesh["heads"]), mesh=mesh["data"]))
