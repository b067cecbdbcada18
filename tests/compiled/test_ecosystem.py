"""Attention among other parts of PyTorch: checkpointing, autocast, transforms, tensors without data; also compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from flexattn import create_block_mask, flex_attention, masks

B, H, L, D = 2, 4, 70, 8
FORWARD = torch.ops.flexattn.forward.default
causal = create_block_mask(masks.causal_mask, None, None, L, L, "cpu", 32)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention.mask_mod:UserWarning")
BACKENDS = pytest.mark.parametrize("backend", [None, "eager", "aot_eager", "inductor"])


def leaves() -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [*(torch.randn(B, H, L, D) for _ in range(3)), torch.rand(H)]
    return [t.requires_grad_() for t in tensors]


def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    out: Tensor = flex_attention(q.sin(), k, v, lambda s, b, h, i, j: s * gate[h], causal)
    return out


def compiled(function: Callable[..., Tensor], backend: str | None) -> Callable[..., Tensor]:
    return function if backend is None else torch.compile(function, fullgraph=True, backend=backend)


def outcome(function: Callable[..., Tensor]) -> list[Tensor]:
    tensors = leaves()
    out = function(*tensors)
    out.float().square().sum().backward()
    return [out.detach(), *(t.grad for t in tensors if t.grad is not None)]


# ---- checkpointing


@pytest.mark.feature("torch.utils.checkpoint, both kinds")
@pytest.mark.parametrize("use_reentrant", [False, True])
@BACKENDS
def test_checkpointing_changes_nothing(use_reentrant: bool, backend: str | None) -> None:
    if use_reentrant and backend is not None:
        pytest.skip(
            "Dynamo does not trace the reentrant kind with fullgraph=True; use_reentrant=False is the one to compile"
        )

    def call(*tensors: Tensor) -> Tensor:
        made: Tensor = checkpoint(attend, *tensors, use_reentrant=use_reentrant)
        return made

    torch.testing.assert_close(outcome(compiled(call, backend)), outcome(attend))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_autograd_of_an_eager_forward(fullgraph: bool) -> None:
    expected = outcome(attend)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=fullgraph)):
        torch.testing.assert_close(outcome(attend), expected)


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of the forward operator."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is FORWARD
        return func(*args, **(kwargs or {}))


@pytest.mark.feature("selective activation checkpointing by operator")
@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing_knows_the_operator(saved: bool) -> None:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saved and op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def call(*tensors: Tensor) -> Tensor:
        made: Tensor = checkpoint(attend, *tensors, use_reentrant=False, context_fn=contexts)
        return made

    with Counting() as counting:
        found = outcome(call)
    assert counting.calls == (1 if saved else 2)
    torch.testing.assert_close(found, outcome(attend))
    torch.testing.assert_close(outcome(compiled(call, "aot_eager")), outcome(attend))


@pytest.mark.feature("selective activation checkpointing by operator")
@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing_in_compiled_code(saved: bool) -> None:
    from torch._dynamo.backends.common import aot_autograd

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saved and op is FORWARD else CheckpointPolicy.MUST_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def call(*tensors: Tensor) -> Tensor:
        made: Tensor = checkpoint(attend, *tensors, use_reentrant=False, context_fn=contexts)
        return made

    counts = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        counts.append(sum(n.target is FORWARD for n in graph.graph.nodes))
        return graph

    from functorch.compile import min_cut_rematerialization_partition

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    torch.testing.assert_close(outcome(torch.compile(call, fullgraph=True, backend=backend)), outcome(attend))
    assert counts == ([1, 0] if saved else [1, 1])


# ---- autocast


@pytest.mark.feature("autocast")
@BACKENDS
def test_autocast_decides_the_dtype_and_nothing_else(backend: str | None) -> None:
    def call(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(*tensors)

    def cast(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        q, k, v = (t.bfloat16() for t in (q.sin(), k, v))
        out: Tensor = flex_attention(q, k, v, lambda s, b, h, i, j: s * gate[h], causal)
        return out

    found, expected = outcome(compiled(call, backend)), outcome(cast)
    assert found[0].dtype is torch.bfloat16
    near = {"rtol": 1.6e-2, "atol": 1e-2} if backend == "inductor" else {"rtol": 0, "atol": 0}  # its sin is another
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **near)  # type: ignore[arg-type]


@pytest.mark.feature("autocast")
@BACKENDS
def test_autocast_makes_one_dtype_of_several(backend: str | None) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = flex_attention(q, k, v.bfloat16(), mask_mod=masks.causal_mask)
        return out * gate[0].bfloat16()

    def cast(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        out: Tensor = flex_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask_mod=masks.causal_mask)
        return out * gate[0].bfloat16()

    for actual, wanted in zip(outcome(compiled(call, backend)), outcome(cast), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1.6e-2, atol=1e-2)


@pytest.mark.feature("autocast")
def test_products_inside_the_operators_are_not_cast() -> None:
    def call(*tensors: Tensor) -> Tensor:
        return attend(*(t.double() for t in tensors))  # which autocast leaves alone

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(call)  # the backward pass too
    for actual, wanted in zip(found, outcome(call), strict=True):
        assert torch.equal(actual, wanted)


# ---- transforms


@pytest.mark.feature("torch.func.grad inside a compiled function")
@pytest.mark.skipif(
    torch.__version__.startswith("2.15."),
    reason="Dynamo of PyTorch 2.15 looks for aliases in the mods' graphs, and raises where their inputs are a transform's",
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_gradient_inside_compiled_code(backend: str) -> None:
    tensors = [t.detach() for t in leaves()]

    def gradient(*tensors: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda gate: attend(*tensors[:3], gate).square().sum())(tensors[3])
        return found

    torch.testing.assert_close(compiled(gradient, backend)(*tensors), gradient(*tensors))


@pytest.mark.feature("torch.func.grad inside a compiled function")
@pytest.mark.skipif(torch.__version__.startswith("2.15."), reason="its Dynamo refuses mods under torch.func.grad")
def test_a_gradient_that_requires_one_is_refused_with_what_to_write() -> None:
    def gradient(*tensors: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda gate: attend(*tensors[:3], gate).square().sum())(tensors[3])
        return found

    learned = leaves()
    with pytest.raises(Exception, match=r"detach the first gradient \(of torch.func.grad: its arguments\)"):
        compiled(gradient, "aot_eager")(*learned)
    detached = [t.detach() for t in learned]
    torch.testing.assert_close(compiled(gradient, "aot_eager")(*detached), gradient(*detached))


@pytest.mark.feature("torch.func.vmap inside a compiled function")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_vmap_inside_compiled_code(backend: str) -> None:
    tensors = [t.detach() for t in leaves()]
    gates = torch.rand(3, H)

    def many(*tensors: Tensor) -> Tensor:
        found: Tensor = torch.func.vmap(lambda gate: attend(*tensors[:3], gate))(gates)
        return found

    torch.testing.assert_close(compiled(many, backend)(*tensors), many(*tensors))


# ---- tensors without data


@pytest.mark.feature("meta and fake tensors")
def test_meta_tensors_through_forward_and_backward() -> None:
    tensors = [t.detach().to("meta").requires_grad_() for t in leaves()]
    mask = causal.to("meta")
    out = flex_attention(*tensors[:3], lambda s, b, h, i, j: s * tensors[3][h], mask)
    assert out.device.type == "meta" and out.shape == (B, H, L, D)
    out.sum().backward()
    assert [t.grad is not None and t.grad.shape == t.shape for t in tensors] == [True] * 4
    assert flex_attention(*tensors[:3], mask_mod=masks.causal_mask).shape == (B, H, L, D)


@pytest.mark.feature("meta and fake tensors")
def test_fake_tensors_through_forward_and_backward() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty_like(t).requires_grad_() for t in leaves()]
        out = flex_attention(*tensors[:3], lambda s, b, h, i, j: s * tensors[3][h], mask_mod=masks.causal_mask)
        out.sum().backward()
        assert tensors[3].grad is not None and tensors[3].grad.shape == (H,)


@pytest.mark.feature("FlopCounterMode counts visited blocks")
def test_flops_of_an_exported_model() -> None:
    class Layer(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return attend(*tensors)

    tensors = tuple(t.detach() for t in leaves())
    program = torch.export.export(Layer(), tensors)
    with FlopCounterMode(display=False) as counter:
        program.module()(*tensors)
    assert counter.get_total_flops() == 2 * B * H * (32 * 32 + 32 * 64 + 6 * 70) * 2 * D
